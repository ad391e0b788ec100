"""The evidence benchmark: recipes that the verbs take, curves, and distances that are equal."""

import json

import numpy as np
import pytest
from cdpo.engine.recipe import Recipe
from quality_bench.curves import collect_curves, draw_curves
from quality_bench.evidence import (
    ARMS,
    PROMPTS,
    SCALES,
    SETTINGS,
    Arm,
    arms_of,
    of_rounds,
    run_arms,
)
from quality_bench.plan import Group, recipe_of
from quality_bench.runs import results_path


def prompts_of(name: str) -> set[str]:
    return set((PROMPTS / name).read_text().splitlines())


def test_no_prompt_stands_on_two_sides():
    sides = [prompts_of(f"{name}.txt") for name in ("train", "heldout", "validation")]
    assert [len(side) for side in sides] == [480, 240, 120]
    assert len(set.union(*sides)) == 840
    assert prompts_of("train_compared.txt") < sides[0]


@pytest.mark.parametrize("model", list(ARMS))
def test_every_recipe_is_one_that_the_verbs_take(model):
    group = Group(model, "clip", 3, {}, preparing=SETTINGS)
    for arm, _ in ARMS[model]:
        changes = of_rounds(arm, arm.changes) if arm.rounds > 1 else arm.changes
        asked = recipe_of(group, SCALES[model], arm.preparing | changes)
        recipe = Recipe.model_validate(asked | {"run_dir": "somewhere"})
        assert recipe.seed == 3 and recipe.train.threads == 1


def of_a_run(name: str, gain: float, distance: float, base: np.ndarray) -> dict:
    return {"name": name, "scores": (base + gain).tolist(), "mean": {"mean": distance}}


def test_methods_meet_at_equal_distance(tmp_path):
    """DPO gains 0.1 at each 1e-4; the other 0.2 at 2e-4 and 0.6 at 6e-4."""
    base = np.random.default_rng(0).normal(size=(4, 2))
    runs = [("DPO 150", 0.1, 1e-4), ("DPO 300", 0.3, 3e-4), ("DPO 600", 0.5, 5e-4)]
    runs += [("Curriculum-DPO 150", 0.2, 2e-4), ("Curriculum-DPO 300", 0.6, 6e-4)]
    rows = [of_a_run(*run, base) for run in runs]
    scorers = [
        {"scorer": scorer, "base_scores": base.tolist(), "runs": rows}
        for scorer in ("judge", "reward")
    ]
    measured = {"base": {"mean": 0.1}, "runs": rows}
    sets = [
        {"name": name, "scorers": scorers, "diversity": measured, "divergence": measured}
        for name in ("training", "held-out")
    ]
    path = results_path(Group("sd", "clip", 0, {}), tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"runs": rows, "prompt_sets": sets}))
    found = collect_curves(["sd"], [0, 1], tmp_path)
    assert {row["arm"] for row in found["points"]} == {"DPO", "Curriculum-DPO"}, "what is finished"
    assert len(found["equal_distance"]) == 4
    for row in found["equal_distance"]:
        assert (row["arm"], row["against"]) == ("Curriculum-DPO", "DPO")
        assert row["divergence"] == 5e-4, "the furthest that both have reached"
        assert row["plain_over_base"]["mean"] == pytest.approx(0.5)
        assert row["arm_over_base"]["mean"] == pytest.approx(0.5), "between 0.2 and 0.6"
        assert row["difference"]["mean"] == pytest.approx(0, abs=1e-9)
    assert draw_curves(found, tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.long
def test_an_arm_goes_on_through_its_marks(tmp_path, monkeypatch):
    """Real verbs: the second mark continues the first, which stays as it was; rounds that change
    nothing, and so are not kept, are left out.
    """
    still = {"train.optimizer.lr": 1e-30}
    arms = [Arm("DPO", {}, (1, 2)), Arm("rounds", still, (1,), rounds=2)]
    monkeypatch.setitem(SETTINGS, "prompts.limit", 2)
    result = json.loads(run_arms("sd", 1, arms, tmp_path).read_text())
    assert [run["name"] for run in result["runs"]] == ["DPO 1", "DPO 2"]
    folder = tmp_path / "sd-clip-seed1"
    tried = json.loads((folder / "rounds_2" / "rounds.json").read_text())
    assert [each["kept"] for each in tried] == [False, False]
    lines = [(folder / run / "metrics.jsonl").read_text() for run in ("DPO_1", "DPO_2")]
    assert lines[1].startswith(lines[0]) and lines[1] != lines[0]
    assert arms_of("sd", 1, ["DPO"]) == [arm for arm, _ in ARMS["sd"] if arm.name == "DPO"]
