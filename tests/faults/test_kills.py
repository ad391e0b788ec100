"""SIGKILL of one of two ranks, then of both, wherever it falls: the next start goes on as if
nothing had happened.

Places drawn at random are drawn from CDPO_FAULT_SEED: another number tries others.
"""

import json
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


IN_STEPS = ("train.step", "train.loss")
IN_CHECKPOINTS = (
    *("checkpoint.write", "checkpoint.written", "checkpoint.synced", "checkpoint.hashed"),
    *("checkpoint.manifest", "checkpoint.before_rename", "checkpoint.replacing"),
    *("checkpoint.after_rename", "checkpoint.latest", "checkpoint.before_prune"),
    *("checkpoint.pruned", "export.published"),
)
ROUNDS = 16


@pytest.mark.long
def test_rounds_of_kills(faults, tmp_path):
    """Anywhere, of either rank or both, again and again: losses, the average and what is exported
    are those of a run that nothing happened to, to the last bit. A run that comes to its end in
    spite of all is looked at, and the next one is begun.
    """
    draw = random.Random(SEED)
    mine = ("train.steps=12", "adapter.ema=0.9", "checkpoint.keep=2")
    calm = tmp_path / "calm" / "run"  # exports bear the name of the folder
    faults.train(calm, *mine).succeeded()
    expected = losses(calm), weights(calm)
    assert expected[1]
    killed, run = 0, tmp_path / "0" / "run"
    for number in range(1, ROUNDS + 1):
        # At most eight micro-batches, so four steps, or two checkpoints are whole before it dies.
        places, passages = draw.choice([(IN_STEPS, 8), (IN_CHECKPOINTS, 3)])
        where = f"{draw.choice(places)}@{draw.randint(1, passages)}:kill"
        (run / "starts.log").unlink(missing_ok=True)  # it is not stuck, but unlucky
        outcome = faults.train(run, *mine, failpoint=where + draw.choice(["", "/rank0", "/rank1"]))
        killed += KILLED in outcome.codes
        assert KILLED in outcome.codes or set(outcome.codes) == {0}, outcome.text
        assert "Traceback" not in outcome.text
        if set(outcome.codes) == {0}:
            assert (losses(run), weights(run)) == expected, where
            run = tmp_path / str(number) / "run"
    assert killed > ROUNDS // 2
    (run / "starts.log").unlink(missing_ok=True)
    faults.train(run, *mine).succeeded()
    assert (losses(run), weights(run)) == expected


def weights(run: Path) -> dict[str, tuple[dict[str, object], bytes]]:
    """Everything exported, and what the newest checkpoint holds of adapter and average: header and
    numbers of each file. A header is compared as a whole and not by its bytes, in which safetensors
    puts metadata in another order in each process.
    """
    newest = max(run.glob("checkpoints/step-*"))
    found = {}
    for path in run.rglob("*.safetensors"):
        if "checkpoints" not in path.parts or newest in path.parents:
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            found[str(path.relative_to(run))] = json.loads(data[8:end]), data[end:]
    return found


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
