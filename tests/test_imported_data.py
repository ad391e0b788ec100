"""Data sets that are already there: prepared, trained on by two ranks, compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import preferences
import pytest
import tiny
from cdpo.engine.shards.manifest import load_manifest
from launching import ForkServer, losses


@pytest.mark.slow
def test_pick_a_pic_is_prepared_trained_on_and_compared(server: ForkServer, tmp_path: Path) -> None:
    """Without a file of training prompts: the captions come with the pairs."""
    rows = [preferences.judged(number) for number in range(60)]
    preferences.write_parquet(tmp_path / "pickapic" / "train-0.parquet", rows)
    recipe = tiny.build(tmp_path)
    recipe["prepare"]["source"] = {"type": "paired", "path": str(tmp_path / "pickapic")}
    recipe["curriculum"] |= {"difficulty": "score_gap", "binning": "quantile"}
    del recipe["prompts"]["train"]
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe)
    run = tmp_path / "run"
    first = server.run("prepare", path, ranks=2).succeeded()
    assert len(first.output[0].splitlines()) <= 24 and first.output[1] == ""
    assert "60 rows gave" in first.text and "ties" in first.text
    imported = load_manifest(run / "shards").statistics.imported
    assert imported is not None and imported["scores contradict the label"] > 0
    assert "nothing to do" in server.run("prepare", path, ranks=2).succeeded().text
    server.run("train", path, ranks=2).succeeded()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses(run)) == 6 and all(map(math.isfinite, losses(run)))
    server.run("compare", path).succeeded()
    results = json.dumps(json.loads((run / "compare" / "results.json").read_text()))
    assert "held-out" in results and '"training"' not in results


def test_a_mistake_in_the_data_is_one_line_and_exit_code_3(
    server: ForkServer, tmp_path: Path
) -> None:
    rows = [preferences.judged(number, 0.25 if number == 9 else None) for number in range(12)]
    data = preferences.write_parquet(tmp_path / "train.parquet", rows)
    recipe = tiny.build(tmp_path)
    recipe["prepare"]["source"] = {"type": "paired", "path": str(data)}
    recipe["curriculum"]["difficulty"] = "score_gap"
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe)
    outcome = server.run("prepare", path)
    assert outcome.code == 3 and "Traceback" not in outcome.text
    assert f"error: {data} row 9: label_0 is 0.25; it must be 1" in outcome.text
