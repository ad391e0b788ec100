"""The rows of README: recipes as they ship, and the tables that hold what was measured."""

import json
from pathlib import Path

import bench_demo
import pytest
from cdpo.engine.basics.estimates import Estimate
from cdpo.engine.comparing.report.wording import percent_interval
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from quality_bench.plan import RECIPES, ROOT, shipped


@pytest.mark.parametrize("model", list(RECIPES))
def test_a_seed_and_a_thread_are_all_that_is_changed(model: str) -> None:
    recipe = Recipe.model_validate(shipped(model, {"seed": 7, "train.threads": 1}))
    own = load_recipe(RECIPES[model], ["seed=7", "train.threads=1"])
    assert recipe == own


def test_the_tables_of_the_docs_are_what_was_measured() -> None:
    """README's rows, and the judge's win rates of docs/results.md."""
    rows = json.loads((bench_demo.RESULTS / "demo_cpu.json").read_text())["rows"]
    readme, results = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")
    )
    lines = list(bench_demo.gains(rows))
    assert len(lines) == 2 * len({row["model"] for row in rows}) > 0
    for line in lines:
        assert f"\n{line}\n" in readme, line
    for row in rows:
        wins = percent_interval(Estimate(**row["win_rate"])).replace("%", " %")
        assert row["scorer"] != "judge" or f"| {wins} |" in results, row


def test_rows_of_a_comparison_and_of_none(tmp_path: Path) -> None:
    estimate = {"mean": 0.0123, "low": 0.0101, "high": 0.0149}
    tuned = {"num_pairs": 4, "mean": estimate, "difference": estimate, "win_rate": estimate}
    scorers = [
        {"scorer": scorer, "base_mean": estimate, "runs": [tuned]} for scorer in ("judge", "reward")
    ]
    sets = [
        {"name": name, "scorers": scorers, "divergence": {"runs": [{"mean": {"mean": 1e-4}}]}}
        for name in ("training", "held-out")
    ]
    assert list(bench_demo.rows_of("lcm", 0, tmp_path)) == []
    for place in (tmp_path, tmp_path / "in_4"):
        (place / "compare").mkdir(parents=True)
        (place / "compare" / "results.json").write_text(json.dumps({"prompt_sets": sets}))
        estimate["mean"] = 0.9  # of the other steps, which README's rows leave out
    rows = [row for seed in (1, 0) for row in bench_demo.rows_of("lcm", seed, tmp_path)]
    assert [row["steps"] for row in rows] == ([2] * 4 + [4] * 4) * 2
    assert all("scores" not in row for row in rows)
    training, held_out = bench_demo.gains(rows)
    cell = "+0.012 [+0.010, +0.015]"
    assert training == f"| LCM, training | {cell} | {cell} |"
    assert held_out.startswith("| LCM, held out |")
    assert len(list(bench_demo.details(rows))) == 16
