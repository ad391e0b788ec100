"""What stage 1 has made is known by the content of what made it: a part that changes in place is
noticed and named, one that moves is not, and what checkpoints were trained on is not replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import fingerprint_store, load_backbone
from cdpo.engine.models.fingerprints import PARTS
from cdpo.engine.preparing import preparation
from cdpo.engine.preparing.candidates import CandidateSet, drawn_by
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.preparing.rankers import reward as reward_ranker
from cdpo.engine.ranks import Ranks
from cdpo.engine.ranks.run_lock import RunLock
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.manifest import load_manifest, manifest_hash, save_manifest
from cdpo.engine.shards.tar_index import index_samples, read_span
from part_changes import CHANGES, OF_REWARD
from prepared import contents, is_finished, prepare
from refusals import refused

CPU = torch.device("cpu")


class Prepared:
    """A world of the test's own, and a run folder in which its shards are made."""

    def __init__(self, folder: Path, load: Callable[..., Recipe]) -> None:
        self.folder, self._load = folder, load
        self.run = folder / "run"

    def recipe(self, *overrides: str, world: str = "world", run: str = "run") -> Recipe:
        models = [f"{key}.path={self.folder / world / name}" for key, name in PLACES.items()]
        return self._load("sampled", self.folder / run, *models, *overrides)

    def candidates(self, recipe: Recipe) -> CandidateSet:
        """What `prepare` would look for now."""
        tar = min((self.run / "candidates").glob("*.tar"))
        with tar.open("rb") as file:
            index = index_samples(file.fileno(), str(tar), ("png", "json"))
            place = int(index.offsets[0, 1]), int(index.sizes[0, 1])
            meta = json.loads(read_span(file.fileno(), str(tar), *place))["meta"]
        drawn = drawn_by(recipe.model, load_backbone(recipe.model, CPU))
        return CandidateSet(self.run / "candidates", meta | drawn)


PLACES = {"model": "sd", "reward": "reward"}


@pytest.fixture(scope="module")
def once(tiny_world: Path, load: Callable[..., Recipe], tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("identity")
    for name in PLACES.values():
        shutil.copytree(tiny_world / name, folder / "world" / name)
    made = Prepared(folder, load)
    prepare(made.recipe(), Ranks(0, 1, 0, CPU))
    return made


@pytest.fixture
def made(once: Prepared, tmp_path: Path) -> Iterator[Prepared]:
    """As it was, whatever the last test did to it."""
    kept = shutil.copytree(once.folder, tmp_path / "kept")
    yield once
    shutil.rmtree(once.folder)
    shutil.copytree(kept, once.folder)


def why_again(recipe: Recipe, ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says why the shards are written again."""
    assert not Preparation(ranks, recipe, Terminal()).is_finished
    [line] = [line for line in capsys.readouterr().err.splitlines() if "written again" in line]
    return line


@pytest.mark.parametrize("what", CHANGES)
def test_a_part_of_the_model_that_changes_is_named(made, ranks, capsys, what) -> None:
    part, change = CHANGES[what]
    change(made.folder / "world" / "sd")
    recipe = made.recipe()
    assert f"another {PARTS[part]}" in why_again(recipe, ranks, capsys)
    candidates = made.candidates(recipe)
    assert not candidates.has("house") and candidates.differs_in("house") == [part]


@pytest.mark.parametrize("what", OF_REWARD)
def test_a_reward_that_changes_is_named(made, ranks, capsys, what) -> None:
    OF_REWARD[what](made.folder / "world" / "reward")
    recipe = made.recipe()
    assert f"another {PARTS['reward']}" in why_again(recipe, ranks, capsys)
    assert made.candidates(recipe).has("house")


def test_what_has_moved_is_the_same(made, ranks) -> None:
    shutil.copytree(made.folder / "world", made.folder / "moved")
    shutil.rmtree(made.folder / "world")
    recipe = made.recipe(world="moved")
    assert is_finished(recipe, ranks)
    assert made.candidates(recipe).has("house")
    again = prepare(made.recipe(world="moved", run="again"), ranks)
    one, two = load_manifest(made.run / "shards"), load_manifest(again)
    assert manifest_hash(one) == manifest_hash(two) and one.model.path != two.model.path


def test_a_set_that_does_not_tell_its_parts_is_taken_as_before(made, ranks, capsys) -> None:
    """By names, and by the weights of denoiser, VAE and reward."""
    recipe, shards = made.recipe(), made.run / "shards"
    by_name = Preparation(ranks, recipe, Terminal(enabled=False))._inputs_hash(by_name=True)
    old = load_manifest(shards).model_copy(update={"parts": None, "fingerprint": by_name})
    save_manifest(shards, old)
    assert is_finished(recipe, ranks)
    shutil.copytree(made.folder / "world", made.folder / "moved")
    assert not is_finished(made.recipe(world="moved"), ranks)
    CHANGES["text encoder"][1](made.folder / "world" / "sd")
    assert is_finished(recipe, ranks)
    OF_REWARD["weights"](made.folder / "world" / "reward")
    assert f"another {PARTS['reward']}" in why_again(recipe, ranks, capsys)


def test_a_second_start_loads_nothing(made, ranks, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0)
    assert is_finished(made.recipe(), ranks)
    monkeypatch.setattr(preparation, "load_backbone", lambda *_: pytest.fail("the model is read"))
    monkeypatch.setattr(reward_ranker, "load_reward", lambda *_: pytest.fail("the reward is read"))
    assert is_finished(made.recipe(), ranks)


# One folder, one set


def test_two_cannot_prepare_one_set(made, ranks, tmp_path) -> None:
    """From different run folders, and through a link."""
    lock = RunLock(made.run / "shards", "data.path")
    (tmp_path / "link").symlink_to(made.run / "shards")
    before = contents(made.run / "shards")
    for path in (made.run / "shards", tmp_path / "link"):
        with refused(RecipeError, "in-use", "data.path"):
            prepare(made.recipe("seed=5", f"data.path={path}", run="other"), ranks)
    assert contents(made.run / "shards") == before
    lock.release()


@pytest.mark.parametrize(
    ("override", "said"),
    [("seed=5", "another recipe (seed=3)"), ("curriculum.tiers=2", "another recipe,")],
)
def test_what_checkpoints_were_trained_on_is_not_replaced(
    made, ranks, capsys, override, said
) -> None:
    recipe = made.recipe(override)
    assert said.rstrip(",") in why_again(recipe, ranks, capsys)
    checkpoint = made.run / "checkpoints" / "step-00000002" / "MANIFEST.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"data": "of another set"}))
    why_again(recipe, ranks, capsys)
    checkpoint.write_text(json.dumps({"data": manifest_hash(load_manifest(made.run / "shards"))}))
    with refused(RecipeError, "in-use", "run_dir") as told:
        Preparation(ranks, recipe, Terminal(enabled=False))
    assert said in str(told.value) and str(checkpoint.parent) in str(told.value)
    assert is_finished(made.recipe(), ranks)
