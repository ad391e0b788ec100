"""Base against tuned on the tiny world: what is compared, written, and not done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import World
from PIL import Image


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run folder; a large step, so that tuned images differ visibly from base."""
    run = tmp_path_factory.mktemp("compare") / "run"
    world.train(run, "train.optimizer.lr=0.02").succeeded()
    return run


def compare(world: World, run: Path, *overrides: str, failpoint: str = "") -> Any:
    return world.server.run(
        "compare",
        world.recipe,
        [f"run_dir={run}", *overrides],
        env={"CDPO_FAILPOINT": failpoint},
    )


def pixels(run: Path, side: str) -> np.ndarray:
    tars = sorted((run / "compare" / side).glob("*.tar"))
    assert len(tars) == 10
    return np.concatenate([np.frombuffer(tar.read_bytes(), np.uint8) for tar in tars])


def test_a_report_on_all_prompts_and_scorers(world: World, trained: Path) -> None:
    outcome = compare(world, trained).succeeded()
    assert "report:" in outcome.text and "judge" in outcome.text
    results = json.loads((trained / "compare" / "results.json").read_text())
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
    training = results["prompt_sets"][0]
    assert training["diversity"]["embedder"] == "judge"
    assert training["divergence"]["runs"][0]["mean"]["low"] > 0
    with Image.open(trained / "compare" / "side_by_side.png") as picture:
        assert picture.width > picture.height


def test_running_again_does_nothing(world: World, trained: Path) -> None:
    compare(world, trained).succeeded()
    before = (trained / "compare" / "report.html").stat().st_mtime_ns
    assert "nothing to do" in compare(world, trained).succeeded().text
    assert (trained / "compare" / "report.html").stat().st_mtime_ns == before


def test_base_and_tuned_share_seeds(world: World, tmp_path: Path) -> None:
    """An adapter that changes nothing gives the base's own pictures and scores."""
    run = tmp_path / "run"
    world.train(run, "train.optimizer.lr=1e-30", "train.steps=1").succeeded()
    compare(world, run).succeeded()
    results = json.loads((run / "compare" / "results.json").read_text())
    for part in results["prompt_sets"]:
        for scorer in part["scorers"]:
            assert scorer["base_mean"] == scorer["tuned_mean"]
            assert scorer["win_rate"]["mean"] == 0.5


def test_killed_and_started_again_equals_an_uninterrupted_comparison(
    world: World, trained: Path
) -> None:
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


def without_order(results: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What results say of the runs, whatever their order."""
    found: dict[str, Any] = {}
    for part in results["prompt_sets"]:
        for scorer in part["scorers"]:
            place = {name: i for i, name in enumerate(scorer["win_rates"]["models"])}
            matrix = scorer["win_rates"]["matrix"]
            for name in names:
                run = next(run for run in scorer["runs"] if run["name"] == name)
                wins = {other: matrix[place[name]][place[other]] for other in place}
                found[part["name"], scorer["scorer"], name] = (run, wins)
        for what in ("diversity", "divergence"):
            for run in part[what]["runs"]:
                found[part["name"], what, run["name"]] = (run, {})
    return found


def test_several_runs_in_any_order_against_one_base(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    names = ["lora", "dpo", "full"]
    results = {}
    extra = "compare.rewards=[{type: jpeg_compressibility}]"
    for label, order in (("there", names), ("back", names[::-1])):
        outcome = compare(world, tmp_path / label, listed(runs, *order), extra).succeeded()
        assert "KL proxy" in outcome.text and "of 3 runs" in outcome.text
        results[label] = json.loads((tmp_path / label / "compare/results.json").read_text())
    there, back = (without_order(result, names) for result in results.values())
    for key, (found, wins) in there.items():
        again, other_wins = back[key]
        assert found == again
        for name, cell in wins.items():  # one of the two is 1 minus what was counted
            assert other_wins[name] == pytest.approx(cell, abs=1e-12)
    for name in ("base", *names):
        assert (
            pixels(tmp_path / "there", name).tobytes() == pixels(tmp_path / "back", name).tobytes()
        )
    assert len({pixels(tmp_path / "there", name).tobytes() for name in ("base", *names)}) == 4
    # In company an adapter draws what it draws alone.
    compare(world, runs["lora"]).succeeded()
    alone = json.loads((runs["lora"] / "compare/results.json").read_text())
    for part, own in zip(results["there"]["prompt_sets"], alone["prompt_sets"], strict=True):
        for scorer, single in zip(part["scorers"], own["scorers"], strict=False):
            assert scorer["runs"][0]["scores"] == single["tuned_scores"]
        assert part["divergence"]["runs"][0]["mean"] == own["divergence"]["runs"][0]["mean"]
        assert part["diversity"]["runs"][0]["mean"] == own["diversity"]["runs"][0]["mean"]


def test_several_runs_killed_while_they_are_measured(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    chosen = listed(runs, "lora", "dpo")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    compare(world, whole, chosen).succeeded()
    for failpoint in ("compare.diverged@13:kill", "compare.scored@12:kill"):
        assert compare(world, killed, chosen, failpoint=failpoint).code == -9
        assert not (killed / "compare/report.html").exists()
    again = compare(world, killed, chosen).succeeded()
    assert "measure" not in again.text  # both were kept
    one, other = (json.loads((p / "compare/results.json").read_text()) for p in (whole, killed))
    assert {**one, "title": ""} == {**other, "title": ""}


def test_other_statistics_need_no_new_images_and_no_new_scores(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    chosen = listed(runs, "lora", "dpo")
    compare(world, tmp_path, chosen).succeeded()
    never = "compare.scored:kill"
    compare(world, tmp_path, chosen, "compare.bootstrap=100", failpoint=never).succeeded()
    results = json.loads((tmp_path / "compare/results.json").read_text())
    assert results["prompt_sets"][0]["divergence"] is not None
    off = compare(world, tmp_path, chosen, "compare.divergence_draws=0").succeeded()
    results = json.loads((tmp_path / "compare/results.json").read_text())
    assert results["prompt_sets"][0]["divergence"] is None and "measure" not in off.text
    back = listed(runs, "dpo", "lora")
    compare(world, tmp_path, back, failpoint=never).succeeded()
    results = json.loads((tmp_path / "compare/results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["dpo", "lora"]


def test_a_run_of_another_model_is_refused(world: World, runs: dict[str, Path]) -> None:
    outcome = compare(world, runs["dpo"], listed(runs, "lora"), "model.resolution=[32, 32]")
    assert outcome.code != 0
    assert "compare.runs.lora=" in outcome.text and "model.resolution is [16, 16]" in outcome.text
