"""Distil the small world's Stable Diffusion into a Latent Consistency Model: assets/emoji/lcm.

    python assets/emoji/train_lcm.py

The result is the UNet alone, as on the hub; VAE, text encoder, tokenizer and noise schedule are
those of sd/. The guidance weight w of `cond + w (cond - uncond)` is an input of the student and
drawn from U[0, 4]: guidance scales s = 1 + w of 1 to 5 in diffusers' convention, around the 2 that
the demo samples with. Two stages, both with a pseudo-Huber distance (c = 0.001):

1. Endpoints. The teacher draws --paths latents from pure noise in 11 guided DDIM steps; the student
   learns to name the last point of a path from any other.
2. Neighbours, the last fifth of the steps: consistency distillation as published. The student's
   estimate at t must be that of its moving average one of 50 DDIM steps of the teacher earlier.

Stage 2 alone gets there too slowly for this much arithmetic. Stops and
continues from build/emoji/lcm.pt and lcm_paths.pt.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from consistency import GUIDANCE_DIM, STRIDE, corrupt, estimate, pseudo_huber, solver_step
from data import BUILD, load_pairs, sampling_weights, tidy
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from train_denoiser import SD, encode_all, update_average
from transformers import CLIPTextModel, CLIPTokenizer

LCM = Path(__file__).resolve().parent / "lcm"
MAX_W = 4.0
POINTS = 12  # of a stored path, both ends included
LAST = 999
Kind = TypeVar("Kind")  # of paths, as named fields


class Example(NamedTuple):
    """What a student is shown: noisy latents (B, 4, 8, 8), t, text states (B, 24, D) and w."""

    noisy: torch.Tensor
    t: torch.Tensor
    states: torch.Tensor
    w: torch.Tensor


class Paths(NamedTuple):
    """Ways of the teacher from noise to clean latents.

    Latents (N, POINTS, 4, 8, 8) at timesteps t (N, POINTS), falling from 999 to 0; the picture
    whose caption was drawn (N,) and w (N,).
    """

    latents: torch.Tensor
    t: torch.Tensor
    picked: torch.Tensor
    w: torch.Tensor


class World:
    """Latents and captions to draw from; a draw depends on nothing but the generator's state."""

    def __init__(self) -> None:
        pixels, captions = load_pairs()
        vae = AutoencoderKL.from_pretrained(SD / "vae", torch_dtype=torch.float32).eval()
        self.means, self.stds = encode_all(vae, pixels)
        self.states, self.empty = encode_captions(captions), encode_captions([""])
        self.weights = sampling_weights(captions)

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of pictures, noise for each, and w."""
        picked = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator)
        return picked, noise, MAX_W * torch.rand(count, generator=generator)


@torch.no_grad()
def encode_captions(captions: list[str]) -> torch.Tensor:
    """Text states (N, 24, D) by the frozen text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(SD / "text_encoder", torch_dtype=torch.float32).eval()
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    return torch.cat([encoder(part).last_hidden_state for part in ids.split(256)])


def solve_paths(
    teacher: UNet2DConditionModel, world: World, count: int, generator: torch.Generator
) -> Paths:
    """`count` paths; the first step goes down 20 to 100, the others 100, so every t is visited."""
    picked, latents, w = world.draw(count, generator)
    t = torch.full((count,), LAST)
    first = STRIDE * torch.randint(1, 6, (count,), generator=generator)
    points, times = [latents], [t]
    while len(points) < POINTS:
        earlier = (t - (first if len(points) == 1 else 5 * STRIDE)).clamp(min=0)
        moved = solver_step(teacher, latents, t, earlier, world.states[picked], world.empty, w)
        # A path that has arrived stays where it is.
        latents, t = torch.where((t == 0).view(-1, 1, 1, 1), latents, moved), earlier
        points.append(latents)
        times.append(t)
    return Paths(torch.stack(points, dim=1), torch.stack(times, dim=1), picked, w)


def stored_paths(
    kind: type[Kind],
    solve: Callable[[int, torch.Generator], Kind],
    count: int,
    at_once: int,
    seed: int,
    file: Path,
) -> Kind:
    """At least `count` paths, in fields that have a row a path and `picked` among them; what the
    file lacks is solved, `at_once` together, and added to it.
    """
    parts = [kind(*torch.load(file))] if file.exists() else []
    started = time.time()
    while (done := sum(len(part.picked) for part in parts)) < count:
        parts.append(solve(at_once, torch.Generator().manual_seed(seed * 10**7 + done)))
        if len(parts) == 9 or done + at_once >= count:
            parts = [kind(*(torch.cat(fields) for fields in zip(*parts, strict=True)))]
            torch.save(tuple(parts[0]), file)
            print(f"{len(parts[0].picked)} paths, {time.time() - started:.0f}s", flush=True)
    return parts[0]


