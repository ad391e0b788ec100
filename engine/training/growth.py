"""The model curriculum of Curriculum-DPO++: ranks that grow and blocks that open, stage by stage.

Adapters have their largest rank from the first step on. What is closed, rank components beyond the
stage's rank and blocks that are not open yet, gets no gradient: its B stays zero, so that the
network computes what adapters of the smaller rank would, and growing changes no output. When an
entry opens, it starts as if it were new, A at its random value, B and both moments of AdamW at
zero; all others go on as they are. The published way, to pad A, B and the moments at the switch,
gives the same numbers (a test computes both).

So nothing is ever resized. What is closed is a function of the stage, hence of the step, like
everything else of a run: ZeRO's partitions, checkpoints and averages know nothing of it.
"""

from __future__ import annotations

from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..basics.errors import RecipeError
from ..curriculum.pacing import Pacing, Stage
from ..recipe import Adapter


class Growth:
    """Holds back the gradients of what a policy's stage has not opened yet.

    Gradients are masked before DeepSpeed sees them: their norm, clipping and reduction are those of
    what is open. Only B needs it (and DoRA's magnitude): where B is zero, A gets no gradient.
    """

    def __init__(
        self, policy: nn.Module, spec: Adapter, pacing: Pacing, device: torch.device
    ) -> None:
        """To be called when ``policy`` has its adapters; ``device`` is where gradients arise.

        Raises RecipeError if blocks are to open and the policy has none.
        """
        self._spec = spec
        self._pacing = pacing
        self._columns = torch.arange(spec.rank, device=device)
        self._depths = block_depths(policy) if spec.opening == "inside_out" else {}
        self._num_depths = 1 + max(self._depths.values(), default=0)
        self._stage: int | None = None
        self.enter(pacing.stages[0])
        for name, layer in policy.named_modules():
            if spec.grows and isinstance(layer, LoraLayer):
                self._hold_back(layer, self._depth_of(name))

    def _depth_of(self, layer: str) -> int:
        """What lies in no block, such as the first convolution, opens with the outermost."""
        parts = layer.split(".")
        blocks = (".".join(parts[:count]) for count in (1, 2))
        found = [self._depths[block] for block in blocks if block in self._depths]
        return found[0] if found else self._num_depths - 1

    def _hold_back(self, layer: LoraLayer, depth: int) -> None:
        for part in layer.lora_B.values():
            part.weight.register_hook(partial(self._mask_columns, depth))
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.register_hook(partial(self._mask_whole, depth))

    def _mask_columns(self, depth: int, gradient: Tensor) -> Tensor:
        """Of a B: (out, r), or (out, r, 1, 1) of a convolution. What is not finite stays so: the
        step is skipped, whatever is open.
        """
        if depth >= self._open_depths or self._open_columns is None:
            return self._mask_whole(depth, gradient)
        return gradient * self._open_columns.view(-1, *(1,) * (gradient.ndim - 2))

    def _mask_whole(self, depth: int, gradient: Tensor) -> Tensor:
        return gradient if depth < self._open_depths else gradient * 0

    def enter(self, stage: Stage) -> None:
        """What follows is a step of ``stage``: to be called before its backward passes."""
        if stage.index == self._stage:
            return
        self._stage = stage.index
        rank = rank_at(self._spec, stage.index)
        # Made once a stage and not for each gradient; none where all is open.
        self._open_columns = None if rank == self._spec.rank else self._columns < rank
        self._open_depths = self._depths_at(stage)
        self.row = self._row_of(stage)

    def _depths_at(self, stage: Stage) -> int:
        last = stage.index == len(self._pacing.stages) - 1
        return self._num_depths if last else min(stage.index + 1, self._num_depths)

    def _row_of(self, stage: Stage) -> dict[str, int]:
        """For the row of a step's metrics: the rank, and how many blocks are open."""
        found = {"rank": rank_at(self._spec, stage.index)} if self._spec.rank_schedule else {}
        if self._depths:
            num_open = self._depths_at(stage)
            found["open_blocks"] = sum(depth < num_open for depth in self._depths.values())
        return found

    def describe(self) -> list[tuple[str, str]]:
        """For the head of the terminal: how it grows, and what the run is too short for."""
        stages = self._pacing.stages
        rows = growth_rows(self._spec, len(stages))
        reached = self._row_of([stage for stage in stages if stage.num_steps][-1])
        short = [
            f"{name.replace('_', ' ')} {reached[name]} of {full}"
            for name, full in self._row_of(stages[-1]).items()
            if reached[name] < full
        ]
        if short:
            rows.append(("note", f"ends at {', '.join(short)}: train.steps ends before the rest"))
        return rows


def rank_at(spec: Adapter, stage: int) -> int:
    """The rank of the adapters in stage number ``stage``, from 0."""
    schedule = spec.rank_schedule or (spec.rank,)
    return schedule[min(stage, len(schedule) - 1)]


def growth_rows(spec: Adapter, num_stages: int) -> list[tuple[str, str]]:
    """How a recipe's adapters grow, as a row for a header; none if they do not."""
    words = []
    if spec.rank_schedule is not None:
        ranks = ", ".join(str(rank_at(spec, stage)) for stage in range(num_stages))
        words.append(f"rank {ranks} in stages 1 to {num_stages}")
    if spec.opening == "inside_out":
        words.append("blocks open from the inside out")
    return [("growth", "; ".join(words))] if words else []


def block_depths(network: nn.Module) -> dict[str, int]:
    """The blocks of a UNet by name, each with its distance from the middle, from 0.

    The mid block counts with the innermost pair, i.e. the last of the ``down_blocks`` and the first
    of the ``up_blocks``. Raises RecipeError if there are no such blocks.
    """
    down, up = (list(getattr(network, name, ())) for name in ("down_blocks", "up_blocks"))
    if not (down and up):
        raise RecipeError(
            "adapter.opening=inside_out needs a UNet with down_blocks and up_blocks, which this "
            "denoiser has not: use opening=all",
            "adapter.opening",
            "unsupported",
        )
    depths = {f"down_blocks.{index}": len(down) - 1 - index for index in range(len(down))}
    depths |= {f"up_blocks.{index}": index for index in range(len(up))}
    if getattr(network, "mid_block", None) is not None:
        depths["mid_block"] = 0
    return depths
