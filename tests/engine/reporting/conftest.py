"""Synthetic pictures, metrics and comparisons: small, seeded, nothing read from disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cdpo.engine.reporting.report_data import (
    PromptSample,
    PromptSet,
    ReportData,
    ScorerResult,
    WorstLoss,
)
from cdpo.engine.reporting.stats import worst_pairs
from PIL import Image, ImageDraw

HOSTILE = (
    "<script>document.title = 'pwned'</script>"
    "<img src=x onerror=\"document.title = 'pwned'\">'\"><svg onload=alert(1)>"
)
LONG_WORD = "a" + "very" * 40 + "longword"


def draw_picture(size: int = 32, hue: int = 0) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    color = f"hsl({hue * 47 % 360}, 70%, 50%)"
    ImageDraw.Draw(image).ellipse((size // 8, size // 8, size - size // 8, size // 2), fill=color)
    return image


def make_metrics(steps: int = 50, stages: int = 5) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index in range(steps):
        share, noise = index / steps, generator.normal(0, 0.02, 4)
        stage = 1 + index * stages // steps
        quartiles = {
            f"{side}_error_q{q}": None if q == 4 and index % 3 else sign * 1e-4 * share
            for side, sign in (("winner", -1), ("loser", 1))
            for q in range(1, 5)
        }
        rows.append(
            {
                "step": index + 1,
                "loss": math.log(2) - 0.1 * share + noise[0],
                "margin": 0.3 * share + noise[1],
                "accuracy": 0.5 + 0.2 * share + noise[2],
                "winner_error": -1e-4 * share,
                "loser_error": 1e-4 * share,
                "grad_norm": 1 + abs(noise[3]),
                "stage": stage,
                "tiers": list(range(1, stage + 1)),
                **quartiles,
            }
        )
    return rows


def make_report(
    shift: float = 0.03, size: int = 32, num_prompts: int = 30, judge: bool = True
) -> ReportData:
    generator = np.random.default_rng(1)
    prompts = [HOSTILE, f"a {LONG_WORD}", *(f"prompt {i}" for i in range(num_prompts - 2))]
    sets, worst = [], []
    for name, gain in (("training", shift), ("held-out", 0.0)):
        base = generator.normal(0.28, 0.05, (num_prompts, 4))
        tuned = base + gain + generator.normal(0, 0.04, base.shape)
        tuned[3, 2] = np.nan
        scorers = [
            ScorerResult.from_scores(scorer, f"models/{scorer}", base, tuned, resamples=500)
            for scorer in ("judge", "reward")[0 if judge else 1 :]
        ]
        samples = [
            PromptSample(
                prompts[i],
                [draw_picture(size, i + j) for j in range(4)],
                [draw_picture(size, i + j + 1) for j in range(4)],
                base[i],
                tuned[i],
            )
            for i in range(4)
        ]
        sets.append(PromptSet(name, prompts, scorers, samples))
        worst += [
            WorstLoss(prompts[p], name, draw_picture(size), draw_picture(size), b, t)
            for p, n in worst_pairs(base, tuned, 3)
            for b, t in [(base[p, n], tuned[p, n])]
        ]
    return ReportData(
        title="emoji_cdpo",
        prompt_sets=sets,
        worst=worst,
        metrics=make_metrics(),
        num_tiers=5,
        progression=draw_picture(1500),
        recipe="seed: 0\nnote: " + "long " * 100 + HOSTILE,
        facts=[("torch", "2.13.0"), ("device", HOSTILE)],
    )


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return draw_picture


@pytest.fixture
def metrics() -> Callable[..., list[dict[str, Any]]]:
    return make_metrics


@pytest.fixture
def report() -> Callable[..., ReportData]:
    return make_report


@pytest.fixture
def hostile() -> str:
    return HOSTILE
