"""SIGKILL of one of two ranks, then of both, wherever it falls: the next start goes on as if
nothing had happened.

Places drawn at random are drawn from CDPO_FAULT_SEED: another number tries others.
"""

import os
import random
from pathlib import Path

import pytest
from launching import KILLED, Outcome, losses
from prepared import contents
from shard_server import serving

SEED = int(os.environ.get("CDPO_FAULT_SEED", "1"))

pytestmark = pytest.mark.slow


def one_was_killed(outcome: Outcome) -> None:
    """Rank 1 by itself; rank 0, which is left alone, does not come to the end."""
    assert outcome.codes[1] == KILLED and outcome.codes[0] != 0, outcome.text


def all_were_killed(outcome: Outcome) -> None:
    """Each by itself; one may be slower and lose the other first."""
    assert KILLED in outcome.codes and 0 not in outcome.codes, outcome.text


def test_in_training(faults, tmp_path):
    """At random micro-batches and inside a checkpoint, one run killed again and again."""
    draw = random.Random(SEED)
    run = tmp_path / "run"
    # Two micro-batches a step, and a checkpoint every second step: four from one to the next.
    one_was_killed(faults.train(run, failpoint=f"train.loss@{draw.randint(1, 8)}:kill/rank1"))
    all_were_killed(faults.train(run, failpoint=f"train.loss@{draw.randint(1, 4)}:kill"))
    all_were_killed(faults.train(run, failpoint="checkpoint.written:kill"))
    assert list(run.glob("checkpoints/*.tmp"))  # what was being written
    faults.train(run).succeeded()
    assert losses(run) == faults.uninterrupted
    names = {path.name for path in run.glob("checkpoints/*")}
    assert names == {"step-00000004", "step-00000006", "latest"}


PLACES = (
    *("train.step", "train.loss", "checkpoint.write", "checkpoint.written", "checkpoint.synced"),
    *("checkpoint.hashed", "checkpoint.manifest", "checkpoint.before_rename"),
    *("checkpoint.replacing", "checkpoint.after_rename", "checkpoint.latest"),
    *("checkpoint.before_prune", "checkpoint.pruned", "export.published"),
)
ROUNDS = 16


@pytest.mark.long
def test_rounds_of_kills(faults, tmp_path):
    """Anywhere, of either rank or both, again and again: losses, the average and what is exported
    are those of a run that nothing happened to, to the last byte.
    """
    draw = random.Random(SEED)
    mine = ("train.steps=12", "adapter.ema=0.9", "checkpoint.keep=2")
    calm, run = tmp_path / "calm", tmp_path / "run"
    faults.train(calm, *mine).succeeded()
    killed = 0
    for _ in range(ROUNDS):
        where = f"{draw.choice(PLACES)}@{draw.randint(1, 6)}:kill"
        outcome = faults.train(run, *mine, failpoint=where + draw.choice(["", "/rank0", "/rank1"]))
        assert KILLED in outcome.codes or set(outcome.codes) == {0}, outcome.text
        assert "Traceback" not in outcome.text
        killed += KILLED in outcome.codes
    faults.train(run, *mine).succeeded()
    assert killed >= ROUNDS // 4
    assert losses(run) == losses(calm)
    assert weights(run) == weights(calm) != {}


def weights(run: Path) -> dict[str, bytes]:
    """Everything exported, and what the newest checkpoint holds of adapter and average."""
    files = [*run.rglob("*.safetensors")]
    newest = max(run.glob("checkpoints/step-*"))
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in files
        if "checkpoints" not in path.parts or newest in path.parents
    }


def test_in_the_middle_of_writing_a_shard(faults, tmp_path):
    """What ranks leave half written is made again: the set is the same to the last byte."""
    draw = random.Random(SEED)
    run = tmp_path / "run"
    one_was_killed(faults.prepare(run, failpoint=f"shard.write@{draw.randint(2, 40)}:kill/rank1"))
    assert list((run / "shards").glob("*.tar.tmp"))
    all_were_killed(faults.prepare(run, failpoint=f"shard.write@{draw.randint(2, 40)}:kill"))
    assert not (run / "shards" / "manifest.json").exists()
    faults.prepare(run).succeeded()
    assert contents(run / "shards") == contents(faults.world.shards)


def test_while_the_cache_is_filled(faults, tmp_path):
    """Two ranks share a cache and die one after the other; what they were bringing is brought
    again.
    """
    run, cache = tmp_path / "run", tmp_path / "cache"
    with serving(faults.world.shards, chunk=512) as web:
        mine = (f"data.path={web.url}", f"data.cache={cache}")
        both = "cache.fill@5:kill/rank1,cache.fill@7:kill/rank0"
        all_were_killed(faults.train(run, *mine, failpoint=both))
        assert list(cache.glob("*.part"))
        faults.train(run, *mine).succeeded()
    assert losses(run) == faults.uninterrupted
    assert not list(cache.glob("*.part"))
