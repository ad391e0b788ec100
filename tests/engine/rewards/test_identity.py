"""A reward is what its files hold, its tokenizer and processor among them, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cdpo.engine.models import fingerprint_store, fingerprints
from cdpo.engine.recipe.reward import (
    ClipScoreSpec,
    ColorfulnessSpec,
    Part,
    PickScoreSpec,
    WeightedSpec,
)
from cdpo.engine.rewards import clip, known_identity, load_reward
from part_changes import OF_REWARD

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world / "reward", tmp_path / "reward"))


@pytest.mark.parametrize("what", OF_REWARD)
def test_whatever_changes_is_noticed(folder: Path, what: str) -> None:
    before = load_reward(ClipScoreSpec(path=str(folder)), CPU).identity
    OF_REWARD[what](folder)
    after = load_reward(ClipScoreSpec(path=str(folder)), CPU).identity
    assert after["whole"] != before["whole"]
    # What sets know that were made before the rest counted.
    assert (after["weights"] != before["weights"]) == (what == "weights")


def test_calling_it_changes_nothing(folder: Path, picture) -> None:
    """Tokenizers remember the padding of their latest call."""
    reward = load_reward(ClipScoreSpec(path=str(folder)), CPU)
    reward.score([picture(16)], ["tree"])
    assert fingerprints.readers_in(reward.scorer) == fingerprints.readers_in(
        load_reward(ClipScoreSpec(path=str(folder)), CPU).scorer
    )


def test_where_its_files_lie_does_not_count(folder: Path, tmp_path: Path) -> None:
    def pick(place: Path) -> PickScoreSpec:
        return PickScoreSpec(path=str(place), processor=str(place), precision="bf16")

    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert load_reward(pick(folder), CPU).fingerprint == load_reward(pick(moved), CPU).fingerprint
    assert (
        pick(folder).knobs() == pick(moved).knobs() == {"type": "pick_score", "precision": "bf16"}
    )


def test_known_without_loading_until_a_file_changes(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0)
    spec = ClipScoreSpec(path=str(folder))
    both = WeightedSpec(rewards=(Part(reward=spec), Part(reward=ColorfulnessSpec(), weight=0.5)))
    assert known_identity(both) is None
    loaded = load_reward(both, CPU).identity
    with monkeypatch.context() as patch:
        patch.setattr(clip, "read_clip", None)
        assert known_identity(both) == loaded
        patch.undo()
    computed: list[object] = []
    monkeypatch.setattr(clip, "fingerprint", computed.append)
    assert load_reward(both, CPU).identity == loaded and not computed
    OF_REWARD["processor"](folder)
    assert known_identity(both) is None
