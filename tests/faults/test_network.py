"""A network that stalls, fails and corrupts, and then does not: the losses of the folder, on two
ranks. What never recovers is in tests/engine/test_remote_training.py.
"""

import pytest
from launching import losses
from shard_server import serving

pytestmark = pytest.mark.slow
IMPATIENT = ("data.fetch.backoff=0.01", "data.fetch.stall=0.5")


def test_what_passes_costs_time_only(faults, tmp_path):
    run = tmp_path / "run"
    with serving(faults.world.shards, chunk=512) as web:
        for shard in faults.world.shards.glob("tier-1-*.tar"):
            web.faults[shard.name] = ["500", "stall", "drop", "corrupt"]
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}", *IMPATIENT)
        faults.train(run, *mine).succeeded()
        left = {name: kinds for name, kinds in web.faults.items() if kinds}
    assert left == {}  # all of them were played
    assert losses(run) == faults.uninterrupted


def test_asked_to_stop_while_one_rank_waits_for_a_shard(faults, tmp_path):
    """Rank 1 waits for the second tier as long as anybody lets it, and rank 0, which is asked, for
    rank 1: both stop well within the grace time, with the steps that were taken.
    """
    run = tmp_path / "run"
    with serving(faults.world.shards, chunk=512) as web:
        for shard in faults.world.shards.glob("tier-2-*[13].tar"):
            web.faults[shard.name] = ["stall*"]
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}")
        patient = ("data.fetch.stall=150", "cluster.grace_seconds=60")
        outcome = faults.train(run, *mine, *patient, failpoint="train.step@2:term/rank0")
        web.faults.clear()
        assert outcome.codes == [75, 75], outcome.text
        assert "error: stopped on request after step 2;" in outcome.text
        assert "no safe point" not in outcome.text
        assert (run / "checkpoints" / "step-00000002" / "MANIFEST.json").exists()
        faults.train(run, *mine).succeeded()
    assert losses(run) == faults.uninterrupted
