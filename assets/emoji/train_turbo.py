"""Distil the small world's flow model to two steps without guidance: assets/emoji/sd3_turbo.

    python assets/emoji/train_turbo.py

The result is the transformer alone; the rest of the pipeline is that of sd3/. The teacher draws
--paths pictures with guidance 2 in 20 Euler steps, of which five points are kept. The student
learns to do a quarter of a path at once, from each of the first four, and in the second half of the
steps a half of it: from noise, and from the point in the middle. That is progressive distillation
(Salimans and Ho, arXiv 2202.00512) of a guided teacher (Meng et al., arXiv 2210.03142). Stops and
continues from build/emoji/turbo.pt and turbo_paths.pt.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from data import BUILD, load_pairs, sampling_weights, tidy
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_denoiser import SD, SD3, Flow, update_average
from train_lcm import stored_paths
from transformers import CLIPTokenizer

TURBO = SD3.with_name("sd3_turbo")
POINTS = 4  # of a stored path, beside its end
TEACHER_STEPS = 20
GUIDANCE = 2.0


class Paths(NamedTuple):
    """Ways of the teacher from noise to clean latents.

    Latents (N, POINTS + 1, 4, 8, 8), noise first, and the picture whose caption was drawn (N,).
    """

    latents: torch.Tensor
    picked: torch.Tensor


class Captions(NamedTuple):
    """What the transformer is told of every caption, tokens (N, 24, D) and pooled (N, D), of none,
    and how often each is drawn.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    nothing: tuple[torch.Tensor, torch.Tensor]
    weights: torch.Tensor


def ask(
    net: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    tokens: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """The velocity from picture to noise, float32."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return net(latents, tokens, pooled, 1000 * sigma, return_dict=False)[0].float()


@torch.no_grad()
def solve_paths(
    teacher: nn.Module, captions: Captions, count: int, generator: torch.Generator
) -> Paths:
    """`count` paths by guided Euler steps."""
    picked = torch.multinomial(captions.weights, count, replacement=True, generator=generator)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    told = [
        torch.cat([every[picked], nothing.expand(count, *nothing.shape[1:])])
        for every, nothing in zip(captions[:2], captions.nothing, strict=True)
    ]
    points = [latents]
    for step in range(TEACHER_STEPS):
        sigma = torch.full((2 * count,), 1 - step / TEACHER_STEPS)
        cond, uncond = ask(teacher, latents.repeat(2, 1, 1, 1), sigma, *told).chunk(2)
        latents = latents - (uncond + GUIDANCE * (cond - uncond)) / TEACHER_STEPS
        if (step + 1) % (TEACHER_STEPS // POINTS) == 0:
            points.append(latents)
    return Paths(torch.stack(points, dim=1), picked)


def export(average: nn.Module) -> None:
    """Write the averaged student in half precision."""
    copy.deepcopy(average).half().save_pretrained(TURBO)
    tidy(TURBO)


def main() -> None:
    """Train the student from the last checkpoint on, exporting as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.995, help="average that is exported")
    parser.add_argument("--export", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=BUILD / "turbo.pt")
    args = parser.parse_args()
    _, texts = load_pairs()
    tokenizer = CLIPTokenizer.from_pretrained(SD / "tokenizer")
    told = Flow().told
    captions = Captions(*told(tokenizer, texts), told(tokenizer, [""]), sampling_weights(texts))
    teacher = SD3Transformer2DModel.from_pretrained(SD3 / "transformer", torch_dtype=torch.float32)
    teacher.requires_grad_(False).eval()
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    average = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=0.0, fused=True)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    file = args.checkpoint.with_name(f"{args.checkpoint.stem}_paths.pt")
    solve = partial(solve_paths, teacher, captions)
    paths = stored_paths(Paths, solve, args.paths, 128, args.seed + 1, file)
    first, seconds = 0, 0.0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint)
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started, losses = time.time() - seconds, []
    for step in range(first, args.steps):
        rate = args.lr * min(1.0, (step + 1) / 50, 5 * (1 - step / args.steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        path = torch.randint(len(paths.picked), (args.batch,), generator=generator)
        stride = 1 if 2 * step < args.steps else 2
        place = stride * torch.randint(POINTS // stride, (args.batch,), generator=generator)
        here, there = paths.latents[path, place], paths.latents[path, place + stride]
        picked = paths.picked[path]
        velocity = ask(
            student, here, 1 - place / POINTS, captions.tokens[picked], captions.pooled[picked]
        )
        loss = (velocity - (here - there) * POINTS / stride).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_average(average, student, step, args.decay)
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"{step + 1} loss {recent:.4f} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % args.export == 0 or step + 1 == args.steps:
            export(average)
            state = {"student": student.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - started}, args.checkpoint)


if __name__ == "__main__":
    main()
