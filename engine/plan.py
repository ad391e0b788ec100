"""What a recipe will take, computed and not measured: sizes, operations, memory of each rank.

``train.py --dry-run`` prints it. Networks are built from their configs on the meta device, so no
weights and no shards are read, and a plan for a cluster can be made on a laptop.

Operations are counted, not assumed, and given in units of one denoiser forward over one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from ..kernels.fuse import fuse
from .adapters import add_lora
from .backbones import DTYPES
from .deepspeed_config import BatchPlan, build_deepspeed_config, plan_batches
from .plan_memory import Row, Sizes, Zero, memory_rows
from .plan_networks import (
    MetaModel,
    activation_bytes,
    forward_flops,
    read_meta_model,
    training_flops,
)
from .recipe import Recipe
from .speed import choose_tuning

# Frozen passes over the images of a pair. Consistency DPO: reference and target once for each of
# the two images, the teacher twice, with its prompt and without.
FROZEN_PASSES = {"diffusion_dpo": 2, "consistency_dpo": 8}


@dataclass(frozen=True)
class Plan:
    """The numbers behind the tables."""

    networks: dict[str, tuple[int, int]]
    """Parameters of each network, and how many of them train."""
    forward_flops: int
    """Of one denoiser forward over one image: one unit."""
    training_units: float
    """Of forward and backward over one image."""
    frozen_units: float
    """Of the frozen passes for a pair."""
    memory: list[Row]
    """Of each rank."""
    batches: BatchPlan
    """How a rank works through its share of a step."""
    zero_stage: int
    """ZeRO stage of the run."""
    tuning: str
    """The speed knobs that are on, on this machine."""

    @property
    def units_per_pair(self) -> float:
        return 2 * self.training_units + self.frozen_units


def make_plan(recipe: Recipe, world_size: int, device: torch.device) -> Plan:
    """Compute the plan of a recipe for so many ranks; ``device`` is where `auto` knobs look.

    Raises:
        RecipeError: as the training itself would, for what does not fit together.
        OutsideError: for a model whose configs cannot be read.
    """
    spec, resolution = recipe.model, recipe.model.resolution
    config = build_deepspeed_config(recipe, world_size, recipe.run_dir)
    batches = plan_batches(recipe, world_size)
    dtype = DTYPES[recipe.train.precision]
    model = read_meta_model(spec, dtype)
    stage = int(config["zero_optimization"]["stage"])
    tuning = choose_tuning(recipe.speed, model.denoiser, device, zero_stage=stage)

    parts = {"denoiser": model.denoiser, "VAE": model.vae, **model.text_encoders}
    sizes = {name: count_parameters(part) for name, part in parts.items()}
    unit = forward_flops(model, model.denoiser, resolution)
    policy = add_lora(model.denoiser, recipe.adapter, recipe.seed).train()
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    networks = {name: (size, 0) for name, size in sizes.items()} | {"adapter": (trained, trained)}

    # After the operations: what is fused is no longer made of operators that are counted.
    training_units = _training_units(model, policy, recipe, unit)
    if tuning.fused_kernels:
        fuse(policy)
    activations = activation_bytes(
        model,
        policy,
        2 * batches.micro_batch,
        resolution,
        checkpointing=tuning.activation_checkpointing,
    )
    memory = memory_rows(
        Sizes(
            policy=count_parameters(policy),
            trained=trained,
            reference=0,
            bytes_per_weight=dtype.itemsize,
            text_encoders=sum(bytes_of(encoder) for encoder in model.text_encoders.values()),
            vae=bytes_of(model.vae),
            activations=activations,
        ),
        Zero.from_config(config["zero_optimization"], world_size),
        encoders="host" if tuning.offload_encoders else "device",
    )
    return Plan(
        networks=networks,
        forward_flops=unit,
        training_units=training_units,
        frozen_units=FROZEN_PASSES[recipe.objective.type],
        memory=memory,
        batches=batches,
        zero_stage=stage,
        tuning=str(tuning),
    )


def count_parameters(network: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(weight.numel() for weight in network.parameters())


def bytes_of(network: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _training_units(model: MetaModel, policy: ModelMixin, recipe: Recipe, unit: int) -> float:
    if recipe.speed.activation_checkpointing:
        policy.enable_gradient_checkpointing()
    return training_flops(model, policy, recipe.model.resolution) / unit
