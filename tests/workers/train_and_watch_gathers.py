"""The train verb, noting what each rank holds of gathered weights while it exports.

Writes ``gathered-<rank>.json`` into the folder named by WATCH_FOLDER: how many parameters were
gathered, and the most bytes of them that were alive at once.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

from cdpo.engine.ranks import run_verb
from cdpo.engine.train import main
from cdpo.engine.training import deepspeed_engine
from torch import Tensor

seen = {"gathered": 0, "alive": 0, "most": 0}
gather = deepspeed_engine.TrainedWeights.gather


def watched(self: deepspeed_engine.TrainedWeights, name: str) -> Tensor:
    value = gather(self, name)
    # On a CPU the gathered tensor is the one that is kept, so its life is that of its bytes.
    size = value.untyped_storage().nbytes()
    seen["gathered"] += 1
    seen["alive"] += size
    seen["most"] = max(seen["most"], seen["alive"])
    weakref.finalize(value, forget, size)
    return value


def forget(size: int) -> None:
    seen["alive"] -= size


deepspeed_engine.TrainedWeights.gather = watched
run_verb("train", main)
path = Path(os.environ["WATCH_FOLDER"], f"gathered-{os.environ.get('RANK', '0')}.json")
path.write_text(json.dumps(seen))
