"""Trains as the entry script does, while the clock jumps: `JUMP` seconds from the second step it
takes on, and on rank 1 twice as far the other way. Only Python's own clock jumps; that of the
system is everybody's.
"""

from __future__ import annotations

import os
import time

from cdpo.engine import train
from cdpo.engine.ranks import run_verb
from cdpo.engine.training import trainer

JUMP = int(os.environ["JUMP"]) * (-2 if os.environ["RANK"] == "1" else 1)
steps_begun = 0
real_time, real_time_ns = time.time, time.time_ns
take_step = trainer.Trainer._take_step


def jump_at_second_step(self: trainer.Trainer, *pairs: object) -> bool:
    global steps_begun
    steps_begun += 1
    if steps_begun == 2:
        time.time = lambda: real_time() + JUMP
        time.time_ns = lambda: real_time_ns() + JUMP * 10**9
    return take_step(self, *pairs)


trainer.Trainer._take_step = jump_at_second_step  # type: ignore[method-assign,assignment]
run_verb("train", train.main)
