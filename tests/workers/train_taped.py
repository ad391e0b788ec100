"""The train verb with micro-batches captured as on a GPU, by the stand-in of tests/taped.py."""

from __future__ import annotations

import sys
from functools import partialmethod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdpo.engine.ranks import run_verb
from cdpo.engine.train import main
from cdpo.engine.training import trainer
from cdpo.engine.training.cuda_graph import CapturedLoss
from taped import Tape

trainer.hindrance = lambda *run: None  # type: ignore[assignment]
CapturedLoss.__init__ = partialmethod(CapturedLoss.__init__, recorder=Tape)  # type: ignore[method-assign]
run_verb("train", main)
