"""Shards that are wrong, on two ranks: both leave with code 3, and shard and key are named.

One shard of rank 1 is damaged, the first four times in one sample only. The run reads every pair of
the tier, so that a reader which lost the bad one in silence would come to the end.
"""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from launching import losses

EASIEST_ALONE = ("curriculum.steps_per_tier=8", "train.steps=8")  # more pairs than the tier has

pytestmark = pytest.mark.slow


@pytest.fixture
def shards(faults, tmp_path: Path) -> Path:
    return Path(shutil.copytree(faults.world.shards, tmp_path / "shards"))


def without_a_member(shard: Path, key: str) -> None:
    lost = f"{key}.latents.npy"
    damage.rewrite(shard, lambda members: [m for m in members if m[0] != lost])


def with_a_key_twice(shard: Path, key: str) -> None:
    def doubled(members: damage.Members) -> damage.Members:
        return members[:-2] + [m for m in members if m[0].startswith(key)]

    damage.rewrite(shard, doubled)


def with_nan(latents: np.ndarray) -> np.ndarray:
    latents[1, 0, 0, 0] = np.nan
    return latents


def core(kinds: Iterable[str], *kept: str) -> list[Any]:
    """Those of ``kept``; what finds the others is tested in engine/shards/."""
    return [k if k in kept else pytest.param(k, marks=pytest.mark.long) for k in kinds]


WRONG_INSIDE: dict[str, Callable[[Path, str], None]] = {
    "missing member": without_a_member,
    "duplicate key": with_a_key_twice,
    "wrong shape": partial(damage.change_latents, change=lambda x: x[:, :, :4]),
    "NaN": partial(damage.change_latents, change=with_nan),
}


@pytest.mark.parametrize("kind", core(WRONG_INSIDE, "duplicate key"))
def test_one_bad_sample(faults, shards, tmp_path, kind):
    shard = shards / "tier-1-000001.tar"  # of lane 1 of two, so of rank 1
    key = damage.keys(shard)[1]
    WRONG_INSIDE[kind](shard, key)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}", *EASIEST_ALONE)
    outcome.refused(3, f"{shard}, key {key}")


WRONG_AS_A_WHOLE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda shard: shard.write_bytes(shard.read_bytes()[:-2000]),
    "no byte": lambda shard: shard.write_bytes(b""),
    "cut where a member begins": damage.cut_at_last_header,
    "no sample": lambda shard: damage.rewrite(shard, lambda members: []),
    "wrong checksum": damage.flip_a_bit,
}


@pytest.mark.parametrize("kind", core(WRONG_AS_A_WHOLE, "wrong checksum"))
def test_a_bad_shard(faults, shards, tmp_path, kind):
    shard = shards / "tier-1-000001.tar"
    WRONG_AS_A_WHOLE[kind](shard)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}", *EASIEST_ALONE)
    outcome.refused(3, str(shard))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_tier_without_pairs(faults, shards, tmp_path):
    """Neither trained on nor made."""

    def empty(manifest: dict) -> None:
        manifest["shards"] = [entry for entry in manifest["shards"] if entry["tier"] != 3]

    damage.edit_manifest(shards, empty)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}")
    outcome.refused(3, str(shards / "manifest.json"), "tier 3")
    outcome = faults.prepare(tmp_path / "made", "curriculum.min_score_gap=0.9")
    outcome.refused(3, "curriculum.min_score_gap")
    assert not (tmp_path / "made" / "shards" / "manifest.json").exists()


def test_a_reader_thread_fails_in_the_middle_of_a_run(faults, shards, tmp_path):
    """Threads read ahead what no step needs yet: the steps before it are taken and kept, and when
    the shard is good again the run goes on to the losses of one that nothing happened to.
    """
    run, bad = tmp_path / "run", [shards / f"tier-3-{number:06d}.tar" for number in (1, 3)]
    for shard in bad:
        damage.flip_a_bit(shard)
    mine = (f"data.path={shards}", "data.workers=2")
    faults.train(run, *mine).refused(3, "tier-3-")
    assert sorted(path.name for path in run.glob("checkpoints/step-*"))[-1] == "step-00000004"
    for shard in bad:
        shutil.copy(faults.world.shards / shard.name, shard)
    faults.train(run, *mine).succeeded()
    assert losses(run) == faults.uninterrupted
