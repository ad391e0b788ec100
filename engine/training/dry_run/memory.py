"""What one rank needs in memory under each ZeRO stage: arithmetic over sizes, nothing is measured.

Notation: W ranks, P parameters of the policy, T of them trained, b bytes a parameter. Sources: the
ZeRO paper (Rajbhandari et al., arXiv 1910.02054) and what DeepSpeed 0.19 allocates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..deepspeed_config import divisors

Place = Literal["device", "host", "nvme"]
FLOAT32 = 4
ADAMW_STATES = 3  # float32 weights, and the two moments
# Of a device's memory that is planned with. What is not counted takes the rest: CUDA's context and
# libraries, workspaces of convolutions, gradients on their way, holes between blocks.
PLANNED_SHARE = 0.8


@dataclass(frozen=True)
class Sizes:
    """What is to be held: elements where not said otherwise."""

    policy: int
    """Parameters of the policy, adapters included (P)."""
    trained: int
    """Those that train (T)."""
    frozen: Mapping[str, int]
    """Parameters that each frozen network has of its own; 0 where they are the policy's."""
    bytes_per_weight: int
    """Of the denoisers' arithmetic (b)."""
    text_encoders: int
    """Bytes."""
    vae: int
    """Bytes."""
    activations: int
    """Bytes kept for the backward pass of one micro-batch."""
    in_fewer_bits: int = 0
    """Parameters of the policy that are kept in fewer bits: no parameters to ZeRO."""
    quantized: int = 0
    """Bytes that those take, whole on every rank."""
    averaged: bool = False
    """Whether the optimiser keeps a moving average of what trains."""
    moving: int = 0
    """Elements of the average that the reference follows, whole on every rank."""


