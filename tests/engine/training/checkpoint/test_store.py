"""What ranks agree on about a checkpoint; the files here are made up, DeepSpeed's elsewhere."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from cdpo.engine.basics.errors import CheckpointError, NumericsError, RecipeError, unwritable
from cdpo.engine.curriculum.pacing import Cursor
from cdpo.engine.models.fingerprints import PARTS
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.checkpoint import store as checkpoint
from cdpo.engine.training.checkpoint.layout import Fragment, Layout
from cdpo.engine.training.checkpoint.store import CheckpointStore
from refusals import refused
from together import on_ranks

Parts = dict[str, str] | None


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe()


def store(ranks: Ranks, recipe: Recipe, parts: Parts = None, keep: int = 2) -> CheckpointStore:
    folder = Path(recipe.run_dir) / "checkpoints"
    found = CheckpointStore(folder, ranks, recipe, keep=keep)
    found.data_hash, found.parts = "d" * 64, parts
    return found


def save(
    recipe: Recipe,
    *steps: int,
    ranks: int = 2,
    parts: Parts = None,
    skips: tuple[int, ...] = (),
    keep: int = 2,
    **options: bool,
) -> list[object]:
    def work(each: Ranks) -> None:
        def write(folder: Path) -> None:
            name = f"zero_pp_rank_{each.rank}_mp_rank_00_optim_states.pt"
            (folder / name).write_bytes(bytes(64 + each.rank))

        for step in steps:
            store(each, recipe, parts, keep).save(Cursor(step, skips), write, **options)

    return on_ranks(ranks, work)


def load(recipe: Recipe, ranks: int = 2, parts: Parts = None) -> list[object]:
    """The step that each rank goes on from, or its error."""

    def work(each: Ranks) -> int | None:
        cursor = store(each, recipe, parts).load_newest(lambda folder, ranks: None)
        return cursor and cursor.step

    return on_ranks(ranks, work)


def folders(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in Path(recipe.run_dir).glob("checkpoints/*"))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are hashed again."""
    names: list[str] = []

    def note(folder: Path, name: str, entry: dict[str, object]) -> None:
        names.append(name)
        real(folder, name, entry)

    real = checkpoint.check_file
    monkeypatch.setattr(checkpoint, "check_file", note)
    yield names


def agreed(outcomes: list[object], kind: str, name: str | None = None) -> None:
    """Every rank has the same CheckpointError, about what is called so in `checkpoints/`."""
    for outcome in outcomes:
        with refused(CheckpointError, kind) as told:
            raise outcome
        assert str(outcome) == str(outcomes[0])
        assert name is None or Path(told.value.key).name == name


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_every_file_is_read_once_by_one_rank(recipe, checked, readers) -> None:
    save(recipe, 4)
    written = sorted(checked)
    assert len(written) == 3 == len(set(written))  # two partitions and the recipe
    checked.clear()
    assert load(recipe, readers) == [4] * readers
    assert sorted(checked) == written


def test_a_bit_that_flips_is_noticed(recipe) -> None:
    save(recipe, 2, 4)
    newest = Path(recipe.run_dir) / "checkpoints" / "step-00000004"
    damage.flip_a_bit(newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert load(recipe) == [2, 2]


def test_a_file_that_one_rank_cannot_read_is_passed_over_by_all(recipe, monkeypatch) -> None:
    save(recipe, 2, 4)
    real = checkpoint.check_file

    def stale(folder: Path, name: str, entry: dict[str, object]) -> None:
        if "pp_rank_1_" in name and folder.name.endswith("4"):
            raise OSError(116, "Stale file handle")
        real(folder, name, entry)

    monkeypatch.setattr(checkpoint, "check_file", stale)
    assert load(recipe) == [2, 2]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"step": 4', '"step": 5'),
        ('"skips": []', '"skips": [1]'),
        ('"world_size": 2', '"world_size": 1'),
        ('"format": 2', '"format": 1'),
        ("{", "["),
    ],
)
def test_a_manifest_that_has_changed_is_no_manifest(recipe, before, after) -> None:
    save(recipe, 2, 4)
    path = Path(recipe.run_dir) / "checkpoints" / "step-00000004" / "MANIFEST.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert load(recipe) == [2, 2]


