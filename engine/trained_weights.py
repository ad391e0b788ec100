"""Whole float32 values of what DeepSpeed trains, whichever ZeRO stage has divided them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from torch import Size, Tensor, nn

from .averaging import averages_in_place


class TrainedWeights:
    """The parameters of a network that an engine trains: master weights, or their averages.

    The master weights are float32 in every precision, and the network computes with their rounded
    values, so a file of them gives the same network when it is loaded in that precision.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, network: nn.Module) -> None:
        self._engine = engine
        self._parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}

    @property
    def shapes(self) -> dict[str, Size]:
        """Names, in the network's order, and whole shapes."""
        return {
            name: getattr(parameter, "ds_shape", parameter.shape)
            for name, parameter in self._parameters.items()
        }

    @contextmanager
    def averaged(self, wanted: bool) -> Iterator[None]:
        """Within, the values are the moving averages (if ``wanted``)."""
        with averages_in_place(self._engine.optimizer.optimizer) if wanted else nullcontext():
            yield

    def gather(self, name: str) -> Tensor:
        """One parameter, whole, float32, on the device; all ranks call together."""
        value = safe_get_full_fp32_param(self._parameters[name])
        assert value is not None, f"DeepSpeed keeps no master weights of {name}"
        return value.detach()
