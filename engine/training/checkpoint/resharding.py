"""A checkpoint of other ranks or another ZeRO stage, divided anew for the ranks of this run.

Master weights, Adam's moments and the moving average are copied element by element, so they are
bit for bit those that were saved; the weights the network computes with are rounded from the master
weights, as after a step. Every rank reads the stretches that it keeps and no more, without talking
to the others: the largest thing in memory is its own part, a second time.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, SupportsIndex

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ...basics.failpoints import failpoint
from .layout import COUNTERS, Fragment, Layout, flat_tensors, load_layout

# The classes in DeepSpeed's files, which are pickles: these may come out of them, others not.
SAFE = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _by_value(member: Enum, _: SupportsIndex) -> tuple[type[Enum], tuple[Any]]:
    return type(member), (member.value,)


# Python before 3.11.4 pickles a member of an enumeration as a call of getattr, which is no data.
ZeroStageEnum.__reduce_ex__ = _by_value  # type: ignore[method-assign]


@dataclass
class _Partition:
    """What one rank saved."""

    weights: list[Tensor]
    states: list[dict[str, Any]]
    scaler: dict[str, Any]


@dataclass
class _Part:
    """A flat tensor of this rank, being filled."""

    weights: Tensor
    state: dict[str, Any] = field(default_factory=dict)

    def take(self, source: _Partition, saved: Fragment, own: Fragment) -> int:
        """Copy the elements that two fragments of one parameter share; returns how many."""
        first = max(saved.offset, own.offset)
        count = min(saved.offset + saved.numel, own.offset + own.numel) - first
        if count <= 0:
            return 0
        there = _stretch(saved, first, count)
        here = _stretch(own, first, count)
        self.weights[here] = source.weights[saved.flat][there]
        for key, value in source.states[saved.flat].items():
            if torch.is_tensor(value) and value.dim() > 0:
                target = self.state.setdefault(key, torch.zeros_like(self.weights))
                target[here] = value[there]
            else:  # Adam's count of steps, which the optimiser raises in place: one for each part
                self.state[key] = copy.deepcopy(value)
        return count


def _stretch(fragment: Fragment, first: int, count: int) -> slice:
    """Where ``count`` elements of a parameter, from its element ``first`` on, lie in the flat."""
    start = fragment.start + first - fragment.offset
    return slice(start, start + count)


@dataclass
class DividedAnew:
    """The state of this rank, read and not yet taken."""

    parts: list[_Part]
    scaler: dict[str, Any]
    counters: dict[str, int]

    def take(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Make it the state of ``engine``. The ranks meet here."""
        _set(engine, self.parts, self.scaler)
        for name in COUNTERS:
            setattr(engine, name, self.counters[name])


def read_divided_anew(
    engine: deepspeed.DeepSpeedEngine, folder: Path, own: Layout, saved_ranks: int
) -> DividedAnew:
    """The state of this rank from the partitions of ``saved_ranks`` ranks in ``folder``.

    Raises OSError, RuntimeError, ValueError (something is missing or does not fit), KeyError.
    """
    layouts = [load_layout(folder, rank) for rank in range(saved_ranks)]
    _check_names(own, layouts)
    # In host memory: DeepSpeed brings it to where the optimiser lives.
    parts = [_Part(torch.zeros(flat.numel())) for flat in flat_tensors(engine)]
    filled = dict.fromkeys(own.fragments, 0)
    scaler: dict[str, Any] = {}
    for rank, layout in enumerate(layouts):
        shared = [name for name in own.fragments if name in layout.fragments]
        if rank > 0 and not shared:
            continue
        source = _open(folder, rank, layout.stage)
        scaler = scaler or source.scaler
        for name in shared:
            fragment = own.fragments[name]
            filled[name] += parts[fragment.flat].take(source, layout.fragments[name], fragment)
        failpoint("checkpoint.divided")
    for name, count in filled.items():
        if count != own.fragments[name].numel:
            raise ValueError(f"{count} of {own.fragments[name].numel} elements of {name} are in it")
    return DividedAnew(parts, scaler, layouts[0].counters)


def _check_names(own: Layout, layouts: list[Layout]) -> None:
    """A rank sees the names that it keeps; those it does not are another rank's to check."""
    saved = {name for layout in layouts for name in layout.fragments}
    absent = sorted(own.fragments.keys() - saved)
    if absent:
        raise ValueError(f"it has no weights of {absent[0]} (and {len(absent) - 1} more)")


def load_data(path: str | Path, **options: Any) -> Any:
    """What torch.save wrote, if it is data: ValueError for anything that would run when loaded."""
    try:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, weights_only=True, **options)
    except UnpicklingError as error:
        raise ValueError(f"{Path(path).name} holds more than data{_global_in(error)}") from None


def _global_in(error: UnpicklingError) -> str:
    """What a pickle would have called; torch tells it within a page on how to allow that."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f": {found[1]}" if found else ""


def _open(folder: Path, rank: int, stage: int) -> _Partition:
    """The partition of a rank, mapped: only what is copied is read."""
    content = load_data(_partition_file(folder, rank), map_location="cpu", mmap=True)
    saved = content["optimizer_state_dict"]
    if stage == 3:
        weights, states = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
    else:
        weights = saved["single_partition_of_fp32_groups"]
        states = saved["base_optimizer_state"]
        if isinstance(states, dict):  # a list where DeepSpeed's elastic_checkpoint is on
            states = states["state"]
    scaler = {name: saved[name] for name in ("loss_scaler", "dynamic_loss_scale", "overflow")}
    # No states before the first step.
    return _Partition(weights, [states[i] if states else {} for i in range(len(weights))], scaler)


def _partition_file(folder: Path, rank: int) -> Path:
    found = list(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files hold the partition of rank {rank}, not one")
    return found[0]


def _set(engine: deepspeed.DeepSpeedEngine, parts: list[_Part], scaler: dict[str, Any]) -> None:
    """Hand the parts to DeepSpeed as if this rank had saved them under its present layout."""
    optimizer = engine.optimizer
    state = optimizer.state_dict() | scaler
    weights = [part.weights for part in parts]
    states = {index: part.state for index, part in enumerate(parts) if part.state}
    rank = dist.get_rank(optimizer.dp_process_group)
    if engine.zero_optimization_stage() == 3:
        state["fp32_flat_groups"] = weights
        state["optimizer_state_dict"]["state"] = states
        optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict({rank: state})
        optimizer.checkpoint_event_epilogue()
    else:
        groups = optimizer.optimizer.state_dict()["param_groups"]
        state["single_partition_of_fp32_groups"] = weights
        state["base_optimizer_state"] = {"state": states, "param_groups": groups}
        optimizer.load_state_dict({rank: state}, load_from_fp32_weights=True)
        optimizer.update_lp_params()
