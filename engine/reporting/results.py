"""results.json: the numbers of the report, for scripts.

Keys (format 1)::

    format              1
    title, verdict      as in the report
    outcome             "better" | "worse" | "unclear": first prompt set, first scorer
    base, tuned         names of the two models
    facts               {name: value}
    prompt_sets[]
      name              "training" | "held-out"
      num_prompts, images_per_prompt
      prompts           the prompts, in the row order of the scores
      scorers[]
        scorer          "judge" | "reward"
        model           type, and folder or hub id, of its reward
        base_mean, tuned_mean, difference, win_rate
                        {"mean", "low", "high"}; 95% bootstrap over prompts;
                        difference is tuned - base, win_rate counts ties half
        num_prompts, num_pairs, num_dropped
        base_scores, tuned_scores
                        (prompts, images) lists; null where the scorer failed
    worst[]             prompt, prompt_set, base_score, tuned_score; worst first

A number that does not exist (no interval from one prompt) is null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .files import write_atomically
from .report_data import PromptSet, ReportData, ScorerResult
from .stats import Estimate
from .wording import outcome, verdict


def save_results(path: Path | str, data: ReportData) -> None:
    """Write results.json, under its name only when complete."""
    text = json.dumps(results_dict(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write((text + "\n").encode()))


def results_dict(data: ReportData) -> dict[str, Any]:
    """The content of results.json."""
    first = next((s for p in data.prompt_sets for s in p.scorers), None)
    return {
        "format": 1,
        "title": data.title,
        "verdict": verdict(data),
        "outcome": outcome(first.summary.difference) if first else "unclear",
        "base": data.base_name,
        "tuned": data.tuned_name,
        "facts": dict(data.facts),
        "prompt_sets": [_prompt_set(prompt_set) for prompt_set in data.prompt_sets],
        "worst": [
            {
                "prompt": loss.prompt,
                "prompt_set": loss.prompt_set,
                "base_score": _finite(loss.base_score),
                "tuned_score": _finite(loss.tuned_score),
            }
            for loss in data.worst
        ],
    }


def _prompt_set(prompt_set: PromptSet) -> dict[str, Any]:
    shapes = [result.base_scores.shape for result in prompt_set.scorers]
    return {
        "name": prompt_set.name,
        "num_prompts": len(prompt_set.prompts),
        "images_per_prompt": shapes[0][1] if shapes else 0,
        "prompts": list(prompt_set.prompts),
        "scorers": [_scorer(result) for result in prompt_set.scorers],
    }


def _scorer(result: ScorerResult) -> dict[str, Any]:
    summary = result.summary
    return {
        "scorer": result.scorer,
        "model": result.model,
        "base_mean": _estimate(summary.base),
        "tuned_mean": _estimate(summary.tuned),
        "difference": _estimate(summary.difference),
        "win_rate": _estimate(summary.win_rate),
        "num_prompts": summary.num_prompts,
        "num_pairs": summary.num_pairs,
        "num_dropped": summary.num_dropped,
        "base_scores": [[_finite(score) for score in row] for row in result.base_scores],
        "tuned_scores": [[_finite(score) for score in row] for row in result.tuned_scores],
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: _finite(getattr(estimate, name)) for name in ("mean", "low", "high")}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
