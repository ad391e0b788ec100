"""Train the x4 AutoencoderKL of the small world on all pictures; writes assets/emoji/sd/vae.

    python assets/emoji/train_vae.py --steps 1000 --batch 56
    python assets/emoji/train_vae.py --steps 1000 --decoder-only

Loss: L1 on pixels + L1 on their finite differences (keeps edges sharp) + a small KL term, which
also keeps the posterior wide enough that the decoder forgives the slips of the diffusion model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from data import BUILD, load_pairs, sampling_weights, tidy, to_unit
from diffusers import AutoencoderKL
from torch.nn import functional as F

OUT = Path(__file__).resolve().parent / "sd" / "vae"


def build_vae() -> AutoencoderKL:
    """About 0.8 M parameters; 32x32 pixels become 4 channels of 8x8."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        force_upcast=False,
    )


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each batch by up to two pixels with white borders: the VAE learns more than 3,944."""
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (2, 2, 2, 2), value=1.0)
    return padded[:, :, 2 + dy : 34 + dy, 2 + dx : 34 + dx]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on horizontal and vertical differences."""
    loss = (output - target).abs().mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1, exactly undone by the decoder.

    Pipelines know one scaling factor for all channels and no shift; the 1x1 convolutions at both
    ends of the latent space can absorb the rest: z' = (z - m) / s and W z = W s z' + W m.
    """
    vae.eval()
    latents = torch.cat([vae.encode(to_unit(p)).latent_dist.mode() for p in pixels.split(256)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    outer, inner = vae.quant_conv, vae.post_quant_conv
    inner.bias += inner.weight[:, :, 0, 0] @ mean
    inner.weight *= std[None, :, None, None]
    # The second half of the moments is the log variance.
    outer.bias -= torch.cat([mean, 2 * std.log()])
    outer.weight[:4] /= std[:, None, None, None]
    outer.bias[:4] /= std


@torch.no_grad()
def measure(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """PSNR in dB of the mean reconstruction, standard deviation and mean of the latents."""
    vae.eval()
    errors, latents = [], []
    for part in pixels.split(256):
        posterior = vae.encode(to_unit(part)).latent_dist
        latents.append(posterior.sample())
        output = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        errors.append(((output - to_unit(part)) / 2).square().mean(dim=(1, 2, 3)))
    psnr = (-10 * torch.log10(torch.cat(errors))).mean().item()
    vae.train()
    stacked = torch.cat(latents)
    return psnr, stacked.std().item(), stacked.mean(dim=(0, 2, 3))


def main() -> None:
    """Train, whiten the latents, measure their scale and save in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-only", action="store_true", help="refine the saved decoder")
    parser.add_argument("--checkpoint", type=Path, help="default: build/emoji/vae*.pt")
    args = parser.parse_args()
    checkpoint = args.checkpoint or BUILD / f"vae{'_decoder' * args.decoder_only}.pt"
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pixels, captions = load_pairs()
    # The square root lies between even coverage of all pictures and the weights of the UNet.
    weights = sampling_weights(captions)
    weights = weights if args.decoder_only else weights.sqrt()
    vae = AutoencoderKL.from_pretrained(OUT) if args.decoder_only else build_vae()
    vae = vae.float().to(memory_format=torch.channels_last).train()
    if args.decoder_only:  # the latents, and so a UNet trained on them, stay valid
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    params = [p for p in vae.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.05
    )
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        if state["step"] < args.steps:
            vae.load_state_dict(state["vae"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            first = state["step"]
    started = time.time()
    for step in range(first, args.steps):
        picked = torch.multinomial(weights, args.batch, generator=generator)
        target = to_unit(pixels[picked])
        if not args.decoder_only:
            target = augment(target, generator)
        target = target.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float(), target)
        if not args.decoder_only:
            loss = loss + args.kl * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{step + 1} loss {loss.item():.4f} {time.time() - started:.0f}s", flush=True)
        if step % 500 == 499 or step == args.steps - 1:
            psnr, std, mean = measure(vae, pixels[::8])
            print(f"{step + 1} PSNR {psnr:.2f} dB, latent std {std:.3f}, mean {mean}", flush=True)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "schedule": schedule.state_dict(), "step": step + 1}, checkpoint)
    if not args.decoder_only:
        whiten(vae, pixels)
        vae.register_to_config(scaling_factor=1.0 / measure(vae, pixels)[1])
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(OUT)
    tidy(OUT)


if __name__ == "__main__":
    main()
