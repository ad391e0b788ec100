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
