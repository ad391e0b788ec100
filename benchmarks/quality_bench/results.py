"""From the comparisons of all groups to the tables of the quality benchmark.

The images of all seeds of a prompt stand in one row, so that the bootstrap is that of the report:
prompts are resampled, with all their images. What seeds do to a result stands in ``of_seeds``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cdpo.engine.basics.estimates import mean_estimate, paired_difference, win_rate
from numpy.typing import NDArray
from quality_bench.plan import DEFAULT, METHODS, PLAIN, Group
from quality_bench.runs import results_path

Row = dict[str, Any]
Results = Mapping[int, Row]  # results.json of a group, by seed
Scores = NDArray[np.float64]
BASE = "base"
SCORERS = ("judge", "reward")


def collect(table: list[Group], ablations: list[Group], defaults: Row, work: Path) -> Row:
    """Everything that is finished, and the names of groups that are not.

    ``defaults`` has the values of B, K, M and beta in the table.
    """
    read = {group.name: read_group(group, work) for group in [*table, *ablations]}
    return {
        "table": list(_table(table, read)),
        "ablations": list(_ablations(table, ablations, defaults, read)),
        "unfinished": sorted(name for name, found in read.items() if found is None),
    }


def read_group(group: Group, work: Path) -> Row | None:
    path = results_path(group, work)
    return json.loads(path.read_text()) if path.exists() else None


def _table(groups: list[Group], read: Mapping[str, Row | None]) -> Iterator[Row]:
    """A row for each model, reward, prompt set, scorer and method."""
    for model, reward in dict.fromkeys((group.model, group.reward) for group in groups):
        results = {
            group.seed: found
            for group in groups
            if (group.model, group.reward) == (model, reward)
            and (found := read[group.name]) is not None
        }
        for prompts, scorer in _places(results):
            for method in (BASE, *METHODS):
                row = _of_method(results, prompts, scorer, method)
                yield {"model": model, "reward": reward, **row}


def _of_method(results: Results, prompts: str, scorer: str, method: str) -> Row:
    base, own = (all_scores(results, prompts, scorer, name) for name in (BASE, method))
    row: Row = {
        "prompts": prompts,
        "scorer": scorer,
        "method": method,
        "seeds": sorted(results),
        "images": int(own.size),
        "mean": asdict(mean_estimate(own)),
        "of_seeds": {
            seed: float(np.nanmean(_scores(result, prompts, scorer, method)))
            for seed, result in sorted(results.items())
        },
    }
    if method != BASE:
        row["over_base"] = asdict(paired_difference(base, own))
        row["wins_over_base"] = asdict(win_rate(base, own))
        row["divergence"] = mean_of(results, prompts, "divergence", method)
    row["diversity"] = mean_of(results, prompts, "diversity", method)
    if method in METHODS and method != PLAIN and PLAIN in names(results):
        plain = all_scores(results, prompts, scorer, PLAIN)
        row["over_dpo"] = asdict(paired_difference(plain, own))
    return row


def _ablations(
    table: list[Group], ablations: list[Group], defaults: Row, read: Mapping[str, Row | None]
) -> Iterator[Row]:
    """A row for each knob's value, prompt set and scorer; the table has the default's."""
    found: dict[tuple[str, float, str], dict[int, Row]] = {}
    seeds = {group.seed for group in ablations}
    for group in [*ablations, *table]:
        result = read[group.name]
        if result is None or group.seed not in seeds:
            continue
        if group in ablations:
            for method in group.methods:
                knob, _, value = method.partition(" ")
                found.setdefault((knob, float(value), method), {})[group.seed] = result
        elif (group.model, group.reward) == ("sd", "clip"):
            for knob, value in defaults.items():
                method = PLAIN if knob.startswith(PLAIN) else DEFAULT
                found.setdefault((knob, float(value), method), {})[group.seed] = result
    for (knob, number, method), results in sorted(found.items()):
        for prompts, scorer in _places(results):
            row = _of_method(results, prompts, scorer, method)
            yield {"knob": knob, "value": number, **row}


def _places(results: Results) -> Iterator[tuple[str, str]]:
    """Prompt sets and scorers, of which all groups have the same."""
    for result in list(results.values())[:1]:
        for part in result["prompt_sets"]:
            yield from ((part["name"], scorer) for scorer in SCORERS)


def names(results: Results) -> list[str]:
    return [run["name"] for run in next(iter(results.values()))["runs"]]


def all_scores(results: Results, prompts: str, scorer: str, method: str) -> Scores:
    """(prompts, images of all seeds)."""
    return np.concatenate(
        [_scores(result, prompts, scorer, method) for _, result in sorted(results.items())], axis=1
    )


def _scores(result: Row, prompts: str, scorer: str, method: str) -> Scores:
    """(prompts, images) of a model in a group's results.json; NaN where a scorer failed."""
    table = _named(_part(result, prompts)["scorers"], scorer, key="scorer")
    scores = table["base_scores"] if method == BASE else _named(table["runs"], method)["scores"]
    return np.asarray(scores, dtype=np.float64)


def mean_of(results: Results, prompts: str, measure: str, method: str) -> float | None:
    """The mean over seeds of diversity or divergence; None where it was not measured."""
    found = []
    for result in results.values():
        measured = _part(result, prompts)[measure]
        if measured is None:
            return None
        own = measured["base"] if method == BASE else _named(measured["runs"], method)["mean"]
        found.append(own["mean"])
    return float(np.mean(found))


def _part(result: Row, prompts: str) -> Row:
    return _named(result["prompt_sets"], prompts)


def _named(rows: list[Row], name: str, key: str = "name") -> Row:
    return next(row for row in rows if row[key] == name)
