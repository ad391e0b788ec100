"""The quality benchmark: what it holds equal, how it adds up seeds, and all of it once, smaller."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_quality
import numpy as np
import pytest
from cdpo.engine.recipe import Recipe
from quality_bench.plan import METHODS, ROOT, Group, Scale, ablation_groups, main_groups, recipe_of
from quality_bench.results import collect
from quality_bench.runs import results_path

SCALE = Scale()


@pytest.mark.parametrize("model", ["sd", "lcm"])
@pytest.mark.parametrize("reward", ["clip", "colorfulness"])
def test_methods_differ_in_the_method_alone(model, reward):
    """Equal steps, pairs, learning rate and seed; every recipe is one that the verbs take."""
    [group] = main_groups([model], [reward], [7])
    recipes = {
        name: Recipe.model_validate(recipe_of(group, SCALE, changes) | {"run_dir": "somewhere"})
        for name, changes in group.methods.items()
    }
    assert list(recipes) == list(METHODS)
    base = recipes["Curriculum-DPO"]
    for recipe in recipes.values():
        assert recipe.seed == 7
        assert recipe.train == base.train and recipe.train.steps == SCALE.steps
        assert (recipe.data, recipe.reward, recipe.prepare) == (
            base.data,
            base.reward,
            base.prepare,
        )
        assert recipe.adapter.rank == base.adapter.rank
    same = {"objective", "adapter", "curriculum"}
    differing = {
        name: {part for part in same if getattr(recipe, part) != getattr(base, part)}
        for name, recipe in recipes.items()
    }
    assert differing == {
        "SFT": {"objective", "curriculum"},
        "DPO": {"curriculum"},
        "hard to easy": {"curriculum"},
        "Curriculum-DPO": set(),
        "Curriculum-DPO++": {"adapter"},
    }


def test_an_ablation_turns_one_knob_of_curriculum_or_plain_dpo(tmp_path):
    default = recipe_of(Group("sd", "clip", 0, {}), SCALE, {})
    knobs = set()
    for group in ablation_groups([0], SCALE):
        for name, changes in group.methods.items():
            recipe = recipe_of(group, SCALE, changes)
            Recipe.model_validate(recipe | {"run_dir": str(tmp_path)})
            changed = {
                f"{section}.{key}"
                for section, keys in recipe.items()
                if isinstance(keys, dict)
                for key in keys
                if keys[key] != default[section][key]
            }
            changed -= {"curriculum.order"} if name.startswith("DPO") else set()
            assert len(changed) == 1, (name, changed)
            knobs |= changed
    assert knobs == {
        "curriculum.tiers",
        "curriculum.steps_per_tier",
        "prepare.candidates_per_prompt",
        "objective.beta",
    }


def test_groups_that_share_images_are_in_one_chain():
    groups = [*main_groups(["sd", "lcm"], ["clip", "colorfulness"], [0, 1])]
    groups += ablation_groups([0], SCALE)
    chains = bench_quality.chains_of(groups)
    places = [{(group.model, group.seed) for group in chain} for chain in chains]
    assert all(len(place) == 1 for place in places)
    assert len(set.union(*places)) == len(chains) == 4
    assert sum(len(chain) for chain in chains) == len(groups)


def results(seed: int, methods: list[str]) -> dict:
    """A results.json of 5 prompts x 2 images: method number k is 0.1 k better than the base."""
    base = np.random.default_rng(seed).normal(size=(5, 2))
    estimate = {"mean": 0.1 * seed, "low": None, "high": None}
    named = [{"name": name, "mean": estimate} for name in methods]
    scorers = [
        {
            "scorer": scorer,
            "base_scores": base.tolist(),
            "runs": [
                {"name": name, "scores": (base + 0.1 * (number + 1)).tolist()}
                for number, name in enumerate(methods)
            ],
        }
        for scorer in ("judge", "reward")
    ]
    part = {"scorers": scorers, "diversity": {"base": estimate, "runs": named}}
    part["divergence"] = {"runs": named}
    sets = [{"name": name, **part} for name in ("training", "held-out")]
    return {"runs": named, "prompt_sets": sets}


def test_seeds_are_added_up(tmp_path):
    table = list(main_groups(["sd"], ["clip"], [0, 1, 2]))
    ablations = list(ablation_groups([0], SCALE))
    for group in [*table[:2], ablations[0]]:
        path = results_path(group, tmp_path)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(results(group.seed, list(group.methods))))
    found = collect(table, ablations, {"K": 15, "beta": 5000}, tmp_path)
    assert found["unfinished"] == sorted(g.name for g in [table[2], *ablations[1:]])
    rows = {(r["method"], r["prompts"], r["scorer"]): r for r in found["table"]}
    assert len(rows) == 6 * 2 * 2
    third = rows["hard to easy", "held-out", "judge"]
    assert third["seeds"] == [0, 1] and third["images"] == 20
    assert third["over_base"]["mean"] == pytest.approx(0.3)
    assert third["over_dpo"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert third["wins_over_base"]["mean"] == 1
    assert third["divergence"] == pytest.approx(0.05)
    both = [np.random.default_rng(seed).normal(size=(5, 2)) + 0.3 for seed in (0, 1)]
    assert third["mean"]["mean"] == pytest.approx(np.mean(both))
    assert third["of_seeds"] == pytest.approx({0: both[0].mean(), 1: both[1].mean()})
    ablated = {(r["knob"], r["value"]): r for r in found["ablations"] if r["scorer"] == "judge"}
    assert set(ablated) == {
        *(("K", k) for k in (5, 10, 15)),
        *(("beta", b) for b in (500, 2000, 5000, 20_000)),
    }
    assert ablated["K", 15]["seeds"] == [0], "the seeds of the ablations alone"


@pytest.mark.slow
@pytest.mark.long
def test_once_through_all_of_it(tmp_path):
    """Real verbs on the small world; what is finished can be reported without them."""
    out, work = tmp_path / "quality.json", tmp_path / "work"
    small = "--models sd --rewards colorfulness --seeds 1 --steps 2 --steps-per-tier 1 --prompts 2"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_quality.py"), *small.split()]
    command += ["--images", "2", "--jobs", "1", "--ablation-seeds"]
    command += ["--work", str(work), "--out", str(out)]

    def run(*more: str) -> str:
        env = os.environ | {"DS_ACCELERATOR": "cpu"}
        words = [*command, *more]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    text = run()
    for method in METHODS:
        assert method in text
    result = json.loads(out.read_text())
    assert not result["unfinished"] and not result["ablations"]
    assert {row["method"] for row in result["table"]} == {"base", *METHODS}
    assert result["scale"]["train.steps"] == 2
    assert (tmp_path / "quality_table.png").stat().st_size > 10_000
    folder = Path(work) / "sd-colorfulness-seed1"
    trained = {path.parent.name for path in folder.glob("*/lora")}
    assert trained == {name.replace(" ", "_") for name in METHODS}
    assert "train" not in run("--report").split("tuned minus base")[0]
    assert json.loads(out.read_text())["table"] == result["table"]
