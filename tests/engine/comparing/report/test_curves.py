"""Curves from any metrics a run may leave behind."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cdpo.engine.comparing.report.curves import (
    PANELS,
    column,
    smoothed,
    sorted_rows,
    spans,
    thinned,
    tier_intervals,
    tier_timeline,
    training_panels,
)

Metrics = Callable[..., list[dict[str, Any]]]


@pytest.mark.parametrize("steps", [1, 2, 50, 10_000])
def test_curves_of_any_length(metrics, steps):
    rows = metrics(steps)
    charts = [svg for _, svg in training_panels(rows)]
    assert len(charts) == len(PANELS)
    for svg in (*charts, tier_timeline(rows, 5)):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 100_000


def test_no_rows_and_rows_without_values():
    assert training_panels([]) == []
    ElementTree.fromstring(tier_timeline([], 3))
    broken = [{"step": 1, "loss": float("nan"), "margin": None}, {"step": 2, "loss": 0.5}]
    [(panel, svg)] = training_panels(broken)
    assert panel.title == "Loss"
    ElementTree.fromstring(svg)


def test_svg_is_the_same_every_time_and_follows_the_theme(metrics):
    rows = metrics(20)
    assert training_panels(rows) == training_panels(rows)
    assert "var(--chart-accent, #0969da)" in tier_timeline(rows)


def test_a_step_logged_twice_counts_once():
    rows = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert column(sorted_rows(rows), "loss").tolist() == [3.0, 2.0]


def test_smoothing_is_unbiased_and_blind_to_nan():
    values = np.full(400, 2.0)
    values[[0, 50, 51]] = np.nan
    result = smoothed(values)
    assert math.isnan(result[0])
    assert result[1:] == pytest.approx(np.full(399, 2.0))
    assert smoothed(np.array([5.0])) == pytest.approx([5.0])


def test_thinning_keeps_the_mean():
    steps = np.arange(1.0, 10_001.0)
    few_steps, few = thinned(steps, steps * 2)
    assert len(few) == 300
    assert few == pytest.approx(2 * few_steps)
    assert few_steps.mean() == pytest.approx(steps.mean(), rel=1e-3)
    gap = np.full(10_000, np.nan)
    assert np.isnan(thinned(steps, gap)[1]).all()


def test_spans_and_tier_intervals():
    tiers = [[1], [1], [1, 2], [2], [1]]
    rows = [{"step": 10 + i, "tiers": used} for i, used in enumerate(tiers)]
    assert [(s.value, s.start, s.end) for s in spans(rows, "tiers")] == [
        ([1], 10, 12),
        ([1, 2], 12, 13),
        ([2], 13, 14),
        ([1], 14, 15),
    ]
    assert tier_intervals(rows) == {1: [(10, 13), (14, 15)], 2: [(12, 14)]}
    assert spans([{"step": 1}], "tiers") == []
