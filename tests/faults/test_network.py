"""A network that stalls, fails and corrupts, and then does not: the losses of the folder, on two
ranks. What never recovers is in tests/engine/test_remote_training.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import losses
from shard_server import serving

pytestmark = pytest.mark.slow
IMPATIENT = ("data.fetch.backoff=0.01", "data.fetch.stall=0.5")


def test_what_passes_costs_time_only(faults, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(faults.world.shards, chunk=512) as web:
        for shard in faults.world.shards.glob("tier-1-*.tar"):
            web.faults[shard.name] = ["500", "stall", "drop", "corrupt"]
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}", *IMPATIENT)
        faults.train(run, *mine).succeeded()
        left = {name: kinds for name, kinds in web.faults.items() if kinds}
    assert left == {}  # all of them were played
    assert losses(run) == faults.uninterrupted
