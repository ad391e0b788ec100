"""The rows of README: what the demo's recipes gain as they ship; the LCM in other steps as well.

    python benchmarks/bench_demo.py

Each model and seed has candidates, pairs, training and comparison of its own, a thread each, so
that the numbers are no matter of how many cores there are. Two to eight minutes each on a CPU; what
is done is not done again. `--report` makes JSON and table of what is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cdpo.engine.basics.estimates import Estimate
from cdpo.engine.comparing.report.wording import bounds, percent_interval, signed
from cdpo.engine.recipe.reading import load_recipe
from measuring.provenance import provenance
from quality_bench.plan import RECIPES, shipped
from quality_bench.runs import VerbFailedError, import_the_engine, verb
from quality_bench.tables import interval

RESULTS = Path(__file__).parent / "results"
NAMES = {"sd": "SD", "lcm": "LCM"}
SETS = {"training": "training", "held-out": "held out"}
OTHER_STEPS = {"lcm": (1, 4)}
"""In which the same runs are compared once more."""
Row = dict[str, Any]


def run(model: str, seed: int, folder: Path) -> None:
    """Prepare, train, compare; VerbFailedError if one leaves with another code than 0."""
    recipe = shipped(model, {"seed": seed, "train.threads": 1})
    for name in ("prepare", "train", "compare"):
        verb(name, folder, recipe)
    for steps in OTHER_STEPS.get(model, ()):
        changed = {"compare.sampler.steps": steps, "compare.runs": {"tuned": str(folder)}}
        recipe = shipped(model, {"seed": seed, "train.threads": 1} | changed)
        verb("compare", folder / f"in_{steps}", recipe)


def rows_of(model: str, seed: int, folder: Path) -> Iterator[Row]:
    """Of the comparisons that are finished: a row for each number of steps, set of prompts and
    scorer, without single scores.
    """
    places = {_own_steps(model): folder}
    places |= {steps: folder / f"in_{steps}" for steps in OTHER_STEPS.get(model, ())}
    for steps, place in sorted(places.items()):
        path = place / "compare" / "results.json"
        if path.exists():
            rows = _rows(json.loads(path.read_text()))
            yield from ({"model": model, "seed": seed, "steps": steps, **row} for row in rows)


def _own_steps(model: str) -> int:
    steps: int = load_recipe(RECIPES[model]).compare.sampler.steps
    return steps


def _rows(result: Row) -> Iterator[Row]:
    for prompts in result["prompt_sets"]:
        for scorer in prompts["scorers"]:
            (tuned,) = scorer["runs"]
            yield {
                "prompts": prompts["name"],
                "scorer": scorer["scorer"],
                "images": tuned["num_pairs"],
                "base": scorer["base_mean"],
                **{key: tuned[key] for key in ("mean", "difference", "win_rate")},
                "divergence": prompts["divergence"]["runs"][0]["mean"]["mean"],
            }


def gains(rows: list[Row]) -> Iterator[str]:
    """A line of README's table for each model and set of prompts: the judge's gain by seed."""
    own_steps = {row["model"]: _own_steps(row["model"]) for row in rows}
    judged = [
        row for row in rows if row["scorer"] == "judge" and row["steps"] == own_steps[row["model"]]
    ]
    for model, prompts in dict.fromkeys((row["model"], row["prompts"]) for row in judged):
        own = [row for row in judged if (row["model"], row["prompts"]) == (model, prompts)]
        gained = (Estimate(**row["difference"]) for row in sorted(own, key=lambda row: row["seed"]))
        cells = (f"{signed(each.mean, 3)} {bounds(each, 3)}" for each in gained)
        yield f"| {NAMES.get(model, model)}, {SETS[prompts]} | {' | '.join(cells)} |"


def details(rows: list[Row]) -> Iterator[str]:
    """What docs/results.md says beside it, a line for each comparison and scorer."""
    for row in rows:
        place = f"{row['model']} {row['seed']}, {row['prompts']}, {row['scorer']}"
        place += f", {row['steps']} steps"
        means = f"{row['base']['mean']:.3f} → {row['mean']['mean']:.3f}"
        wins = percent_interval(Estimate(**row["win_rate"]))
        gain = interval(row["difference"])
        yield f"{place}: {means}: {gain}, wins {wins}, KL proxy {row['divergence']:.3g}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder of runs")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--out", type=Path, help="JSON; by default results/demo_DEVICE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a verb failed; what is finished is reported all the same."""
    options = parse(arguments)
    work, succeeded, rows = options.work.resolve(), True, list[Row]()
    if not options.report:
        import_the_engine()
    for model in options.models:
        for seed in options.seeds:
            folder = work / f"{model}-seed{seed}"
            try:
                if not options.report:
                    run(model, seed, folder)
            except VerbFailedError as error:
                print(error, file=sys.stderr, flush=True)
                succeeded = False
            rows += rows_of(model, seed, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or RESULTS / f"demo_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**provenance(device), "rows": rows}, indent=1) + "\n")
    print("\n".join([*gains(rows), *details(rows), str(out)]))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
