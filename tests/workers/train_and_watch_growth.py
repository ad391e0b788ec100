"""The train verb, looking at every adapter after each step: weights and moments, gathered.

Writes ``growth-<rank>.json`` into the folder named by WATCH_FOLDER: a row a step, with the entries
that moved and those that have a moment, among the open and among the closed. What is open is found
here anew, from names and the step, for the tiny UNet of two pairs of blocks, ranks 1, 2 and 4.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from cdpo.engine.ranks import run_verb
from cdpo.engine.train import main
from cdpo.engine.training.trainer import Trainer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

INNER = ("mid_block.", "down_blocks.1.", "up_blocks.0.")
RANKS = (1, 2, 4)
STEPS_PER_STAGE = 2
before: dict[str, Tensor] = {}
rows: list[dict[str, int]] = []
take_step = Trainer._take_step


def adapters(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def open_entries(name: str, value: Tensor, step: int) -> Tensor:
    stage = step // STEPS_PER_STAGE
    found = torch.zeros_like(value, dtype=torch.bool)
    if stage > 0 or name.startswith(INNER):
        found.narrow(1 if "lora_B" in name else 0, 0, RANKS[stage]).fill_(True)
    return found


def watched(self: Trainer, *pairs: object) -> bool:
    step, policy = self.cursor.step, self.engine.module.policy
    for name, parameter in adapters(policy).items():
        before[name] = safe_get_full_fp32_param(parameter).clone()
    taken = take_step(self, *pairs)
    row = {"step": step, **dict.fromkeys(("open_moved", "closed_moved", "open", "closed"), 0)}
    row |= {"closed_moments": 0, "closed_b": 0}
    for name, parameter in adapters(policy).items():
        value = safe_get_full_fp32_param(parameter)
        is_open = open_entries(name, value, step)
        moved = value != before[name]
        row["open"] += int(is_open.sum())
        row["closed"] += int((~is_open).sum())
        row["open_moved"] += int((moved & is_open).sum())
        row["closed_moved"] += int((moved & ~is_open).sum())
        row["closed_b"] += int((value[~is_open] != 0).sum()) if "lora_B" in name else 0
        for moment in ("exp_avg", "exp_avg_sq"):
            state = safe_get_full_optimizer_state(parameter, moment)
            row["closed_moments"] += int((state[~is_open] != 0).sum())
    rows.append(row)
    return taken


Trainer._take_step = watched  # type: ignore[method-assign]
run_verb("train", main)
path = Path(os.environ["WATCH_FOLDER"], f"growth-{os.environ.get('RANK', '0')}.json")
path.write_text(json.dumps(rows))
