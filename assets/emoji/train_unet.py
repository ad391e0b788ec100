"""Train UNet and text encoder of the small world together; exports assets/emoji/sd.

    python assets/emoji/train_unet.py --favour 1 --stop 3000
    python assets/emoji/train_unet.py --stop 6000

Epsilon prediction on the latents of the frozen VAE, min-SNR weighting, 10 % empty captions for
classifier-free guidance, an exponential moving average of both networks. Stops and continues from
build/emoji/unet.pt; every --export steps the averaged weights become a complete pipeline folder.
The committed base is stopped before the learning rate falls (the last fifth of --steps): trained
to the end it draws nearly every caption the same way every time, which leaves nothing to prefer.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from data import BUILD, load_pairs, read_prompts, sampling_weights, tidy, to_unit
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD = Path(__file__).resolve().parent / "sd"
WIDTH = 128  # of the text encoder and the cross-attention


def build_unet() -> UNet2DConditionModel:
    """About 4.2 M parameters; self- and cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(2, 4),  # diffusers reads this as the number of heads: 32 channels each
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer of two layers, about 0.7 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule with more noise at the end.

    On latents as small as 8x8 the usual beta_end of 0.012 leaves enough signal in the last step
    for the mean colour to leak. Trailing spacing spends few steps where nothing is left to decide.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


class Denoiser(nn.Module):
    """UNet and text encoder as one module, so that one optimizer and one average hold both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The noise that the UNet believes to be in the latents."""
        hidden = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, t, hidden, return_dict=False)[0]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled mean and standard deviation of the posterior of every picture."""
    means, stds = [], []
    for part in pixels.split(256):
        posterior = vae.encode(to_unit(part)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    scale = vae.config.scaling_factor
    return torch.cat(means) * scale, torch.cat(stds) * scale


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average that starts as a plain mean."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def export(average: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Write the whole pipeline in half precision; the VAE is taken from the same folder."""
    average = copy.deepcopy(average).to(memory_format=torch.contiguous_format)
    average.unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(SD / "vae"),
        text_encoder=average.text_encoder,
        tokenizer=tokenizer,
        unet=average.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(SD)
    tidy(SD)


def main() -> None:
    """Train both networks from the last checkpoint on, exporting as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop", type=int, default=10**9, help="leave early at this step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.9985)
    parser.add_argument("--gamma", type=float, default=5.0, help="min-SNR bound of the loss weight")
    parser.add_argument("--favour", type=float, default=4.0, help="weight of prompts_favoured.txt")
    parser.add_argument("--export", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=BUILD / "unet.pt")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pixels, captions = load_pairs()
    tokenizer = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    pad = {"padding": "max_length", "return_tensors": "pt"}
    ids = tokenizer(captions, **pad).input_ids
    empty = tokenizer([""], **pad).input_ids
    vae = AutoencoderKL.from_pretrained(SD / "vae", torch_dtype=torch.float32).eval()
    means, stds = encode_all(vae, pixels)
    weights = sampling_weights(captions)
    weights[[captions.index(prompt) for prompt in read_prompts("favoured")]] *= args.favour
    alphas = build_scheduler().alphas_cumprod
    snr_weight = (args.gamma * (1 - alphas) / alphas).clamp(max=1.0)

    model = Denoiser(build_unet(), build_text_encoder(tokenizer))
    # PyTorch's fused attention is slow backwards on CPUs: 0.33 s a step against 0.20 s without.
    model.unet.set_attn_processor(AttnProcessor())
    model.text_encoder.set_attn_implementation("eager")
    model = model.to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).requires_grad_(False)
    print(
        f"UNet {sum(p.numel() for p in model.unet.parameters()):,}, text encoder "
        f"{sum(p.numel() for p in model.text_encoder.parameters()):,} parameters",
        flush=True,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, 0.98), weight_decay=0.01, fused=True
    )
    first, seconds = 0, 0.0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started, losses = time.time() - seconds, []
    for step in range(first, min(args.steps, args.stop)):
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        # Constant until the last fifth: --steps may be raised between two runs.
        rate = args.lr * min(1.0, (step + 1) / 200, 5 * (1 - step / args.steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = torch.multinomial(weights, args.batch, generator=generator)
        draws = torch.randn(2, args.batch, *means.shape[1:], generator=generator)
        clean, noise = means[picked] + stds[picked] * draws[0], draws[1]
        t = torch.randint(0, 1000, (args.batch,), generator=generator)
        dropped = torch.rand(args.batch, 1, generator=generator) < 0.1
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                noisy.contiguous(memory_format=torch.channels_last),
                t,
                torch.where(dropped, empty, ids[picked]),
            )
        error = (output.float() - noise).square().mean(dim=(1, 2, 3))
        # SNR = a / (1 - a), so min(SNR, gamma) / SNR is the clamped gamma (1 - a) / a.
        loss = (snr_weight[t] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step, args.decay)
        losses.append(loss.item())
        if step % 100 == 99:
            seconds = time.time() - started
            print(
                f"{step + 1} loss {sum(losses[-100:]) / len(losses[-100:]):.4f} {seconds:.0f}s",
                flush=True,
            )
        if (step + 1) % args.export == 0 or step + 1 == min(args.steps, args.stop):
            export(average, tokenizer)
            state = {"model": model.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - started}, args.checkpoint)


if __name__ == "__main__":
    main()
