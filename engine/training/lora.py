"""A trained adapter as it is exported: its scale is in the numbers, so that no reader can miss it.

Every program multiplies B A by a scale of its own reckoning: alpha / rank if it finds an alpha, 1
if not, alpha / sqrt(rank) if it knows of rsLoRA. B times the scale, with an alpha that is the rank,
is the same adapter for all of them. For DoRA, too, whose magnitudes are those of W + scale B A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.adapters import padded
from ..recipe import Adapter

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of the layers of a denoiser, all of one rank: W + B A."""

    values: dict[str, Tensor]
    """By layer and part, as `peft.get_peft_model_state_dict` names them: `lora_A.weight` (r, in)
    or, of a convolution, (r, in, h, w), `lora_B.weight` (out, r) or (out, r, 1, 1), and under DoRA
    `lora_magnitude_vector`."""
    rank: int

    @property
    def is_dora(self) -> bool:
        """Whether lengths and directions of weights are apart."""
        return any(name.endswith(MAGNITUDE) for name in self.values)

    @property
    def layers(self) -> list[str]:
        """What is adapted, by the names of the denoiser's modules."""
        return sorted({name.removesuffix(f".{UP}") for name in self.values if name.endswith(UP)})

    @property
    def config(self) -> dict[str, Any]:
        """The same for peft's `LoraConfig`, in words that its versions since 0.9 know."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": self.layers,
            "lora_dropout": 0.0,  # is of training
            "bias": "none",
            "use_rslora": False,
            "use_dora": self.is_dora,
        }


def trained_lora(values: dict[str, Tensor], spec: Adapter) -> Lora:
    """The adapter of a recipe: ``values`` are those of :class:`Lora`, B without its scale."""
    return Lora(_scaled(values, _scale(spec)), spec.rank)


def untrained_lora(lora: Lora, spec: Adapter) -> dict[str, Tensor]:
    """What :func:`trained_lora` makes that adapter of."""
    return _scaled(lora.values, 1 / _scale(spec))


def _scale(spec: Adapter) -> float:
    return spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)


def _scaled(values: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {name: value * scale if name.endswith(UP) else value for name, value in values.items()}


def both(one: Lora, other: Lora) -> Lora:
    """The sum of two adapters as one: B A + B' A' = [B B'] [A; A']. Neither may be a DoRA.

    Layers that only one adapts get zeros in place of the other, so that the rank is one everywhere:
    readers that find several take the most frequent one's scale for all.
    """
    rank = one.rank + other.rank
    values = {}
    for layer in sorted({*one.layers, *other.layers}):
        for part, axis in ((DOWN, 0), (UP, 1)):
            name = f"{layer}.{part}"
            found = [lora.values[name] for lora in (one, other) if name in lora.values]
            values[name] = padded(torch.cat(found, dim=axis), axis, rank)
    return Lora(values, rank)