def endpoint_example(
    paths: Paths, world: World, batch: int, generator: torch.Generator
) -> tuple[Example, torch.Tensor]:
    """Points of paths, and where those paths end."""
    path = torch.randint(len(paths.w), (batch,), generator=generator)
    length = (paths.t[path] > 0).sum(dim=1)
    point = (torch.rand(batch, generator=generator) * length).long()
    states = world.states[paths.picked[path]]
    shown = Example(paths.latents[path, point], paths.t[path, point], states, paths.w[path])
    return shown, paths.latents[path, -1]


@torch.no_grad()
def neighbour_example(
    teacher: UNet2DConditionModel,
    target: UNet2DConditionModel,
    world: World,
    batch: int,
    generator: torch.Generator,
) -> tuple[Example, torch.Tensor]:
    """Corrupted pictures, and the target's estimates one DDIM step of the teacher earlier."""
    picked, noise, w = world.draw(batch, generator)
    drawn = torch.randn(noise.shape, generator=generator)
    t = torch.randint(1, 1000 // STRIDE + 1, (batch,), generator=generator) * STRIDE - 1
    noisy = corrupt(world.means[picked] + world.stds[picked] * drawn, noise, t)
    shown, earlier = Example(noisy, t, world.states[picked], w), (t - STRIDE).clamp(min=0)
    before = solver_step(teacher, noisy, t, earlier, shown.states, world.empty, w)
    return shown, estimate(target, before, earlier, shown.states, w)


def build_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an input for w, which has no effect before the first step."""
    config = {**teacher.config, "time_cond_proj_dim": GUIDANCE_DIM}
    student = UNet2DConditionModel.from_config(config)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected
    return student


def export(average: UNet2DConditionModel) -> None:
    """Write the averaged student in half precision."""
    unet = copy.deepcopy(average).half().to(memory_format=torch.contiguous_format)
    unet.set_attn_processor(AttnProcessor2_0())
    unet.save_pretrained(LCM)
    tidy(LCM)


def main() -> None:
    """Train the student from the last checkpoint on, exporting as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--neighbours", type=float, default=0.2, help="share of steps in stage 2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--bound", type=float, default=5.0, help="of the loss weight")
    parser.add_argument("--target-decay", type=float, default=0.95, help="average that teaches")
    parser.add_argument("--decay", type=float, default=0.995, help="average that is exported")
    parser.add_argument("--export", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=BUILD / "lcm.pt")
    args = parser.parse_args()
    world = World()
    teacher = UNet2DConditionModel.from_pretrained(SD / "unet", torch_dtype=torch.float32)
    teacher.set_attn_processor(AttnProcessor())  # for the reason given in train_denoiser.py
    teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    student = build_student(teacher).to(memory_format=torch.channels_last)
    student.set_attn_processor(AttnProcessor())
    nets = {"student": student.train().requires_grad_(True)}
    nets |= {name: copy.deepcopy(student).requires_grad_(False) for name in ("target", "average")}
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0.0, fused=True)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    file = args.checkpoint.with_name(f"{args.checkpoint.stem}_paths.pt")
    solve = partial(solve_paths, teacher, world)
    paths = stored_paths(Paths, solve, args.paths, 64, args.seed + 1, file)
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
        rate = args.lr * min(1.0, (step + 1) / 50, 5 * (1 - step / args.steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        if step < (1 - args.neighbours) * args.steps:
            shown, wanted = endpoint_example(paths, world, args.batch, generator)
        else:
            shown, wanted = neighbour_example(teacher, nets["target"], world, args.batch, generator)
        loss = pseudo_huber(estimate(student, *shown), wanted, shown.t, args.bound)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_average(nets["target"], student, step, args.target_decay)
        update_average(nets["average"], student, step, args.decay)
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"{step + 1} loss {recent:.4f} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % args.export == 0 or step + 1 == args.steps:
            export(nets["average"])
            state = {name: net.state_dict() for name, net in nets.items()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - started}, args.checkpoint)


if __name__ == "__main__":
    main()
