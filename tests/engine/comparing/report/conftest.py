"""Synthetic pictures, metrics and comparisons: small, seeded, nothing read from disk."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cdpo.engine.basics.estimates import mean_estimate, worst_pairs
from cdpo.engine.comparing.report.content import (
    Diversity,
    PromptSample,
    PromptSet,
    ReportData,
    RunFacts,
    ScorerResult,
    SharedSeed,
    WorstLoss,
)
from pictures import draw_picture

HOSTILE = (
    "<script>document.title = 'pwned'</script>"
    "<img src=x onerror=\"document.title = 'pwned'\">'\"><svg onload=alert(1)>"
)
LONG_WORD = "a" + "very" * 40 + "longword"


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
            ScorerResult.from_scores(scorer, f"models/{scorer}", base, {"tuned": tuned}, 500)
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


def make_methods(
    reward: float = 0.03, judge: float = 0.0, distance: float = 0.3, size: int = 32
) -> ReportData:
    """Two runs: `plain $x$` is like base, the other, of a hostile name, is shifted as asked: its
    scores by ``reward`` and ``judge``, the distance of its images from base's 0.3 to ``distance``.
    """
    generator = np.random.default_rng(2)
    prompts = [HOSTILE, f"a {LONG_WORD}", *(f"prompt {i}" for i in range(18))]
    names, sets = ("plain $x$", HOSTILE), []
    for name in ("training", "held-out"):
        base = generator.normal(0.28, 0.05, (20, 3))
        noise = generator.normal(0, 0.01, (2, *base.shape))
        scorers = [
            ScorerResult.from_scores(
                scorer,
                f"clip_score models/{scorer}",
                base,
                {names[0]: base + noise[0], names[1]: base + noise[1] + shift},
                resamples=300,
            )
            for scorer, shift in (("judge", judge), ("reward", reward))
        ]
        sides = dict(zip(("base", *names), (0.3, 0.3, distance), strict=True))
        spread = {side: mean + generator.normal(0, 0.02, 20) for side, mean in sides.items()}
        rows = [
            SharedSeed(p, {s: draw_picture(size, i) for s in sides}, dict.fromkeys(sides, 0.5))
            for i, p in enumerate(prompts[:4])
        ]
        drift = {run: mean_estimate(generator.uniform(0, 0.1, (20, 3)), 300) for run in names}
        sets.append(
            PromptSet(
                name,
                prompts,
                scorers,
                rows=rows,
                diversity=Diversity.from_distances("judge", spread, 300),
                divergence=drift,
            )
        )
    worst = [WorstLoss(HOSTILE, "training", draw_picture(size), draw_picture(size), 1, 0, HOSTILE)]
    return ReportData(
        title="methods",
        prompt_sets=sets,
        worst=worst,
        recipe="seed: 0",
        notes=[f"Left out: {HOSTILE}"],
        runs=[
            RunFacts(name, f"runs/{name}", {"objective.beta": 5000.0, "curriculum.order": "random"})
            for name in names
        ],
    )


@pytest.fixture
def methods() -> Callable[..., ReportData]:
    return make_methods


@pytest.fixture
def metrics() -> Callable[..., list[dict[str, Any]]]:
    return make_metrics


@pytest.fixture(scope="session")
def report() -> Callable[..., ReportData]:
    return make_report


@pytest.fixture
def hostile() -> str:
    return HOSTILE
