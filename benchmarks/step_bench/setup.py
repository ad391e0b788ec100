"""What a step of ours and the straightforward one share: pairs, adapter, optimizer, update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cdpo.engine.basics.phases import phase
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.models.pipelines import TEXT_ENCODERS
from cdpo.engine.recipe import Adapter
from diffusers import DiffusionPipeline, ModelMixin
from step_bench.models import StepModel
from torch import Tensor, nn

SEED = 3
LEARNING_RATE, GRADIENT_CLIP = 5e-5, 1.0
SUBJECTS = ("fox", "cat", "house", "tree", "ship", "violin", "apple", "rocket")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")


@dataclass(frozen=True)
class Pairs:
    """B pairs of images and their prompts, in the host's memory."""

    pixels: Tensor
    """(2B, 3, H, W) float32 in [-1, 1], winners first."""
    prompts: list[str]
    """B of them, all different while there are enough."""

    def __len__(self) -> int:
        return len(self.prompts)


def make_pairs(model: StepModel, count: int, device: torch.device) -> Pairs:
    """The same ones every time, in memory that a GPU copies from without waiting."""
    generator = torch.Generator().manual_seed(1)
    pixels = 2 * torch.rand(2 * count, 3, model.side, model.side, generator=generator) - 1
    subjects = [f"{colour} {subject}" for colour in COLOURS for subject in SUBJECTS]
    prompts = [subjects[number % len(subjects)] for number in range(count)]
    return Pairs(in_reach(pixels, device), prompts)


def in_reach(tensor: Tensor, device: torch.device) -> Tensor:
    """In the host's memory and pinned, if the device is a GPU."""
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor


def adapter_of(model: StepModel) -> Adapter:
    """LoRA on the attention."""
    return Adapter(rank=model.rank, alpha=model.rank)


def add_adapter(denoiser: ModelMixin, model: StepModel) -> ModelMixin:
    """The adapter on a denoiser, trainable, with the same values every time."""
    return in_one_dtype(add_lora(denoiser, adapter_of(model), SEED)).train()


def in_one_dtype(policy: ModelMixin) -> ModelMixin:
    """Put the adapter, which is made in float32, into the dtype of its network."""
    dtype = next(weight.dtype for weight in policy.parameters() if not weight.requires_grad)
    for parameter in trainable(policy):
        parameter.data = parameter.data.to(dtype)
    return policy


def latents_of(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) of pixels (N, 3, H, W) in a stock autoencoder's dtype: the mean
    of its posterior, if it has one.
    """
    encoded, config = vae.encode(pixels), vae.config
    latents = encoded.latent_dist.mean if "latent_dist" in encoded else encoded.latent
    shifted: Tensor = latents - (config.get("shift_factor") or 0.0)
    return shifted * config.scaling_factor


def encoders_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders, by the names that their calls are counted under."""
    found = [pipeline.components.get(name) for name in TEXT_ENCODERS]
    return {f"text {i + 1}": encoder for i, encoder in enumerate(found) if encoder is not None}


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class Update:
    """Backward, clipping, AdamW: the end of either step."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda"
        )

    def __call__(self, loss: Tensor) -> None:
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
