"""Shards that are wrong, on two ranks: both leave with code 3, and shard and key are named.

One shard of rank 1 is damaged, the first four times in one sample only. The run reads every pair of
the tier, so that a reader which lost the bad one in silence would come to the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

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


WRONG_INSIDE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "missing member": (without_a_member, "member latents.npy"),
    "duplicate key": (with_a_key_twice, "comes up again"),
    "wrong shape": (
        lambda shard, key: damage.change_latents(shard, key, lambda x: x[:, :, :4]),
        "member latents.npy: ",
    ),
    "NaN": (
        lambda shard, key: damage.change_latents(shard, key, with_nan),
        "member latents.npy: latents hold NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", WRONG_INSIDE)
def test_one_bad_sample(faults, refused, shards, tmp_path, kind) -> None:
    change, reason = WRONG_INSIDE[kind]
    shard = shards / "tier-1-000001.tar"  # of lane 1 of two, so of rank 1
    key = damage.keys(shard)[1]
    change(shard, key)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}", *EASIEST_ALONE)
    refused(outcome, 3, f"{shard}, key {key}", reason)


WRONG_AS_A_WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing"),
    "truncated": (lambda shard: shard.write_bytes(shard.read_bytes()[:-2000]), "truncated"),
    "no byte": (lambda shard: shard.write_bytes(b""), "truncated"),
    "cut where a member begins": (damage.cut_at_last_header, "no end-of-archive blocks"),
    "no sample": (lambda shard: damage.rewrite(shard, lambda members: []), "samples"),
    "wrong checksum": (damage.flip_a_bit, "sha256"),
}


@pytest.mark.parametrize("kind", WRONG_AS_A_WHOLE)
def test_a_bad_shard(faults, refused, shards, tmp_path, kind) -> None:
    change, reason = WRONG_AS_A_WHOLE[kind]
    shard = shards / "tier-1-000001.tar"
    change(shard)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}", *EASIEST_ALONE)
    refused(outcome, 3, str(shard), reason)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_tier_without_pairs(faults, refused, shards, tmp_path) -> None:
    """Neither trained on nor made."""

    def empty(manifest: dict) -> None:
        manifest["shards"] = [entry for entry in manifest["shards"] if entry["tier"] != 3]

    damage.edit_manifest(shards, empty)
    outcome = faults.train(tmp_path / "run", f"data.path={shards}")
    refused(outcome, 3, str(shards / "manifest.json"), "tier 3 has 0 shards")
    outcome = faults.prepare(tmp_path / "made", "curriculum.min_score_gap=0.9")
    refused(outcome, 3, "pairs", "curriculum.min_score_gap")
    assert not (tmp_path / "made" / "shards" / "manifest.json").exists()


def test_a_reader_thread_fails_in_the_middle_of_a_run(faults, refused, shards, tmp_path) -> None:
    """Threads read ahead what no step needs yet: the steps before it are taken and kept, and when
    the shard is good again the run goes on to the losses of one that nothing happened to.
    """
    run, bad = tmp_path / "run", [shards / f"tier-3-{number:06d}.tar" for number in (1, 3)]
    for shard in bad:
        damage.flip_a_bit(shard)
    mine = (f"data.path={shards}", "data.workers=2")
    refused(faults.train(run, *mine), 3, "tier-3-", "sha256")
    assert sorted(path.name for path in run.glob("checkpoints/step-*"))[-1] == "step-00000004"
    for shard in bad:
        shutil.copy(faults.world.shards / shard.name, shard)
    faults.train(run, *mine).succeeded()
    assert losses(run) == faults.uninterrupted