def test_a_list_is_no_manifest_either(recipe) -> None:
    save(recipe, 2, 4)
    (Path(recipe.run_dir) / "checkpoints" / "step-00000004" / "MANIFEST.json").write_text("[]")
    assert load(recipe) == [2, 2]


def test_a_folder_under_the_name_of_another_step_does_not_count(recipe) -> None:
    save(recipe, 2)
    folder = Path(recipe.run_dir) / "checkpoints"
    (folder / "step-00000002").rename(folder / "step-00000009")
    agreed(load(recipe), "damaged", "checkpoints")


def test_checkpoints_that_are_gone_are_no_fresh_start(recipe) -> None:
    assert load(recipe) == [None, None]
    save(recipe, 2)
    folder = Path(recipe.run_dir) / "checkpoints"
    (folder / "step-00000002").rename(folder / "moved")
    agreed(load(recipe), "missing", "checkpoints")


def test_older_ones_stay_until_the_new_one_is_read_back(recipe, monkeypatch) -> None:
    save(recipe, 2, 4)
    real = checkpoint.check_file

    def rotten(folder: Path, name: str, entry: dict[str, object]) -> None:
        if folder.name.endswith("6") and "pp_rank_1_" in name:
            raise ValueError(f"{name} has changed since it was written")
        real(folder, name, entry)

    monkeypatch.setattr(checkpoint, "check_file", rotten)
    agreed(save(recipe, 6), "unwritable", "step-00000006")
    assert {"step-00000002", "step-00000004"} <= set(folders(recipe))
    latest = Path(recipe.run_dir) / "checkpoints" / "latest"
    assert latest.read_text() == "step-00000004\n"
    assert load(recipe) == [4, 4]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_no_rank_waits_for_one_that_cannot_write_the_recipe(recipe, monkeypatch, number) -> None:
    def full(recipe: Recipe, path: Path, changes: object) -> None:
        raise unwritable(f"cannot write {path}", str(path), OSError(number, "no"), RecipeError)

    monkeypatch.setattr(checkpoint, "save_resolved", full)
    agreed(save(recipe, 2), "unwritable")


# And the newest checkpoint that a kill there leaves, from step 1 on.
PLACES = {
    "checkpoint.synced@2": 1,
    "checkpoint.hashed": 1,
    "checkpoint.manifest": 1,
    "checkpoint.before_rename": 1,
    "checkpoint.after_rename": 2,
    "checkpoint.latest": 3,
    "checkpoint.before_prune": 4,
    "checkpoint.pruned": 5,
}