@dataclass(frozen=True)
class Zero:
    """The parts of a DeepSpeed configuration that decide memory."""

    stage: int
    world_size: int
    bucket: int
    """Elements of one reduction bucket."""
    num_buckets: int
    """Buckets at once: two where communication overlaps the backward pass."""
    most_gathered: int = 0
    """ZeRO-3: elements that may be whole on a rank at once."""
    optimizer: Place = "device"
    """Where optimiser states are."""
    weights: Place = "device"
    """ZeRO-3: where the parts of the weights are."""

    @classmethod
    def from_config(cls, zero: Mapping[str, Any], world_size: int) -> Zero:
        """Of a `zero_optimization` section, DeepSpeed's own defaults filled in."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # seconds to import

        whole = DeepSpeedZeroConfig(**zero)
        buckets = 2 if whole.overlap_comm and whole.contiguous_gradients else 1
        return cls(
            stage=int(whole.stage),
            world_size=world_size,
            bucket=int(whole.reduce_bucket_size),
            num_buckets=buckets,
            most_gathered=int(whole.max_live_parameters),
            optimizer=_place(whole.offload_optimizer),
            weights=_place(whole.offload_param) if whole.stage == 3 else "device",
        )


@dataclass(frozen=True)
class Row:
    """Bytes of one kind of thing on one rank."""

    name: str
    device: int = 0
    host: int = 0
    nvme: int = 0
    note: str = ""


def memory_rows(
    sizes: Sizes,
    zero: Zero,
    *,
    streamed_reference: bool = False,
    encoders: Place = "device",
) -> list[Row]:
    """What one rank holds at the end of a forward pass and in the optimiser step, a row a kind.

    Args:
        sizes: of the networks.
        zero: of the run.
        streamed_reference: whether the reference waits in host memory, outside of ZeRO.
        encoders: where text encoders and VAE wait.
    """
    width, ranks = sizes.bytes_per_weight, zero.world_size
    weight_ranks = ranks if zero.stage == 3 else 1
    gradient_ranks = ranks if zero.stage >= 2 else 1
    share = _shares(sizes.trained, ranks)
    frozen_rows = []
    partitioned = whole = sizes.policy - sizes.in_fewer_bits
    for name, elements in sizes.frozen.items():
        if not elements:
            frozen_rows.append(Row(name, note="the policy's own"))
        elif name == "reference" and streamed_reference:
            frozen_rows.append(Row(name, host=elements * width, note="streamed"))
        else:
            partitioned += elements
            frozen_rows.append(_at(zero.weights)(name, _shares(elements, weight_ranks) * width))
    bucket = min(zero.bucket, sizes.trained) * zero.num_buckets * width
    rows = [
        _at(zero.weights)("policy weights", _shares(whole, weight_ranks) * width),
        Row("weights in fewer bits", device=sizes.quantized),
        *frozen_rows,
        Row("gathered weights", device=_gathered(zero, partitioned) * width, note="at most"),
        _at("host" if zero.optimizer != "device" else "device")(
            "gradients", _shares(sizes.trained, gradient_ranks) * width
        ),
        _at(zero.optimizer)("float32 gradients", share * FLOAT32, "in the step"),
        _at(zero.optimizer)("AdamW, float32 weights", share * ADAMW_STATES * FLOAT32),
        _at(zero.optimizer)("moving average", share * FLOAT32 if sizes.averaged else 0),
        Row("reference's average", device=sizes.moving * FLOAT32),
        Row("reduction buckets", device=bucket),
        _at(encoders)("text encoders", sizes.text_encoders),
        _at(encoders)("VAE, float32", sizes.vae),
        Row("activations", device=sizes.activations, note="of one micro-batch"),
    ]
    return [row for row in rows if row in frozen_rows or row.device or row.host or row.nvme]


@dataclass(frozen=True)
class Footprint:
    """What one rank holds, by the number of pairs in one forward."""

    sizes: Sizes
    """With the activations of one pair, which grow with their number."""
    zero: Zero
    streamed_reference: bool
    encoders: Place

    def rows(self, pairs: int) -> list[Row]:
        """:func:`memory_rows` at so many pairs."""
        return memory_rows(
            replace(self.sizes, activations=pairs * self.sizes.activations),
            self.zero,
            streamed_reference=self.streamed_reference,
            encoders=self.encoders,
        )

    def needed(self, pairs: int, device_type: str) -> int:
        """Bytes of its device's memory at so many pairs; a CPU's is the host's as well."""
        whole = total(self.rows(pairs))
        return whole.device + (whole.host if device_type == "cpu" else 0)

    def most_pairs(self, share: int, memory: int, device_type: str) -> int:
        """The largest divisor of ``share`` pairs that :data:`PLANNED_SHARE` of so many bytes of a
        device takes; 0 where they do not take one pair.
        """
        fit = (
            pairs
            for pairs in reversed(divisors(share))
            if self.needed(pairs, device_type) <= PLANNED_SHARE * memory
        )
        return next(fit, 0)


def total(rows: list[Row]) -> Row:
    """The sum of all rows."""
    return Row(
        "total",
        device=sum(row.device for row in rows),
        host=sum(row.host for row in rows),
        nvme=sum(row.nvme for row in rows),
    )


def _at(place: Place) -> Callable[..., Row]:
    """A row of so many bytes at one place."""

    def row(name: str, num_bytes: int, note: str = "") -> Row:
        return Row(name, note=note, **{place: num_bytes})

    return row


def _gathered(zero: Zero, partitioned: int) -> int:
    """ZeRO-3: elements whole at once; a single rank without offload has them whole anyway."""
    if zero.stage < 3 or (zero.world_size == 1 and zero.weights == "device"):
        return 0
    return min(zero.most_gathered, partitioned)


def _shares(elements: int, ranks: int) -> int:
    return math.ceil(elements / ranks)


def _place(offload: Any) -> Place:
    """Where a DeepSpeed offload section puts things; `none` and no section are the device."""
    device = str(getattr(offload, "device", "none"))
    places: dict[str, Place] = {"cpu": "host", "nvme": "nvme"}
    return places.get(device.rpartition(".")[2], "device")
