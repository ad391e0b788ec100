"""What the tests of each family of flow models do alike."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import corrupted
from cdpo.engine.models import load_backbone
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.objectives import build_objective
from cdpo.engine.recipe import Model, Recipe
from cdpo.engine.training.networks import build_networks
from diffusers import DiffusionPipeline
from pictures import pixels
from torch import Tensor

CPU = torch.device("cpu")


def load_tiny(folder: Path, **given: Any) -> LatentDiffusion:
    """What a recipe loads that names the folder, on the CPU in float32."""
    return load_backbone(Model(path=str(folder), **given), CPU)


def as_users_load(folder: Path) -> DiffusionPipeline:
    """The stock pipeline in a folder, without its bars."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided(
    backbone: LatentDiffusion, scheduler: Any, prompts: list[str], start: Tensor, guidance: float
) -> np.ndarray:
    """Pictures by our `predict`, a stock scheduler whose timesteps are set, and the stock VAE."""
    told = backbone.encode_prompts([""] * len(prompts) + prompts)
    latents = start
    with torch.no_grad():
        for time in scheduler.timesteps:
            both = torch.cat([latents, latents])
            answer = backbone.predict(backbone.denoiser, both, time.expand(len(both)), told)
            empty, own_answer = answer.chunk(2)
            answer = empty + guidance * (own_answer - empty)
            latents = scheduler.step(answer, time, latents).prev_sample
    return pixels(backbone.vae.decode(latents))


def assert_corrupted_to_velocities(backbone: LatentDiffusion, prompts: list[str]) -> None:
    """Against float64: x = x0 + sigma (eps - x0)."""
    batch = corrupted(backbone, prompts)
    sigma = (batch.draw.timesteps.double() / 1000).repeat(2)[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * len(prompts), 4, 8, 8, generator=generator).double()
    expected = latents + sigma * batch.target.double()
    torch.testing.assert_close(batch.noisy.double(), expected, rtol=0, atol=1e-6)


def assert_fresh_and_learns(
    recipe: Recipe, backbone: LatentDiffusion, prompts: list[str], adapted: int
) -> None:
    """A fresh policy is its reference, has so many adapters, and a step lowers its loss."""
    batch = corrupted(backbone, prompts)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    loss = networks(batch).loss
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    trained = {n: p for n, p in networks.policy.named_parameters() if p.requires_grad}
    assert sum("lora_B" in name for name in trained) == adapted
    with torch.no_grad():
        for parameter in trained.values():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    assert networks(batch).loss.item() < loss.item() - 1e-4