def test_killed_inside_a_save(recipe) -> None:
    """Two ranks, in a process that dies there; the one before counts, or the new one, and is left
    alone with the one before it by the next save that comes to its end.
    """
    save(recipe, 1)
    for place, survivor in PLACES.items():
        [step, _] = load(recipe)
        child = os.fork()
        if not child:
            os.environ["CDPO_FAILPOINT"] = f"{place}:kill"
            save(recipe, step + 1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, place
        assert load(recipe) == [survivor] * 2, place
    save(recipe, 6)
    assert folders(recipe) == ["latest", "step-00000005", "step-00000006"]


def test_what_a_save_left_undone_is_done_by_the_same_save_again(recipe) -> None:
    for step in (1, 2):
        save(recipe, step)
    for step, place in ((3, "checkpoint.after_rename"), (4, "checkpoint.before_prune")):
        child = os.fork()
        if not child:
            os.environ["CDPO_FAILPOINT"] = f"{place}:kill"
            save(recipe, step)
            os._exit(0)
        os.waitpid(child, 0)
        assert len(folders(recipe)) == 4
        save(recipe, step)
        assert folders(recipe) == ["latest", f"step-{step - 1:08d}", f"step-{step:08d}"]
        assert (Path(recipe.run_dir) / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"


def test_a_full_disk_on_one_rank_is_agreed_on(recipe) -> None:
    save(recipe, 2)

    def full(each: Ranks) -> None:
        def write(folder: Path) -> None:
            if each.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        store(each, recipe).save(Cursor(4, ()), write)

    agreed(on_ranks(2, full), "unwritable")
    assert folders(recipe) == ["latest", "step-00000002"]


def test_an_old_one_that_cannot_be_removed_is_no_reason_to_stop(recipe, monkeypatch) -> None:
    save(recipe, 2, 4)
    # A file system over the network keeps names of files that somebody has open.
    real = checkpoint.shutil.rmtree

    def busy(folder: Path, ignore_errors: bool = False) -> None:
        if folder.name == "step-00000002":
            if not ignore_errors:
                raise OSError(39, "Directory not empty")
        else:
            real(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    assert save(recipe, 6) == [None, None]
    assert load(recipe) == [6, 6]


def test_what_the_manifest_names(recipe) -> None:
    save(recipe, 2)
    path = Path(recipe.run_dir) / "checkpoints" / "step-00000002" / "MANIFEST.json"
    assert len(json.loads(path.read_text())["files"]) == 3


# Whether it is finite


def save_tensors(recipe: Recipe, step: int, *numbers: float) -> list[Any]:
    """A checkpoint of as many ranks, each with a partition of that number."""

    def work(each: Ranks) -> None:
        def write(folder: Path) -> None:
            Layout(2, {"unet.a": Fragment(0, 0, 0, 2)}, {}).save(folder, each.rank)
            flat = [torch.tensor([1.0, numbers[each.rank]])]
            content = {"optimizer_state_dict": {"single_partition_of_fp32_groups": flat}}
            name = f"zero_pp_rank_{each.rank}_mp_rank_00_optim_states.pt"
            torch.save(content, folder / name)

        store(each, recipe).save(Cursor(step, ()), write)

    return on_ranks(len(numbers), work)


NAN = float("nan")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_finite_is_not_committed(recipe, rank) -> None:
    """Whichever rank has it: all have the same error, and the checkpoint before stays."""
    assert save_tensors(recipe, 2, 1.0, 1.0) == [None, None]
    numbers = [1.0, 1.0]
    numbers[rank] = NAN
    outcomes = save_tensors(recipe, 4, *numbers)
    assert str(outcomes[0]) == str(outcomes[1])
    with refused(NumericsError, "non-finite", "step 4", wording="checkpoint.not-finite"):
        raise outcomes[0]
    assert folders(recipe) == ["latest", "step-00000002"]
    assert load(recipe) == [2, 2]


@pytest.mark.parametrize("readers", [1, 2])
def test_a_checkpoint_that_is_not_finite_is_passed_over(recipe, monkeypatch, readers) -> None:
    """As one from before it was looked for; and it is replaced when the run comes there again."""
    save_tensors(recipe, 2, 1.0, 1.0)
    with monkeypatch.context() as blind:
        blind.setattr(checkpoint, "check_finite", lambda path: None)
        assert save_tensors(recipe, 4, 1.0, NAN) == [None, None]
        assert load(recipe) == [4, 4]

    def work(each: Ranks) -> tuple[int, list[str]]:
        found = store(each, recipe)
        return found.load_newest(lambda folder, ranks: None).step, found.passed_over

    told = ["step-00000004: float32 weight of unet.a is not finite (nan)"]
    assert on_ranks(readers, work) == [(2, told)] * readers
    assert save_tensors(recipe, 4, 1.0, 1.0) == [None, None]
    assert load(recipe) == [4, 4]


def test_only_checkpoints_that_are_not_finite_are_no_fresh_start(recipe, monkeypatch) -> None:
    with monkeypatch.context() as blind:
        blind.setattr(checkpoint, "check_finite", lambda path: None)
        save_tensors(recipe, 4, NAN)
    agreed(load(recipe), "damaged", "checkpoints")


@pytest.mark.parametrize("keep", [1, 3])
def test_skipped_batches_never_prune_the_last_one_after_a_finite_step(recipe, keep) -> None:
    """However often the run stops, goes a step further and skips again."""
    save(recipe, 3, 4, keep=keep)
    for step in range(5, 10):
        save(recipe, step, keep=keep, after_skips=True)
        assert {"step-00000004", f"step-{step:08d}"} <= set(folders(recipe))
        assert len(folders(recipe)) <= keep + 2  # that one, and `latest`
    save(recipe, 10, keep=keep)
    assert len(folders(recipe)) == keep + 1
    assert "step-00000004" not in folders(recipe)


def test_skips_at_a_step_that_is_saved_leave_its_state_what_it_is(recipe) -> None:
    save(recipe, 4, keep=1)
    save(recipe, 4, keep=1, skips=(2,), after_skips=True)
    save(recipe, 5, keep=1, after_skips=True)
    assert folders(recipe) == ["latest", "step-00000004", "step-00000005"]


# What may change in it


def changed(recipe: Recipe, *allowed: str, ranks: int = 2) -> list[Any]:
    """What each rank notes when it goes on with a recipe, and saves the next step."""

    def work(each: Ranks) -> list[str]:
        found = store(each, recipe)
        found.allowed = allowed
        step = found.load_newest(lambda folder, ranks: None).step
        found.save(Cursor(step + 1, ()), lambda folder: None)
        return [str(change) for change in found.changes]

    return on_ranks(ranks, work)


LOWER, CLIP = "train.optimizer.lr", "train.gradient_clip"


def test_a_change_is_allowed_by_name_and_remembered(recipe, tiny_recipe) -> None:
    save(recipe, 2)
    lower = tiny_recipe(f"{LOWER}=1e-5")
    with refused(CheckpointError, "changed", LOWER, wording="checkpoint.changed"):
        raise load(lower)[0]
    agreed(changed(lower, CLIP), "changed", LOWER)
    first = f"after step 2: {LOWER} 0.001 -> 1e-05"
    assert changed(lower, LOWER) == [[first]] * 2
    assert changed(lower, LOWER) == [[first]] * 2  # the same command, started again
    assert changed(lower) == [[first]] * 2
    agreed(load(recipe), "changed", LOWER)
    both = tiny_recipe(f"{LOWER}=1e-5", f"{CLIP}=0.5")
    second = f"after step 5: {CLIP} 1.0 -> 0.5"
    assert changed(both, CLIP) == [[first, second]] * 2
    record = (Path(recipe.run_dir) / "checkpoints" / "step-00000006" / "recipe.yaml").read_text()
    assert f"# Changed {first}\n# Changed {second}\n" in record


def test_what_may_not_change_is_not_offered(recipe, tiny_recipe) -> None:
    save(recipe, 2)
    outcomes = load(tiny_recipe("seed=4", f"{LOWER}=1e-5"))
    agreed(outcomes, "changed", "seed")
    assert "--allow-change" not in str(outcomes[0])


# Whose it is

MOVED = [f"model.{key}=elsewhere" for key in ("path", "revision", "variant", "vae", "unet")]


def test_a_checkpoint_is_of_parts_wherever_they_lie(recipe, tiny_recipe) -> None:
    parts = {"model": "a", "text": "b"}
    save(recipe, 2, parts=parts)
    for moved in (recipe, *map(tiny_recipe, MOVED)):
        assert load(moved, parts=parts) == [2, 2]
    for other in ({"model": "a", "text": "c"}, {"model": "a"}, {**parts, "teacher": "d"}):
        outcomes = load(recipe, parts=other)
        agreed(outcomes, "changed")
        assert outcomes[0].key in ("text", "teacher")
        assert f"another {PARTS[outcomes[0].key]}" in str(outcomes[0])
    agreed(load(tiny_recipe("objective.beta=7"), parts=parts), "changed", "objective.beta")


def test_files_that_are_others_on_one_machine_are_told_to_all(recipe) -> None:
    save(recipe, 2, parts={"model": "a"})

    def work(each: Ranks) -> None:
        own = {"model": "a" if each.rank == 0 else "b"}
        store(each, recipe, own).load_newest(lambda folder, ranks: None)

    agreed(on_ranks(2, work), "changed", "model")


@pytest.mark.parametrize("parts", [None, {"model": "a"}])
def test_a_checkpoint_that_does_not_tell_its_parts_is_known_by_names(
    recipe, tiny_recipe, parts
) -> None:
    save(recipe, 2)
    assert load(recipe, parts=parts) == [2, 2]
    agreed(load(tiny_recipe(MOVED[0]), parts=parts), "changed", "model.path")
