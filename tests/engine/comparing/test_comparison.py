"""Base against tuned on the tiny world: what is compared, written, and not done twice."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cdpo.engine.comparing.report.build import ComparisonReport, Measured
from cdpo.engine.comparing.runs import ComparedRun
from launching import World
from PIL import Image


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run folder; a large step, so that tuned images differ visibly from base."""
    run = tmp_path_factory.mktemp("compare") / "run"
    validated = ("prompts.validation={templates: [a moon]}", "evaluate.every=3")
    world.train(run, "train.optimizer.lr=0.02", *validated, "evaluate.images=1").succeeded()
    return run


def compare(world: World, run: Path, *overrides: str, failpoint: str = "") -> Any:
    return world.server.run(
        "compare",
        world.recipe,
        [f"run_dir={run}", *overrides],
        env={"CDPO_FAILPOINT": failpoint},
    )


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "compare" / "results.json").read_text())


def pixels(run: Path, side: str) -> np.ndarray:
    tars = sorted((run / "compare" / side).glob("*.tar"))
    assert len(tars) == 10
    return np.concatenate([np.frombuffer(tar.read_bytes(), np.uint8) for tar in tars])


def test_a_report_on_all_prompts_and_scorers(world, trained):
    outcome = compare(world, trained).succeeded()
    assert "report:" in outcome.text and "judge" in outcome.text
    results = results_of(trained)
    found = {
        (part["name"], scorer["scorer"], scorer["num_prompts"], scorer["num_pairs"])
        for part in results["prompt_sets"]
        for scorer in part["scorers"]
    }
    assert found == {
        ("training", "judge", 7, 14),
        ("training", "reward", 7, 14),
        ("held-out", "judge", 3, 6),
        ("held-out", "reward", 3, 6),
    }
    assert pixels(trained, "base").tobytes() != pixels(trained, "tuned").tobytes()
    assert results["format"] == 2 and [run["name"] for run in results["runs"]] == ["tuned"]
    assert "Score on validation prompts" in (trained / "compare" / "report.html").read_text()
    training = results["prompt_sets"][0]
    assert training["diversity"]["embedder"] == "judge"
    assert training["divergence"]["runs"][0]["mean"]["low"] > 0
    with Image.open(trained / "compare" / "side_by_side.png") as picture:
        assert picture.width > picture.height


def test_running_again_does_nothing(world, trained):
    compare(world, trained).succeeded()
    before = (trained / "compare" / "report.html").stat().st_mtime_ns
    assert "nothing to do" in compare(world, trained).succeeded().text
    assert (trained / "compare" / "report.html").stat().st_mtime_ns == before


def test_base_and_tuned_share_seeds(world, tmp_path):
    """An adapter that changes nothing gives the base's own pictures and scores."""
    run = tmp_path / "run"
    world.train(run, "train.optimizer.lr=1e-30", "train.steps=1").succeeded()
    compare(world, run).succeeded()
    results = results_of(run)
    for part in results["prompt_sets"]:
        for scorer in part["scorers"]:
            assert scorer["base_mean"] == scorer["tuned_mean"]
            assert scorer["win_rate"]["mean"] == 0.5


