"""Train a denoiser of the small world; exports assets/emoji/sd or assets/emoji/sd3.

    python assets/emoji/train_denoiser.py sd --favour 1 --stop 3000
    python assets/emoji/train_denoiser.py sd --stop 6000
    python assets/emoji/train_denoiser.py sd3 --favour 1 --lr 2e-3 --stop 400
    python assets/emoji/train_denoiser.py sd3 --favour 1 --lr 3e-3 --stop 2200

Both learn on the latents of the frozen VAE, with 10 % empty captions for classifier-free guidance
and an exponential moving average of what is trained. `sd`, a UNet and its text encoder together:
epsilon prediction, min-SNR weighting. `sd3`, a transformer that is told what that text encoder,
trained before and frozen, makes of a caption: flow matching, the velocity eps - x0 at noise levels
drawn evenly. Stops and continues from build/emoji/sd.pt or sd3.pt; every --export steps the
averaged weights become a complete pipeline folder. The committed bases are stopped before the
learning rate falls (the last fifth of --steps): trained to the end, the UNet draws nearly every
caption the same way every time, which leaves nothing to prefer.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from pathlib import Path

import torch
from data import BUILD, load_pairs, read_prompts, sampling_weights, tidy, to_unit
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

SD = Path(__file__).resolve().parent / "sd"
SD3 = SD.with_name("sd3")
WIDTH = 128  # of the text encoder, the cross-attention and the transformer


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


def build_transformer() -> SD3Transformer2DModel:
    """About 4.1 M parameters; 2x2 latents are a token, 16 an image, beside 24 of text."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=7,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def load_text_encoder() -> CLIPTextModelWithProjection:
    """That of `sd` in the class that Stable Diffusion 3 wants, with a projection that is none."""
    encoder = CLIPTextModelWithProjection.from_pretrained(
        SD / "text_encoder", torch_dtype=torch.float32
    )
    nn.init.eye_(encoder.text_projection.weight)
    return encoder.eval()


