"""Which runs are compared, and which are refused, in one line that says what would be right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import CdpoError, DataError, RecipeError
from cdpo.engine.comparing import runs
from cdpo.engine.comparing.comparison import Comparison
from cdpo.engine.comparing.report.build import ComparisonReport
from cdpo.engine.comparing.runs import read_runs
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import fingerprint_store, load_backbone
from cdpo.engine.models.fingerprints import PARTS
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.identity import save_resolved
from cdpo.engine.recipe.reading import load_recipe
from part_changes import CHANGES, OF_REWARD
from refusals import refused
from safetensors.numpy import save_file

CPU = torch.device("cpu")
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture
def finished(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """Writes a folder such as a finished run leaves, with what `compare` looks at."""

    def write(name: str, *overrides: str, weights: float = 1.0) -> Path:
        recipe = tiny_recipe(*overrides, run=name)
        folder = Path(recipe.run_dir)
        for kind in ("", "ema/") if recipe.adapter.ema else ("",):
            (folder / kind / LORA).parent.mkdir(parents=True)
            save_file({"w": np.full(2, weights)}, folder / kind / LORA)
        save_resolved(recipe, folder / "recipe.yaml")
        return folder

    return write


def test_exactly_the_listed_runs(finished, tiny_recipe):
    one = finished("one", "objective.beta=50.0")
    two = finished("two", "curriculum.order=random", weights=2.0)
    recipe = tiny_recipe(f"compare.runs={{DPO++: {two}, beta 50: {one}}}", run="compared")
    found = read_runs(recipe, CPU)
    assert [(run.name, run.folder) for run in found] == [("DPO++", two), ("beta 50", one)]
    assert found[0].weights != found[1].weights
    facts = found[1].facts()
    assert facts.method["objective.beta"] == 50 and facts.run_dir == str(one)
    assert facts.method["curriculum.order"] == "easy_to_hard" and not facts.both_errors_rose


def test_what_was_changed_in_the_middle_of_a_run_is_told(finished):
    folder = finished("own")
    change = {"step": 4, "key": "train.optimizer.lr", "before": "0.001", "after": "1e-05"}
    (folder / "exported.json").write_text(json.dumps({"changes": [change]}))
    [run] = read_runs(load_recipe(folder / "recipe.yaml"), CPU)
    facts = run.facts()
    assert facts.changes == ["after step 4: train.optimizer.lr 0.001 -> 1e-05"]
    measured = SimpleNamespace(embedder="CLIP", distances={"a": 1})
    report = SimpleNamespace(measured=measured, runs=[])
    [note] = ComparisonReport._notes(report, [facts])
    assert note == f"tuned was not trained by one recipe: {facts.changes[0]}."


def test_who_kept_the_rounds_of_a_sum_is_told(finished):
    folder = finished("own", "train.steps=9")
    told = {"rounds": [1, 3], "chosen_by": "the reward", "step": 9}
    (folder / "exported.json").write_text(json.dumps(told))
    recipe = load_recipe(folder / "recipe.yaml")
    [run] = read_runs(recipe, CPU)
    assert run.facts().rounds == [1, 3]
    report = SimpleNamespace(recipe=recipe)
    note = ComparisonReport._who_chose(report, run)
    assert "tuned is the sum of rounds 1, 3, each kept by the reward on validation prompts" in note


def test_a_run_that_was_moved_is_taken_from_where_it_lies(finished, tiny_recipe):
    moved = finished("one").rename(finished("two").parent / "moved")
    [run] = read_runs(tiny_recipe(f"compare.runs={{a: {moved}}}"), CPU)
    assert run.recipe.run_dir == str(moved)


def test_without_a_list_the_own_run(finished):
    folder = finished("own")
    [run] = read_runs(load_recipe(folder / "recipe.yaml"), CPU)
    assert run.name == "tuned" and run.folder == folder


@pytest.mark.parametrize(
    ("error", "kind", "overrides"),
    [
        (DataError, "contradiction", ["compare.weights=ema"]),
        (DataError, "mismatch", ["model.resolution=[32, 32]"]),
        (DataError, "mismatch", ["model.path=hub/model"]),
        (DataError, "missing", ["compare.runs={a: nowhere}"]),
    ],
)
def test_what_is_no_run_of_this_model_is_refused_by_its_name(
    finished, tiny_recipe, error, kind, overrides
):
    recipe = tiny_recipe(f"compare.runs={{a: {finished('run')}}}", *overrides, run="here")
    wording = "run-of-another-model" if "resolution" in overrides[0] else None
    with refused(error, kind, "compare.runs.a", wording=wording):
        read_runs(recipe, CPU)


def test_a_run_with_a_damaged_recipe_is_refused_in_one_line(finished, tiny_recipe):
    folder = finished("run")
    (folder / "recipe.yaml").write_text("seed: 1")
    with refused(RecipeError, "damaged", "compare.runs.a") as told:
        read_runs(tiny_recipe(f"compare.runs={{a: {folder}}}"), CPU)
    assert str(told.value).endswith("(and 3 more)") and "\n" not in str(told.value)


def test_an_unfinished_run_is_refused(finished, tiny_recipe):
    folder = finished("run")
    (folder / LORA).unlink()
    (folder / "lora").rmdir()
    with refused(DataError, "missing", str(folder / "lora")):
        read_runs(tiny_recipe(f"compare.runs={{a: {folder}}}"), CPU)


def test_the_same_folder_written_otherwise_is_the_same_model(finished, tiny_recipe):
    folder = finished("run")
    path = Path(tiny_recipe().model.path)
    here = tiny_recipe(f"compare.runs={{a: {folder}}}", f"model.path={path.parent}/./sd/../sd")
    assert len(read_runs(here, CPU)) == 1


def test_an_average_is_taken_of_runs_that_have_one(finished, tiny_recipe):
    folder = finished("run", "adapter.ema=0.9")
    # The recipe that compares trains nothing, and needs no average of its own.
    [run] = read_runs(tiny_recipe(f"compare.runs={{a: {folder}}}", "compare.weights=ema"), CPU)
    assert run.recipe.compare.weights == "ema"


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("{<b>: x}", "is no name for a run"),
        ("{a/b: x}", "is no name for a run"),
        ("{../up: x}", "dots are for the command line"),
        ("{' a': x}", "is no name for a run"),
        (f"{{{'a' * 41}: x}}", "1 to 40 letters"),
        ("{base: x}", "cannot be called 'base'"),
        ("{Scores: x}", "cannot be called 'Scores'"),
        ("{a: x, A: y}", "differ in case alone"),
        ("{a: 3}", "compare.runs"),
        ("[a]", "compare.runs"),
    ],
)
def test_names_are_short_and_plain(tiny_recipe, runs, said):
    with pytest.raises(CdpoError) as error:
        tiny_recipe(f"compare.runs={runs}")
    assert said in str(error.value)


def test_runs_survive_being_saved(tiny_recipe, tmp_path):
    recipe: Any = tiny_recipe("compare.runs={50: runs/a, DPO++: runs/b}")
    save_resolved(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.compare.runs == {"50": "runs/a", "DPO++": "runs/b"}
    assert list(again.compare.runs) == list(recipe.compare.runs)


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_known_by_the_parts_it_was_tuned_from(
    finished: Callable[..., Path], tiny_recipe: Callable[..., Recipe], tmp_path: Path, what: str
) -> None:
    """In place, and from where the model has moved; how images are sampled is for both to say."""
    part, change = CHANGES[what]
    sd = Path(shutil.copytree(tiny_recipe().model.path, tmp_path / "sd"))
    folder = finished("run", f"model.path={sd}")
    moved = Path(shutil.copytree(sd, tmp_path / "moved"))
    there = tiny_recipe(f"compare.runs={{a: {folder}}}", f"model.path={moved}")
    here = tiny_recipe(f"compare.runs={{a: {folder}}}", f"model.path={sd}")
    own = load_recipe(folder / "recipe.yaml")
    parts = load_backbone(own.model, CPU, own.train.precision).fingerprints()
    stamp = {"parts": parts | {"teacher": "t"}, "precision": own.train.precision}
    (folder / "exported.json").write_text(json.dumps(stamp))
    assert len(read_runs(there, CPU)) == len(read_runs(own, CPU)) == 1
    change(sd)
    if part == "sampler":
        assert len(read_runs(here, CPU)) == 1
        return
    for recipe, key in ((here, "compare.runs.a"), (own, "run_dir")):
        with refused(DataError, "mismatch", key) as told:
            read_runs(recipe, CPU)
        assert f"another {PARTS[part]} " in str(told.value)


def test_a_report_is_known_by_what_drew_and_scored(
    finished: Callable[..., Path],
    tiny_recipe: Callable[..., Recipe],
    tiny_world: Path,
    tmp_path: Path,
    ranks: Ranks,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0)
    for name in ("sd", "judge"):
        shutil.copytree(tiny_world / name, tmp_path / name)
        shutil.copytree(tiny_world / name, tmp_path / "moved" / name)
    finished("run")

    def comparison(where: Path = tmp_path) -> Comparison:
        models = (f"model.path={where / 'sd'}", f"compare.judge.path={where / 'judge'}")
        return Comparison(ranks, tiny_recipe(*models), Terminal())

    first = comparison()
    assert not first.is_finished
    first.folder.mkdir()
    first.report_path.write_text("a report")
    made_of = {"inputs": first.inputs, "parts": first._parts()}
    (first.folder / "made_of.json").write_text(json.dumps(made_of))
    assert comparison().is_finished and comparison(tmp_path / "moved").is_finished
    monkeypatch.setattr(runs, "load_backbone", lambda *_: pytest.fail("the model is read"))
    assert comparison().is_finished
    monkeypatch.undo()
    CHANGES["vae"][1](tmp_path / "sd")
    OF_REWARD["tokenizer"](tmp_path / "judge")
    assert not comparison().is_finished
    assert "another VAE, judge" in capsys.readouterr().err
    (first.folder / "made_of.json").unlink()
    assert not comparison(tmp_path / "moved").is_finished