def test_killed_and_started_again_equals_an_uninterrupted_comparison(world, trained):
    compare(world, trained).succeeded()
    folder = trained / "compare"
    whole = json.loads((folder / "results.json").read_text())
    folder.rename(trained / "whole")
    killed = compare(world, trained, failpoint="prepare.candidates@12:kill")
    assert killed.code == -9
    assert not (folder / "report.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    assert len(kept) == 12
    compare(world, trained).succeeded()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert json.loads((folder / "results.json").read_text()) == whole


@pytest.fixture(scope="module")
def runs(world: World, trained: Path) -> dict[str, Path]:
    """Three kinds of results over one base: an adapter, another, and a whole fine-tuned model."""
    found = {"lora": trained, "dpo": trained.parent / "dpo", "full": trained.parent / "full"}
    world.train(found["dpo"], "train.optimizer.lr=0.01", "curriculum.order=random").succeeded()
    full = ("adapter.type=full", "export.formats=[merged]", "train.optimizer.lr=0.001")
    world.train(found["full"], *full).succeeded()
    return found


def listed(runs: dict[str, Path], *names: str) -> str:
    return f"compare.runs={{{', '.join(f'{name}: {runs[name]}' for name in names)}}}"


@pytest.fixture(scope="module")
def of_two(world: World, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed comparison of two runs: not to be written to."""
    folder = tmp_path_factory.mktemp("of_two")
    compare(world, folder, listed(runs, "dpo", "lora")).succeeded()
    return folder


def of_runs(results: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What results say of some runs, whatever their order and company."""
    found: dict[str, Any] = {}
    for part in results["prompt_sets"]:
        for scorer in part["scorers"]:
            place = {name: i for i, name in enumerate(scorer["win_rates"]["models"])}
            matrix = scorer["win_rates"]["matrix"]
            for name in names:
                run = next(run for run in scorer["runs"] if run["name"] == name)
                wins = {other: matrix[place[name]][place[other]] for other in ("base", *names)}
                found[part["name"], scorer["scorer"], name] = (run, wins)
        for what in ("diversity", "divergence"):
            for run in part[what]["runs"]:
                if run["name"] in names:
                    found[part["name"], what, run["name"]] = (run, {})
    return found


def test_several_runs_in_any_order_and_company_against_one_base(
    world, trained, runs, of_two, tmp_path
):
    """After a fine-tuned model, and in another order, adapters draw what they draw alone."""
    extra = "compare.rewards=[{type: jpeg_compressibility}]"
    outcome = compare(world, tmp_path, listed(runs, "full", "lora", "dpo"), extra).succeeded()
    assert "KL proxy" in outcome.text and "of 3 runs" in outcome.text
    both = ("lora", "dpo")
    three, two = (of_runs(results_of(folder), both) for folder in (tmp_path, of_two))
    assert len(three) > len(two) == 2 * 2 * (2 + 2)  # sets, runs; scorers and distances
    for key, (found, wins) in two.items():
        again, other_wins = three[key]
        assert found == again
        for name, cell in wins.items():  # one of the two is 1 minus what was counted
            assert other_wins[name] == pytest.approx(cell, abs=1e-12)
    drawn = {name: pixels(tmp_path, name).tobytes() for name in ("base", "full", *both)}
    assert all(pixels(of_two, name).tobytes() == drawn[name] for name in ("base", *both))
    assert len(set(drawn.values())) == 4
    compare(world, trained).succeeded()
    sets, alone_sets = (results_of(run)["prompt_sets"] for run in (tmp_path, trained))
    for part, alone in zip(sets, alone_sets, strict=True):
        for scorer, single in zip(part["scorers"], alone["scorers"], strict=False):
            assert scorer["runs"][1]["scores"] == single["tuned_scores"]
        for what in ("divergence", "diversity"):
            assert part[what]["runs"][1]["mean"] == alone[what]["runs"][0]["mean"]


def test_several_runs_killed_while_they_are_measured(world, runs, of_two, tmp_path):
    chosen = listed(runs, "dpo", "lora")
    for failpoint in ("compare.diverged@13:kill", "compare.scored@12:kill"):
        assert compare(world, tmp_path, chosen, failpoint=failpoint).code == -9
        assert not (tmp_path / "compare/report.html").exists()
    again = compare(world, tmp_path, chosen).succeeded()
    assert "measure" not in again.text  # both were kept
    assert {**results_of(tmp_path), "title": ""} == {**results_of(of_two), "title": ""}


def test_other_statistics_need_no_new_images_and_no_new_scores(world, runs, of_two, tmp_path):
    shutil.copytree(of_two, tmp_path, dirs_exist_ok=True)
    never = "compare.scored:kill"
    back = listed(runs, "lora", "dpo")
    compare(world, tmp_path, back, "compare.bootstrap=100", failpoint=never).succeeded()
    results = results_of(tmp_path)
    assert results["prompt_sets"][0]["divergence"] is not None
    assert [run["name"] for run in results["runs"]] == ["lora", "dpo"]
    off = compare(world, tmp_path, back, "compare.divergence_draws=0").succeeded()
    assert results_of(tmp_path)["prompt_sets"][0]["divergence"] is None
    assert "measure" not in off.text


def test_a_run_of_another_model_is_refused(world, runs):
    outcome = compare(world, runs["dpo"], listed(runs, "lora"), "model.resolution=[32, 32]")
    assert outcome.code != 0
    assert "compare.runs.lora=" in outcome.text and "model.resolution is [16, 16]" in outcome.text


@pytest.mark.long
def test_prompts_that_are_cut_or_repeated_are_counted_and_named(world, trained, tmp_path):
    prompts = tmp_path / "heldout.txt"
    prompts.write_text(f"a dog\n{'very ' * 100}red apple\nA  dog.\n")
    run = shutil.copytree(trained, tmp_path / "run")
    outcome = compare(world, run, f"prompts.heldout={prompts}").succeeded()
    assert "1 prompts have more than the" in outcome.text
    (row,) = csv.DictReader((run / "compare" / "left_out.csv").open())
    assert (row["file"], row["where"]) == (str(prompts), "line 3")


def test_the_report_says_who_chose_the_weights_and_whether_it_judges_too(tiny_recipe):
    def notes(chosen_by: str | None, *settings: str) -> list[str]:
        recipe = tiny_recipe(*settings)
        folder = Path(recipe.run_dir)
        folder.mkdir(exist_ok=True)
        (folder / "exported.json").write_text(json.dumps({"chosen_by": chosen_by, "step": 40}))
        run = ComparedRun("tuned", recipe, "")
        measured = Measured((), {}, images=dict.fromkeys(("base", "tuned")), embedder="judge")
        measured.distances = {"base": np.zeros(1)}
        return ComparisonReport(recipe, [run], measured)._notes([])

    assert notes(None) == []
    (note,) = notes("clip_score")
    assert "step 40" in note and "clip_score" in note and "judge" not in note
    judge = tiny_recipe().compare.judge
    (note,) = notes("clip_score", f"evaluate.scorers=[{{path: {judge.path}}}]")
    assert "judge" in note
