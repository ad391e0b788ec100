"""Batches and networks for tests of objectives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tiny
import torch
from cdpo.engine.models.protocol import Backbone, Conditioning, Draw
from cdpo.engine.objectives import TrainingBatch
from cdpo.engine.shards.batch import PairBatch
from torch import Tensor, nn


def corrupted(backbone: Backbone, prompts: list[str]) -> TrainingBatch:
    """A batch as the trainer makes it, of latents of size 1."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * len(prompts), 4, 8, 8, generator=generator)
    ids = torch.arange(len(prompts))
    draw = backbone.noise.draw(3, ids, torch.zeros_like(ids))
    noisy, target = backbone.noise.corrupt(latents, draw, backbone.denoiser.dtype)
    return TrainingBatch(noisy, target, draw, backbone.encode_prompts([*prompts, *prompts]))


def of_noise() -> TrainingBatch:
    """Two pairs for networks of the tiny size, latents and text drawn."""
    generator = torch.Generator().manual_seed(0)
    noisy, noise = (torch.randn(n, 4, 8, 8, generator=generator) for n in (4, 2))
    text = torch.randn(2, 9, 16, generator=generator)
    draw = Draw(torch.tensor([100, 700]), noise_keys=torch.zeros(2, 4, dtype=torch.int64))
    return TrainingBatch(noisy, noise, draw, Conditioning(torch.cat([text, text])))


def of_latents(*ids: int, visit: int = 0) -> PairBatch:
    """Pairs as a shard has them, of 8x8 latents of 4 channels drawn by their ids."""
    rows = [np.random.default_rng(pair).normal(size=(2, 4, 8, 8)) for pair in ids]
    latents = torch.from_numpy(np.stack(rows, axis=1)).flatten(0, 1).half()
    return PairBatch(
        images=latents,
        prompts=[tiny.PROMPTS[pair % len(tiny.PROMPTS)] for pair in ids],
        pair_ids=torch.tensor(ids),
        visits=torch.full((len(ids),), visit),
        ranks=torch.tensor([[1, 2]]).expand(len(ids), 2),
        tiers=torch.ones(len(ids), dtype=torch.int64),
        original_sizes=torch.full((2 * len(ids), 2), 16),
        crops=torch.zeros(2 * len(ids), 2, dtype=torch.int64),
    )


def train_a_little(policy: nn.Module, seed: int = 0) -> None:
    """Let the policy be another than the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.02 * torch.randn(weight.shape, generator=generator).to(weight.device)


def bare(target: Tensor) -> TrainingBatch:
    """A batch for networks that look at nothing."""
    pairs = len(target)
    draw = Draw(torch.arange(pairs) * 7, torch.zeros(pairs, 4, dtype=torch.int64))
    noisy = torch.cat([target, target])
    return TrainingBatch(noisy, target, draw, Conditioning(torch.zeros(2 * pairs, 1, 1)))


def constant(prediction: Tensor) -> Callable[..., Tensor]:
    return lambda noisy, timesteps, conditioning: prediction
