"""Whatever is not used as it stands is counted by reason and named, a line each."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import preferences
import pytest
from cdpo.engine.recipe import Paired
from cdpo.engine.sources import open_source
from cdpo.engine.sources.index import open_index
from cdpo.engine.sources.left_out import COLUMNS, MAX_CELL, NAME, LeftOut, naming
from cdpo.engine.sources.records import HELD_OUT, NO_CAPTION, TIE


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_three_fates_are_counted_and_named(tmp_path):
    with naming(tmp_path / NAME) as left_out:
        left_out.leave_out("a.csv", "line 3", "ties", "label", 0.5)
        left_out.pass_over("a.csv", "", "another")
        left_out.remark("b.csv", "row 1", "first frame", "image", "of 9")
        left_out.leave_out("b.csv", "row 2", "damage")
    assert left_out.counts == {"ties": 1, "damage": 1, "another": 1, "first frame": 1}
    assert left_out.rows == {"damage": 1, "ties": 1}
    assert (tmp_path / NAME).read_text().splitlines() == [
        ",".join(COLUMNS),
        "a.csv,line 3,label,left out,ties,0.5",
        "a.csv,,,passed over,another,",
        "b.csv,row 1,image,used,first frame,of 9",
        "b.csv,row 2,,left out,damage,",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a,b", '"a,b"'),
        ("a\nb\u2028c\x1b", "a\\nb\\u2028c\\x1b"),
        ("half \ud83d", "half \\ud83d"),
        ("x" * 5000, "x" * (MAX_CELL - 1) + "…"),
    ],
)
def test_a_strangers_name_is_one_line(name, told):
    file = io.BytesIO()
    LeftOut(file).pass_over(name, "", "other")
    assert file.getvalue().decode() == f"{told},,,passed over,other,\n"


def test_the_rows_of_a_source_are_named_and_stay_so_with_the_index(tmp_path):
    rows = [preferences.judged(number) for number in range(12)]
    rows[3] = preferences.judged(3, caption=" ")
    path = preferences.write_parquet(tmp_path / "a.parquet", rows)
    spec = Paired(path=str(path))

    def index() -> list[tuple[str, ...]]:
        facts = open_index(tmp_path / "index", open_source(spec), spec, {rows[0].caption})
        assert facts.left_out == {HELD_OUT: 2, NO_CAPTION: 1, TIE: 2} and facts.rows == 12
        named = lines(tmp_path / "index" / NAME)
        return [tuple(line[name] for name in COLUMNS[:5]) for line in named]

    held_out = [("a.parquet", f"row {row}", "caption", "left out", HELD_OUT) for row in (0, 5)]
    ties = [("a.parquet", f"row {row}", "label_0", "left out", TIE) for row in (4, 9)]
    no_caption = ("a.parquet", "row 3", "caption", "left out", NO_CAPTION)
    expected = [held_out[0], no_caption, ties[0], held_out[1], ties[1]]
    assert index() == expected
    assert index() == expected
    (tmp_path / "index" / NAME).unlink()
    assert index() == expected
