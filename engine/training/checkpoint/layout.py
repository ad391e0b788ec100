"""Where ZeRO keeps what it trains: for every rank, which stretch of which parameter lies where.

DeepSpeed flattens the float32 master weights and gives each rank stretches of them, by rules of its
own for each stage. A checkpoint carries this table for each rank that wrote it, so that a resume
can tell whether its own division is the same, and copy by name if it is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Fragment:
    """Elements ``offset`` to ``offset + numel`` of a flattened parameter, kept by one rank."""

    flat: int
    """Which of the rank's flat tensors holds them."""
    start: int
    """Their first element in it."""
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """What one rank keeps. Ranks of equal layouts can read each other's partitions."""

    stage: int
    fragments: dict[str, Fragment]
    """By parameter; a rank keeps at most one stretch of each, and none of some."""
    counters: dict[str, int]
    """DeepSpeed's own counts of steps, for its monitors."""

    def divides_like(self, other: Layout) -> bool:
        """Whether DeepSpeed itself can read what ``other`` describes into an engine of this one."""
        return self.stage == other.stage and self.fragments == other.fragments

    def save(self, folder: Path, rank: int) -> None:
        """Write the table of ``rank`` into a checkpoint's folder."""
        fragments = {
            name: [part.flat, part.start, part.offset, part.numel]
            for name, part in self.fragments.items()
        }
        table = {"stage": self.stage, "counters": self.counters, "fragments": fragments}
        layout_path(folder, rank).write_text(json.dumps(table, indent=1))


def layout_path(folder: Path, rank: int) -> Path:
    """Named, like DeepSpeed's own files, so that the rank can be told from it."""
    return folder / f"zero_pp_rank_{rank}_layout.json"


def load_layout(folder: Path, rank: int) -> Layout:
    """The table that ``rank`` wrote. Raises OSError, ValueError, KeyError."""
    table: dict[str, Any] = json.loads(layout_path(folder, rank).read_text())
    fragments = {name: Fragment(*numbers) for name, numbers in table["fragments"].items()}
    return Layout(table["stage"], fragments, table["counters"])


def layout_of(engine: deepspeed.DeepSpeedEngine) -> Layout | None:
    """How this rank of a live engine keeps its part; None under an optimiser we do not know.

    That is bf16 under ZeRO-1 with gradients accumulated in float32 (``data_types`` in DeepSpeed's
    JSON), which brings an optimiser of its own.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        find = _fragment_of_stage_3
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        find = _fragment_of_stage_1_and_2
    else:
        return None
    found = {
        name: find(optimizer, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    return Layout(
        engine.zero_optimization_stage(),
        {name: fragment for name, fragment in found.items() if fragment is not None},
        {name: int(getattr(engine, name)) for name in COUNTERS},
    )


def _fragment_of_stage_1_and_2(optimizer: Any, parameter: Any) -> Fragment | None:
    """The optimiser's flat tensor is cut in equal parts, wherever parameters begin."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, part.start, whole.start, part.numel)


def _fragment_of_stage_3(optimizer: Any, parameter: Any) -> Fragment | None:
    """Every parameter is cut in equal parts, the last ones padded."""
    flat, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = numel * dist.get_rank(optimizer.dp_process_group)
    real = min(numel, parameter.ds_numel - offset)
    return Fragment(flat, start, offset, real) if real > 0 else None


def flat_tensors(engine: deepspeed.DeepSpeedEngine) -> list[Any]:
    """The float32 master weights of this rank, which a layout's ``flat`` counts."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)
