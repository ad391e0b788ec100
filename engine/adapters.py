"""LoRA adapters on a denoiser, and a reference that is the same network without them.

The reference is a structural twin whose parameters are the same tensors, made before the adapter is
added: no second copy of the weights, and no switching of adapters between the two passes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from diffusers import ModelMixin, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from .errors import RecipeError
from .recipe import Lora

LORA_FILE = "pytorch_lora_weights.safetensors"


def twin_of(network: ModelMixin) -> ModelMixin:
    """A network of the same structure over the very same parameter tensors."""
    return copy.deepcopy(network, memo={id(p): p for p in network.parameters()})


def add_lora(network: ModelMixin, spec: Lora, seed: int) -> ModelMixin:
    """Freeze ``network`` and give it trainable adapters; B starts at zero: the output is unchanged.

    Raises RecipeError if no layer has one of the names in ``spec.targets``.
    """
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [t for t in spec.targets if not any(name.endswith(f".{t}") for name in linear)]
    if unmatched:
        known = sorted({_suffix(name) for name in linear})
        raise RecipeError(
            f"adapter.targets: {', '.join(unmatched)} matches no linear layer of the denoiser; "
            f"there are {', '.join(known)}"
        )
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(
                r=spec.rank,
                lora_alpha=spec.alpha,
                lora_dropout=spec.dropout,
                target_modules=list(spec.targets),
            )
        )
    return network


def _suffix(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole values of parameters that ZeRO-3 has partitioned; all ranks enter and leave at once."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def export_lora(policy: ModelMixin, folder: Path, *, write: bool) -> None:
    """Save the adapters as `StableDiffusionPipeline.load_lora_weights` takes them.

    Every rank calls it (ZeRO-3 gathers), the one with ``write`` saves.
    """
    trainable = [p for p in policy.parameters() if p.requires_grad]
    with gathered(trainable):
        if not write:
            return
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(policy))
        try:
            StableDiffusionPipeline.save_lora_weights(
                folder,
                unet_lora_layers={
                    name: value.detach().float().cpu() for name, value in state.items()
                },
                unet_lora_adapter_metadata=policy.peft_config["default"].to_dict(),
            )
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from None
