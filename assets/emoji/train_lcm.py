"""Distil the small world's Stable Diffusion into a Latent Consistency Model: assets/emoji/lcm.

    python assets/emoji/train_lcm.py

Latent consistency distillation (Luo et al., arXiv 2310.04378): the student's estimate of the clean
latents must be the same at two neighbouring points of the teacher's DDIM path. The result is the
UNet alone, as on the hub; VAE, text encoder, tokenizer and noise schedule are those of sd/.

The guidance weight w of `cond + w (cond - uncond)` is an input of the student and drawn from
U[0, 4] in training: guidance scales s = 1 + w of 1 to 5 in diffusers' convention, around the 2 that
the demo samples with. Stops and continues from build/emoji/lcm.pt; every --export steps the
averaged weights are written out. It has not been run to its end yet, so the repository holds no
assets/emoji/lcm.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from data import BUILD, load_pairs, sampling_weights, tidy
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from train_unet import SD, build_scheduler, encode_all, update_average
from transformers import CLIPTextModel, CLIPTokenizer

LCM = Path(__file__).resolve().parent / "lcm"
GUIDANCE_DIM = 256  # of the sinusoidal embedding of w, as published
MAX_W = 4.0
STRIDE = 20  # 50 DDIM steps: t = 19, 39 ... 999
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # LCMScheduler's
HUBER_C = 1e-3


class Batch(NamedTuple):
    """One draw: clean latents and noise (B, 4, 8, 8), text states (B, 24, D), t and w (B,)."""

    clean: torch.Tensor
    noise: torch.Tensor
    states: torch.Tensor
    t: torch.Tensor
    w: torch.Tensor


def build_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an input for w, which has no effect before the first step."""
    config = {**teacher.config, "time_cond_proj_dim": GUIDANCE_DIM}
    student = UNet2DConditionModel.from_config(config)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected
    return student