class Diffusion(nn.Module):
    """UNet and text encoder as one module, so that one optimizer and one average hold both."""

    def __init__(self, tokenizer: CLIPTokenizer, gamma: float) -> None:
        super().__init__()
        self.unet, self.text_encoder = build_unet(), build_text_encoder(tokenizer)
        # PyTorch's fused attention is slow backwards on CPUs: 0.33 s a step against 0.20 s without.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder.set_attn_implementation("eager")
        self.to(memory_format=torch.channels_last)
        self.alphas = build_scheduler().alphas_cumprod
        # SNR = a / (1 - a), so min(SNR, gamma) / SNR is the clamped gamma (1 - a) / a.
        self.weights = (gamma * (1 - self.alphas) / self.alphas).clamp(max=1.0)

    def told(self, tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """What :meth:`forward` reads of captions: token ids (N, 24)."""
        return (tokenizer(captions, padding="max_length", return_tensors="pt").input_ids,)

    def draw_times(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (B,)."""
        return torch.randint(0, 1000, (batch,), generator=generator)

    def corrupt(
        self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, what is to be predicted of them, and weights (B,) of the errors."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        return noisy.contiguous(memory_format=torch.channels_last), noise, self.weights[t]

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The noise that the UNet believes to be in the latents."""
        hidden = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, t, hidden, return_dict=False)[0]

    def export(self, tokenizer: CLIPTokenizer) -> None:
        """Write the whole pipeline in half precision; the VAE is taken from the same folder."""
        own = copy.deepcopy(self).to(memory_format=torch.contiguous_format)
        own.unet.set_attn_processor(AttnProcessor2_0())
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(SD / "vae"),
            text_encoder=own.text_encoder,
            tokenizer=tokenizer,
            unet=own.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(SD)
        tidy(SD)


class Flow(nn.Module):
    """A transformer, with the members of :class:`Diffusion`; text and latents are those of `sd`."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        # Blocks that do nothing at first, and an answer of zero: the published way to start one.
        for block in self.transformer.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.zeros_(self.transformer.norm_out.linear.weight)
        nn.init.zeros_(self.transformer.norm_out.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)

    @torch.no_grad()
    def told(self, tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """What Stable Diffusion 3 sees of captions: tokens (N, 24, D) of both its CLIPs side by
        side, from the last layer but one, and pooled ones (N, D). Both CLIPs are that of `sd`.
        """
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        encoder = load_text_encoder()
        seen = [encoder(part, output_hidden_states=True) for part in ids.split(256)]
        tokens = torch.cat([part.hidden_states[-2] for part in seen])
        pooled = torch.cat([part.text_embeds for part in seen])
        return tokens.repeat(1, 1, 2), pooled.repeat(1, 2)

    def draw_times(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Noise levels (B,) from 0 to 1."""
        return torch.rand(batch, generator=generator)

    def corrupt(
        self, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, what is to be predicted of them, and weights (B,) of the errors."""
        share = sigma.view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise, noise - clean, torch.ones_like(sigma)

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """The velocity from picture to noise."""
        with sdpa_kernel(SDPBackend.MATH):  # for the same reason as in the UNet
            return self.transformer(noisy, tokens, pooled, 1000 * sigma, return_dict=False)[0]

    def export(self, tokenizer: CLIPTokenizer) -> None:
        """Write the whole pipeline in half precision, with VAE and text encoder of `sd`."""
        vae = AutoencoderKL.from_pretrained(SD / "vae")
        vae.register_to_config(shift_factor=0.0)  # this pipeline wants one
        encoder = load_text_encoder()
        pipeline = StableDiffusion3Pipeline(
            transformer=copy.deepcopy(self.transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(SD3)
        for name in ("tokenizer", "tokenizer_2"):  # with the two files that tidy() leaves of one
            shutil.copytree(SD / "tokenizer", SD3 / name, dirs_exist_ok=True)
        tidy(SD3)


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


def main() -> None:
    """Train from the last checkpoint on, exporting as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("sd", "sd3"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop", type=int, default=10**9, help="leave early at this step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.9985)
    parser.add_argument(
        "--gamma", type=float, default=5.0, help="min-SNR bound of sd's loss weight"
    )
    parser.add_argument("--favour", type=float, default=4.0, help="weight of prompts_favoured.txt")
    parser.add_argument("--export", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="default: build/emoji/KIND.pt")
    args = parser.parse_args()
    checkpoint = args.checkpoint or BUILD / f"{args.kind}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pixels, captions = load_pairs()
    tokenizer = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    vae = AutoencoderKL.from_pretrained(SD / "vae", torch_dtype=torch.float32).eval()
    means, stds = encode_all(vae, pixels)
    weights = sampling_weights(captions)
    weights[[captions.index(prompt) for prompt in read_prompts("favoured")]] *= args.favour

    model = (Flow() if args.kind == "sd3" else Diffusion(tokenizer, args.gamma)).train()
    told, nothing = model.told(tokenizer, captions), model.told(tokenizer, [""])
    average = copy.deepcopy(model).requires_grad_(False)
    for name, part in model.named_children():
        print(f"{name} {sum(p.numel() for p in part.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, 0.98), weight_decay=0.01, fused=True
    )
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
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
        t = model.draw_times(args.batch, generator)
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        shown = [
            torch.where(dropped.view(-1, *(1,) * (every.ndim - 1)), empty, every[picked])
            for every, empty in zip(told, nothing, strict=True)
        ]
        noisy, target, weight = model.corrupt(clean, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(noisy, t, *shown)
        error = (output.float() - target).square().mean(dim=(1, 2, 3))
        loss = (weight * error).mean()
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
            average.export(tokenizer)
            state = {"model": model.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - started}, checkpoint)


if __name__ == "__main__":
    main()
