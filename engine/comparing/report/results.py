"""results.json: the numbers of the report, for scripts.

Keys (format 2)::

    format              2
    title, verdict      as in the report
    outcome             "better" | "worse" | "unclear": first prompt set, scorer and run
    base, tuned         names of the base and of the first run
    facts               {name: value}
    notes[]             what was left out, in sentences
    findings[]          kind ("collapse" | "reward hacking" | "unlearning"), run, prompt_set (null
                        for "unlearning"), text
    runs[]
      name, run_dir
      method            {dotted key of its recipe: value}, e.g. objective.beta, curriculum.order
      both_errors_rose  whether training ended above the reference on winners and losers
      changes           what was changed in the middle of it, in words
      rounds            numbers of the rounds that it is the sum of; none of one train
    prompt_sets[]
      name              "training" | "held-out"
      num_prompts, images_per_prompt
      prompts           the prompts, in the row order of the scores
      scorers[]
        scorer          "judge" | "reward" | another's name
        model           type and folder or hub id
        base_mean       an estimate, as all that follow: {"mean", "low", "high"}; 95% bootstrap
                        over prompts
        base_scores     (prompts, images) lists; null where the scorer failed
        runs[]          in the order above
          name
          mean, difference, win_rate
                        difference is run - base, win_rate counts ties half
          num_prompts, num_pairs, num_dropped
          scores        (prompts, images) lists
        win_rates       models: base, then the runs; matrix[i][j]: estimate of how often model i
                        scores higher than model j
        tuned_mean, difference, win_rate, num_prompts, num_pairs, num_dropped, tuned_scores
                        of format 1, only where one run is compared: what runs[0] says
      diversity         null, or embedder, base (an estimate) and runs[]: name, mean (an estimate),
                        change (an estimate of run - base)
      divergence        null, or runs[]: name, mean (an estimate of the KL proxy)
    worst[]             prompt, prompt_set, run, base_score, tuned_score; worst first

A number that does not exist (no interval from one prompt) is null. Format 1 had no notes, findings,
runs, win_rates, diversity and divergence.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...basics.estimates import Estimate, or_null
from ...basics.files import replacing
from .content import Diversity, PromptSet, ReportData, ScorerResult
from .findings import findings
from .wording import outcome, verdict


def save_results(path: Path | str, data: ReportData) -> None:
    """Write results.json, under its name only when complete."""
    text = json.dumps(results_dict(data), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path, error=None) as file:
        file.write((text + "\n").encode())


def results_dict(data: ReportData) -> dict[str, Any]:
    """The content of results.json."""
    first = next((s for p in data.prompt_sets for s in p.scorers), None)
    return {
        "format": 2,
        "title": data.title,
        "verdict": verdict(data),
        "outcome": outcome(first.summary.difference) if first else "unclear",
        "base": data.base_name,
        "tuned": data.tuned_name,
        "facts": dict(data.facts),
        "notes": list(data.notes),
        "findings": [asdict(finding) for finding in findings(data)],
        "runs": [asdict(run) for run in data.runs],
        "prompt_sets": [_prompt_set(prompt_set, data) for prompt_set in data.prompt_sets],
        "worst": [
            {
                "prompt": loss.prompt,
                "prompt_set": loss.prompt_set,
                "run": loss.run,
                "base_score": or_null(loss.base_score),
                "tuned_score": or_null(loss.tuned_score),
            }
            for loss in data.worst
        ],
    }


def _prompt_set(prompt_set: PromptSet, data: ReportData) -> dict[str, Any]:
    shapes = [result.base_scores.shape for result in prompt_set.scorers]
    return {
        "name": prompt_set.name,
        "num_prompts": len(prompt_set.prompts),
        "images_per_prompt": shapes[0][1] if shapes else 0,
        "prompts": list(prompt_set.prompts),
        "scorers": [_scorer(result, data) for result in prompt_set.scorers],
        "diversity": _diversity(prompt_set.diversity),
        "divergence": {
            "runs": [
                {"name": name, "mean": _estimate(mean)}
                for name, mean in prompt_set.divergence.items()
            ]
        }
        if prompt_set.divergence
        else None,
    }


def _scorer(result: ScorerResult, data: ReportData) -> dict[str, Any]:
    runs = [_run(result, name) for name in result.scores]
    alone: dict[str, Any] = {}
    if len(runs) == 1:
        renamed = {"mean": "tuned_mean", "scores": "tuned_scores"}
        alone = {renamed.get(key, key): value for key, value in runs[0].items() if key != "name"}
    return {
        "scorer": result.scorer,
        "model": result.model,
        "base_mean": _estimate(result.base),
        "base_scores": _table(result.base_scores),
        "runs": runs,
        "win_rates": {
            "models": [data.base_name, *result.scores],
            "matrix": [[_estimate(cell) for cell in row] for row in result.win_rates],
        },
        **alone,
    }


def _run(result: ScorerResult, name: str) -> dict[str, Any]:
    summary = result.summaries[name]
    return {
        "name": name,
        "mean": _estimate(summary.tuned),
        "difference": _estimate(summary.difference),
        "win_rate": _estimate(summary.win_rate),
        "num_prompts": summary.num_prompts,
        "num_pairs": summary.num_pairs,
        "num_dropped": summary.num_dropped,
        "scores": _table(result.scores[name]),
    }


def _diversity(diversity: Diversity | None) -> dict[str, Any] | None:
    if diversity is None:
        return None
    base, *runs = diversity.estimates
    return {
        "embedder": diversity.embedder,
        "base": _estimate(diversity.estimates[base]),
        "runs": [
            {
                "name": name,
                "mean": _estimate(diversity.estimates[name]),
                "change": _estimate(diversity.changes[name]),
            }
            for name in runs
        ],
    }


def _table(scores: NDArray[np.float64]) -> list[list[float | None]]:
    return [[or_null(score) for score in row] for row in scores]


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: or_null(getattr(estimate, name)) for name in ("mean", "low", "high")}
