"""Several runs in one report: tables, charts, findings, words and results.json."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
from cdpo.engine.basics.estimates import Estimate
from cdpo.engine.comparing.report import wording
from cdpo.engine.comparing.report.content import ReportData, ScorerResult
from cdpo.engine.comparing.report.findings import findings
from cdpo.engine.comparing.report.methods import (
    diversity_chart,
    drift_chart,
    method_tables,
    round_panels,
    win_tables,
)
from cdpo.engine.comparing.report.page import render_report
from cdpo.engine.comparing.report.results import save_results

Methods = Callable[..., ReportData]


def test_parts_in_order_and_escaped(methods, hostile):
    html = render_report(methods(distance=0.1))
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Methods",
        "Drift and diversity",
        "Win rates",
        "Training prompts",
        "Held-out prompts",
        "Worst losses",
        "Runs",
    ]
    assert hostile not in html and "<script" not in html and "&lt;script&gt;" in html
    assert html.count("<svg") == 2 * 3  # a chart a scorer and one of diversity, a prompt set
    assert html.count('<p class="finding">') == 2
    assert 'alt="plain $x$ image for: prompt 0"' in html


def test_the_gain_by_round_is_drawn_of_runs_that_are_sums_of_rounds(methods):
    """A chart a scorer and prompt set; the second of three rounds was not kept."""
    data = methods()
    assert round_panels(data) == []
    runs = [replace(run, rounds=[1, 3][: at + 1]) for at, run in enumerate(data.runs[:2])]
    panels = round_panels(replace(data, runs=runs))
    assert len(panels) == sum(len(prompt_set.scorers) for prompt_set in data.prompt_sets)
    assert panels[0]["title"] == f"{data.prompt_sets[0].scorers[0].scorer}: gain by round"
    text = "".join(ElementTree.fromstring(panels[0]["svg"]).itertext())
    assert "round" in text and "minus base" in text
    assert "<h2>Gain by round</h2>" in render_report(replace(data, runs=runs))
    assert round_panels(replace(data, runs=runs[:1])) == []


def test_one_run_shows_the_same_charts(report, methods, hostile):
    data, sets = report(), methods().prompt_sets
    diversity = sets[0].diversity
    assert diversity is not None
    renamed = replace(
        diversity,
        estimates={"base": diversity.estimates["base"], "tuned": diversity.estimates[hostile]},
        changes={"tuned": diversity.changes[hostile]},
    )
    measured = replace(data.prompt_sets[0], diversity=renamed, divergence={"tuned": SOME})
    html = render_report(replace(data, prompt_sets=[measured, data.prompt_sets[1]]))
    assert "Drift and diversity" in html and "<h2>Scores</h2>" in html
    assert "<h2>Methods</h2>" not in html and "<h2>Win rates</h2>" not in html


SOME = Estimate(0.02, 0.01, 0.04)


def test_charts_are_whole_and_name_every_model(methods, hostile):
    training = methods().prompt_sets[0]
    assert training.diversity is not None
    for svg in (
        drift_chart(training, training.scorers[0], "base"),
        diversity_chart(training.diversity),
    ):
        text = "".join(ElementTree.fromstring(svg).itertext())
        assert all(
            name in text for name in ("base", "plain $x$", hostile[:10] + "…" + hostile[-11:])
        )


def test_long_names_that_differ_at_their_ends_are_told_apart(methods):
    names = [f"Curriculum-DPO++ with rank 64, beta {beta}" for beta in (500, 1000)]
    training = methods().prompt_sets[0]
    summaries = dict(zip(names, training.scorers[0].summaries.values(), strict=True))
    result = replace(training.scorers[0], summaries=summaries)
    drift = dict(zip(names, training.divergence.values(), strict=True))
    svg = drift_chart(replace(training, divergence=drift), result, "base")
    shown = [text for text in ElementTree.fromstring(svg).itertext() if text.startswith("Curr")]
    assert len(set(shown)) == 2 and [text[-4:] for text in shown] == [" 500", "1000"]


def test_a_chart_without_intervals(methods, hostile):
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    point = Estimate(0.1, float("nan"), float("nan"))
    training = replace(methods().prompt_sets[0], divergence={hostile: nothing, "plain $x$": point})
    assert drift_chart(training, training.scorers[0], "base").startswith("<svg")


def test_the_tables_say_what_was_measured(methods, hostile):
    data = methods(judge=-0.05)
    training, *_ = method_tables(data)
    assert [row["name"] for row in training["rows"]] == ["base", "plain $x$", hostile]
    judge, reward = training["rows"][2]["cells"]
    assert (judge["outcome"], reward["outcome"]) == ("worse", "better")
    wins = win_tables(data)[0]
    cell, mirrored = wins["rows"][0][2], wins["rows"][2][0]
    assert (cell["side"], mirrored["side"]) == ("above", "below")
    assert float(cell["value"][:-1]) + float(mirrored["value"][:-1]) == pytest.approx(100, abs=0.11)


def test_a_pair_that_any_run_lacks_is_counted(methods, hostile):
    training = methods().prompt_sets[0]
    judge = training.scorers[0]
    scores = {**judge.scores, hostile: judge.scores[hostile].copy()}
    scores[hostile][0, :2] = np.nan
    lacking = ScorerResult.from_scores("judge", judge.model, judge.base_scores, scores, 100)
    sets = [replace(training, scorers=[lacking])]
    [table] = method_tables(replace(methods(), prompt_sets=sets))
    assert table["size"] == "20 × 3 (−2)"


def test_the_terminal_has_a_row_a_method(methods, hostile):
    data = methods()
    rows = wording.summary_rows(data)
    assert [row[:2] for row in rows[:3]] == [
        ("training", "base"),
        ("training", "plain $x$"),
        ("training", hostile),
    ]
    assert {len(row) for row in rows} == {len(wording.table_columns(data))}


@pytest.mark.parametrize(
    ("shifts", "kinds"),
    [
        ({}, set()),
        ({"distance": 0.26}, set()),  # 13 % less
        ({"distance": 0.2}, {"collapse"}),
        ({"distance": 0.5}, set()),
        ({"reward": 0.05, "judge": -0.05}, {"reward hacking"}),
        ({"reward": -0.05, "judge": -0.05}, set()),  # worse all round is no hacking
        ({"reward": 0.05, "judge": 0.05}, set()),
    ],
)
def test_findings(methods, hostile, shifts, kinds):
    found = findings(methods(**shifts))
    assert {finding.kind for finding in found} == kinds
    assert {finding.run for finding in found} <= {hostile}


def test_a_fall_within_its_interval_is_no_collapse(methods, hostile):
    data = methods(distance=0.1)
    training = data.prompt_sets[0]
    assert training.diversity is not None
    wide = {**training.diversity.changes, hostile: Estimate(-0.2, -0.5, 0.1)}
    unsure = replace(training, diversity=replace(training.diversity, changes=wide))
    assert findings(replace(data, prompt_sets=[unsure])) == []


def test_unlearning_is_told_of_its_run(methods):
    data = methods()
    runs = [data.runs[0], replace(data.runs[1], both_errors_rose=True)]
    [finding] = findings(replace(data, runs=runs))
    assert finding.kind == "unlearning" and finding.run == data.runs[1].name


def test_the_verdict_names_who_is_first(methods, hostile):
    better = wording.verdict(methods(judge=0.05))
    assert better.startswith(f"The judge puts {hostile} first on training prompts: +0.0")
    assert better.endswith("clearly better than base: 1 of 2 runs.")
    worse = wording.verdict(methods(judge=-0.05))
    assert "none of 2 runs clearly better than base" in worse and "plain $x$ comes first" in worse


def test_results_of_several_runs(methods, hostile, tmp_path):
    data = methods(distance=0.1)
    changed = "after step 4: objective.beta 5000.0 -> 2000.0"
    data.runs[1] = replace(data.runs[1], changes=[changed])
    save_results(tmp_path / "results.json", data)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["format"] == 2
    assert [run["changes"] for run in results["runs"]] == [[], [changed]]
    assert [run["name"] for run in results["runs"]] == ["plain $x$", hostile]
    assert results["runs"][0]["method"] == {"objective.beta": 5000, "curriculum.order": "random"}
    assert [finding["kind"] for finding in results["findings"]] == ["collapse", "collapse"]
    training, result = results["prompt_sets"][0], data.prompt_sets[0].scorers[1]
    reward = training["scorers"][1]
    assert "tuned_mean" not in reward and "tuned_scores" not in reward
    base, tuned = np.array(reward["base_scores"]), np.array(reward["runs"][1]["scores"])
    assert reward["base_mean"]["mean"] == pytest.approx(base.mean())
    assert reward["runs"][1]["difference"]["mean"] == pytest.approx((tuned - base).mean())
    matrix = reward["win_rates"]["matrix"]
    assert reward["win_rates"]["models"] == ["base", "plain $x$", hostile]
    assert matrix[2][0] == pytest.approx(asdict(result.summaries[hostile].win_rate))
    diversity = training["diversity"]
    assert diversity["embedder"] == "judge" and diversity["runs"][1]["change"]["high"] < 0
    assert training["divergence"]["runs"][1]["name"] == hostile


def test_results_of_one_run_keep_the_keys_of_format_1(report, tmp_path):
    save_results(tmp_path / "results.json", report())
    results = json.loads((tmp_path / "results.json").read_text())
    scorer = results["prompt_sets"][0]["scorers"][0]
    [run] = scorer["runs"]
    assert run["name"] == "tuned" and run["mean"] == scorer["tuned_mean"]
    assert run["scores"] == scorer["tuned_scores"] and run["win_rate"] == scorer["win_rate"]
    assert results["prompt_sets"][0]["diversity"] is None
