"""The report, its words and results.json."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from cdpo.engine.basics.estimates import Estimate
from cdpo.engine.comparing.report import wording
from cdpo.engine.comparing.report.content import PromptSet, ReportData, ScorerResult
from cdpo.engine.comparing.report.figures import embed
from cdpo.engine.comparing.report.page import render_report, write_report
from cdpo.engine.comparing.report.results import save_results
from PIL import Image

Report = Callable[..., ReportData]


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render_report(report())


def test_report_is_self_contained_and_escaped(html, hostile):
    tags = Tags(html).found
    names = {name for name, _ in tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert not [key for _, attrs in tags for key in attrs if key.startswith("on")]
    images = [attrs for name, attrs in tags if name == "img"]
    assert images and all((attrs["src"] or "").startswith("data:image/") for attrs in images)
    assert all(attrs["alt"] and attrs["width"] for attrs in images)
    assert hostile not in html and "&lt;script&gt;document.title" in html
    fetched = re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", html)
    assert not [found for found in fetched if "=x" not in found]


def test_report_has_its_parts_in_order(html):
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Scores",
        "Training prompts",
        "Held-out prompts",
        "Worst losses",
        "Training",
        "Curriculum",
        "During training",
    ]
    assert html.index("<h1>") < html.index('class="verdict"') < html.index("<h2>")
    assert "The recipe, resolved" in html and "(−1)" in html


def test_report_of_almost_nothing():
    assert "Nothing was scored." in render_report(ReportData("empty", []))
    one = ScorerResult.from_scores("reward", "r", [[0.1]], {"tuned": [[0.2]]}, 10)
    html = render_report(ReportData("one", [PromptSet("training", ["p"], [one])]))
    assert "too few prompts" in html and "no interval" in html and "nan" not in html.lower()
    lost = ScorerResult.from_scores("judge", "j", [[math.nan]], {"tuned": [[0.2]]}, 10)
    html = render_report(ReportData("lost", [PromptSet("training", ["p"], [lost])]))
    assert "could not score any image pair" in html


def test_report_stays_small_and_pixelated_for_small_images(html, report):
    assert '<main class="pixelated">' in html
    assert '<main class="pixelated">' not in render_report(report(size=512))
    assert len(html) < 1_000_000


def test_written_whole(tmp_path, report):
    write_report(tmp_path / "report.html", report())
    assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def scored(scorer: str, shift: float, noise: float = 0.01) -> ReportData:
    generator = np.random.default_rng(0)
    base = generator.normal(0.3, 0.1, (40, 4))
    tuned = base + shift + generator.normal(0, noise, base.shape)
    result = ScorerResult.from_scores(scorer, "m", base, {"tuned": tuned}, 400)
    return ReportData("t", [PromptSet("training", ["p"] * 40, [result])])


def test_verdict_says_no_more_than_the_interval():
    better = wording.verdict(scored("judge", 0.03))
    assert re.fullmatch(
        r"The judge prefers the tuned model on training prompts: \+0\.0\d+ \[\+.*, \+.*\]\.",
        better,
    )
    assert "prefers the base model" in wording.verdict(scored("judge", -0.03))
    unclear = wording.verdict(scored("judge", 0.0, noise=0.1))
    assert "no clear difference" in unclear and "contains zero" in unclear
    assert wording.verdict(scored("reward", 0.03)).startswith("The reward it was trained on")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.031, 0.022, 0.040), "+0.031 [+0.022, +0.040]"),
        (Estimate(-1.2, -2.0, -0.5), "−1.20 [−2.00, −0.50]"),
        # A lower bound above zero may not be printed as zero.
        (Estimate(0.03, 0.0002, 0.06), "+0.0300 [+0.0002, +0.0600]"),
        (Estimate(0.1, math.nan, math.nan), "+0.1000 [no interval]"),
        (Estimate(0.0, 0.0, 0.0), "+0.0000 [+0.0000, +0.0000]"),
    ],
)
def test_intervals_in_words(estimate, text):
    assert wording.signed_interval(estimate) == text


def test_terminal_table_fits_80_columns(report):
    rows = wording.summary_rows(report())
    assert [row[:2] for row in rows] == [
        ("training", "judge"),
        ("training", "reward"),
        ("held-out", "judge"),
        ("held-out", "reward"),
    ]
    table = [wording.TABLE_COLUMNS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(wording.TABLE_COLUMNS))]
    assert sum(widths) + 2 * (len(widths) - 1) <= 80


def test_results_hold_the_numbers_of_the_report(tmp_path, report):
    data = report()
    save_results(tmp_path / "results.json", data)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["verdict"] == wording.verdict(data)
    assert results["outcome"] == "better"
    training = results["prompt_sets"][0]
    assert training["name"] == "training" and training["images_per_prompt"] == 4
    judge, summary = training["scorers"][0], data.prompt_sets[0].scorers[0].summary
    assert judge["difference"] == dataclasses.asdict(summary.difference)
    assert judge["num_dropped"] == 1 and judge["tuned_scores"][3][2] is None
    base, tuned = np.array(judge["base_scores"]), np.array(judge["tuned_scores"], float)
    assert np.nanmean(tuned - base) == pytest.approx(judge["difference"]["mean"])


def test_embedding_shrinks_and_keeps_pixels(picture):
    import base64
    import io

    def decode(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")

    small = embed(picture(32))
    assert np.array_equal(np.asarray(decode(small.uri)), np.asarray(picture(32)))
    large = embed(picture(1024))
    assert (large.width, large.height) == decode(large.uri).size == (256, 256)
    assert embed(picture(1024), largest=None).width == 1024