def embed_guidance(w: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of 1000 w, (B, 256), as in diffusers' LatentConsistencyModelPipeline."""
    half = GUIDANCE_DIM // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class DiffusionPath:
    """What turns a noise prediction at t into clean latents or into the latents before them."""

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.alphas = alphas_cumprod

    def at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level at t, each (B, 1, 1, 1)."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def corrupt(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noisy latents at t."""
        signal, sigma = self.at(t)
        return signal * clean + sigma * noise

    def clean(self, noisy: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The latents that `noise` leaves when it is taken out of `noisy`."""
        signal, sigma = self.at(t)
        return (noisy - sigma * noise) / signal

    def consistency(
        self, noisy: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """f(x, t) = c_skip x + c_out x0; at t = 0 it is x itself."""
        s = (t * TIMESTEP_SCALING).view(-1, 1, 1, 1)
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s / (s**2 + SIGMA_DATA**2).sqrt()
        return c_skip * noisy + c_out * self.clean(noisy, noise, t)


@torch.no_grad()
def solver_step(
    teacher: UNet2DConditionModel,
    path: DiffusionPath,
    noisy: torch.Tensor,
    batch: Batch,
    earlier: torch.Tensor,
    empty: torch.Tensor,
) -> torch.Tensor:
    """One DDIM step of the guided teacher, from t to `earlier`.

    Half precision will do: the step is short, so an error of the noise shrinks to a few percent.
    """
    both = torch.cat([batch.states, empty.expand_as(batch.states)])
    with torch.autocast("cpu", torch.bfloat16):
        output = teacher(noisy.repeat(2, 1, 1, 1), batch.t.repeat(2), both, return_dict=False)[0]
    cond, uncond = output.float().chunk(2)
    guided = cond + batch.w.view(-1, 1, 1, 1) * (cond - uncond)
    return path.corrupt(path.clean(noisy, guided, batch.t), guided, earlier)


def estimate(
    net: UNet2DConditionModel,
    path: DiffusionPath,
    noisy: torch.Tensor,
    t: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """Clean latents by student or target, in float32.

    At t = 999 an error of the noise counts 66 times in the clean latents; bf16 alone, wrong by
    0.005, would make that 0.3 of their deviation.
    """
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    noise = net(noisy, t, batch.states, timestep_cond=embed_guidance(batch.w), return_dict=False)[0]
    return path.consistency(noisy, noise, t)


def pseudo_huber(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c."""
    return ((prediction - target).square() + HUBER_C**2).sqrt().mean() - HUBER_C


@torch.no_grad()
def encode_captions(captions: list[str]) -> torch.Tensor:
    """Text states (N, 24, D) by the frozen text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(SD / "text_encoder", torch_dtype=torch.float32).eval()
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    return torch.cat([encoder(part).last_hidden_state for part in ids.split(256)])


class Draws:
    """Training examples; the batch of a step depends on nothing but seed and step."""

    def __init__(self, batch: int, seed: int) -> None:
        pixels, captions = load_pairs()
        vae = AutoencoderKL.from_pretrained(SD / "vae", torch_dtype=torch.float32).eval()
        self.means, self.stds = encode_all(vae, pixels)
        self.states, self.empty = encode_captions(captions), encode_captions([""])
        self.weights = sampling_weights(captions)
        self.batch, self.seed = batch, seed

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 10**7 + step)
        picked = torch.multinomial(self.weights, self.batch, generator=generator)
        draws = torch.randn(2, self.batch, *self.means.shape[1:], generator=generator)
        t = torch.randint(1, 1000 // STRIDE + 1, (self.batch,), generator=generator) * STRIDE - 1
        w = MAX_W * torch.rand(self.batch, generator=generator)
        clean = self.means[picked] + self.stds[picked] * draws[0]
        return Batch(clean, draws[1], self.states[picked], t, w)


def export(average: UNet2DConditionModel) -> None:
    """Write the averaged student in half precision."""
    unet = copy.deepcopy(average).half().to(memory_format=torch.contiguous_format)
    unet.set_attn_processor(AttnProcessor2_0())
    unet.save_pretrained(LCM)
    tidy(LCM)


def main() -> None:
    """Train the student from the last checkpoint on, exporting as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--target-decay", type=float, default=0.95, help="average that teaches")
    parser.add_argument("--decay", type=float, default=0.998, help="average that is exported")
    parser.add_argument("--export", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=BUILD / "lcm.pt")
    args = parser.parse_args()
    draws = Draws(args.batch, args.seed)
    path = DiffusionPath(build_scheduler().alphas_cumprod)
    teacher = UNet2DConditionModel.from_pretrained(SD / "unet", torch_dtype=torch.float32)
    teacher.set_attn_processor(AttnProcessor())  # for the reason given in train_unet.py
    teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    student = build_student(teacher).to(memory_format=torch.channels_last)
    student.set_attn_processor(AttnProcessor())
    nets = {"student": student.train().requires_grad_(True)}
    nets |= {name: copy.deepcopy(student).requires_grad_(False) for name in ("target", "average")}
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0.0, fused=True)
    first, seconds = 0, 0.0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint)
        for name, net in nets.items():
            net.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started, losses = time.time() - seconds, []
    for step in range(first, args.steps):
        # Constant until the last fifth: --steps may be raised between two runs.
        rate = args.lr * min(1.0, (step + 1) / 100, 5 * (1 - step / args.steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = draws(step)
        noisy = path.corrupt(batch.clean, batch.noise, batch.t)
        earlier = (batch.t - STRIDE).clamp(min=0)
        before = solver_step(teacher, path, noisy, batch, earlier, draws.empty)
        with torch.no_grad():
            wanted = estimate(nets["target"], path, before, earlier, batch)
        loss = pseudo_huber(estimate(student, path, noisy, batch.t, batch), wanted)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_average(nets["target"], student, step, args.target_decay)
        update_average(nets["average"], student, step, args.decay)
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / len(losses[-50:])
            clock = time.time() - started
            print(f"{step + 1} loss {recent:.4f} gradient {norm:.2f} {clock:.0f}s", flush=True)
        if (step + 1) % args.export == 0 or step + 1 == args.steps:
            export(nets["average"])
            state = {name: net.state_dict() for name, net in nets.items()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - started}, args.checkpoint)


if __name__ == "__main__":
    main()
