"""CSV, TSV and JSON come back as they were written, or are refused by the line an editor shows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.recipe import Prompts, Ranked
from cdpo.engine.sources import open_source
from cdpo.engine.sources.index import Index, open_index
from cdpo.engine.sources.left_out import LeftOut
from cdpo.engine.sources.prompts import BLANK, COMMENT, EMPTY, REPEATED, read_prompts
from cdpo.engine.sources.text_tables import CHUNK, MAX_LINE, SWALLOWED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

KINDS = ["csv", "tsv", "jsonl", "json"]


def written(
    path: Path, columns: list[str], rows: list[list[Any]], mark: str = "", **how: Any
) -> Path:
    """A table by Python's own writers, of the form that the name of the file says."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        buffer = io.StringIO(newline="")
        table = csv.writer(buffer, delimiter=mark or {"csv": ",", "tsv": "\t"}[kind], **how)
        table.writerows([columns, *rows])
        text = buffer.getvalue()
    else:
        entries = [dict(zip(columns, row, strict=True)) for row in rows]
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        text = json.dumps(entries, indent=1) if kind == "json" else "".join(lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def values(path: Path, left_out: LeftOut | None = None, **spec: Any) -> list[dict[str, Any]]:
    """All rows of a table, with the line of each as `where`."""
    reader = open_source(Ranked(path=str(path), score=None, **spec))
    found = reader.rows(0, reader.columns(), left_out or LeftOut())
    return [{**row.values, "where": row.where} for rows in found for row in rows]


def refused_at(path: Path, where: str, kind: str, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with refused(DataError, kind, f"{path} {where}".strip()) as caught:
        values(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --------------------------------------------------------------------------------------------------
# What was written comes back

AWKWARD = st.sampled_from('",;\t\n\r\\ #a')
OTHERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
CELLS = st.text(st.one_of(AWKWARD, OTHERS), max_size=8)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*KINDS, "csv.gz", "JSONL"]),
    rows=st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=6),
    mark=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_table_comes_back_and_every_row_is_used_or_left_out(
    tmp_path, kind, rows, mark, end, bom, quoting
):
    path, columns = tmp_path / f"table.{kind}", ["caption", "image", "note"]
    if "sv" in kind:
        # Blanks behind a delimiter are no part of a cell that is not quoted.
        rows = [[cell.lstrip(" ") for cell in row] for row in rows]
    if end == "\n" and quoting == csv.QUOTE_MINIMAL:  # Python leaves CR unquoted there
        rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    for row in rows:
        row[1] = "x.png"
    how = {"mark": mark, "lineterminator": end, "quoting": quoting} if kind == "csv" else {}
    written(path, columns, rows, **how)
    if bom and not kind.endswith("gz"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = values(path)
    assert [[row[name] for name in columns] for row in found] == rows
    if rows:
        spec = Ranked(path=str(path), score=None)
        try:
            facts = open_index(tmp_path / "index", open_source(spec), spec, ())
        except DataError as error:
            assert error.kind == "empty"
            return
        used = len(Index(tmp_path / "index", facts))
        assert used + sum(facts.left_out.values()) == facts.rows == len(rows)


def test_rows_are_named_by_the_line_they_begin_in(tmp_path):
    (tmp_path / "a.csv").write_text('caption,image\n\n"two\nlines",a\r\nnext,b\n\nlast,c')
    assert [row["where"] for row in values(tmp_path / "a.csv")] == ["line 3", "line 5", "line 7"]
    (tmp_path / "a.jsonl").write_text(
        '\n{"image":"a","caption":"x"}\n\n{"image":"b","caption":"y"}'
    )
    assert [row["where"] for row in values(tmp_path / "a.jsonl")] == ["line 2", "line 4"]
    (tmp_path / "a.json").write_text('[\n{"image":"a",\n"caption":1},\n{"caption":2,"image":"b"}]')
    found = [row["where"] for row in values(tmp_path / "a.json")]
    assert found == ["entry 1 (line 2)", "entry 2 (line 4)"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_read_in_parts(tmp_path, indent):
    """On one line or on many, with entries that no part holds whole."""
    entries = [{"image": "x" * (17 * number), "caption": "é\n"} for number in range(240)]
    entries[7]["caption"] = "x" * (3 * CHUNK)
    text = json.dumps(entries, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = values(tmp_path / "a.json")
    assert [{name: row[name] for name in ("image", "caption")} for row in found] == entries
    lines = {row["where"].partition("(")[2] for row in found}
    assert len(lines) == (len(entries) if indent else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.{}", "a.{}.gz", "A.{}"])
def test_endings_in_capitals_and_gzipped(tmp_path, kind, name):
    name = name.format(kind if name[0] == "a" else kind.upper())
    path = written(tmp_path / name, ["prompt", "image"], [["a cat", "a.png"]])
    [row] = values(path, caption="prompt")
    assert (row["prompt"], row["image"]) == ("a cat", "a.png")
    assert read_prompts(Prompts(train=str(path)), 0)[0] == ["a cat"]
    assert values(tmp_path, caption="prompt") == [row]  # found in a folder


# --------------------------------------------------------------------------------------------------
# CSV as people write it


@pytest.mark.parametrize(
    "text",
    [
        "caption,image\na cat,a.png\n",
        "caption;image\na cat;a.png\n",
        "caption\timage\na cat\ta.png\n",
        '"a, b";caption;image\nx;a cat;a.png\n',
        'caption, image\n"a cat", "a.png"\n',
        '"caption", "image"\na cat, a.png\n',
        "caption,image\ra cat,a.png\r",
    ],
)
def test_delimiters_and_blanks(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    [row] = values(tmp_path / "a.csv")
    assert (row["caption"], row["image"]) == ("a cat", "a.png")


def test_quotes_and_commas_where_they_mean_themselves(tmp_path):
    lines = ["caption,image", 'a 5" pipe,a', '"a ""red"" cat, blue",b', '"a \\""b\\""",c']
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = [row["caption"] for row in values(tmp_path / "a.csv")]
    assert found == ['a 5" pipe', 'a "red" cat, blue', 'a \\"b\\"']


@pytest.mark.parametrize(
    ("text", "where", "kind"),
    [
        ('caption,image\na,b\n"a cat,b\nc,d\n', "line 3", "damaged"),  # never closed
        ('caption,image\na,b\n"a cat,b\n"a dog",d\n', "line 3", "damaged"),  # closed by the next
        ('caption,image\n"a \\"red\\" cat",b\n', "line 2", "damaged"),
        ('caption,image\n"6\\"",b\n"7\\"",c\n', "line 2", "damaged"),
        ('caption,image\na \\"red\\" cat,b\n', "line 2", "ambiguous"),
        ('caption,image\n"a" ,b\n', "line 2", "damaged"),
        ("caption,image\na,b\na cat, sitting,c\n", "line 3", "mismatch"),
        ("caption,image\na,b\nc\n", "line 3", "mismatch"),
        ("caption;image,note\na;b,c\n", "line 1", "ambiguous"),
        ("caption,image,image\na,b,c\n", "line 1", "duplicate"),
        ("caption,image\n" + "x" * 140_000 + ",b\n", "line 2", "too-large"),
        ('caption,image\n"' + "x,y\n" * 40_000, "line 2", "too-large"),
        ("caption,image\n" + "x" * MAX_LINE + ",b\n", "line 2", "too-large"),
    ],
)
def test_csv_that_could_be_read_wrongly_is_refused(tmp_path, text, where, kind):
    refused_at(tmp_path / "a.csv", where, kind, text)


def test_a_quote_that_may_have_swallowed_rows_is_noted(tmp_path):
    left_out = LeftOut()
    lines = ["caption,image", '"two', 'lines",a', 'b,"open', 'c,closed"', "d,e"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert len(values(tmp_path / "a.csv", left_out)) == 3
    assert left_out.counts == left_out.remarks == {SWALLOWED: 1}


@pytest.mark.parametrize(
    ("name", "content", "where", "kind"),
    [
        ("a.jsonl", '{"image": "a", "caption": 1}\n{"image": "b"}\n', "line 2", "missing"),
        ("a.jsonl", '{"image": "a", "image": "b"}\n', "line 1", "damaged"),
        ("a.json", '[{"image": "a", "caption": "b"}\n{"image"', "entry 1 (line 1)", "damaged"),
        ("a.json", '[{"image": "a", "caption": "b"},\n]', "entry 2 (line 2)", "damaged"),
        ("a.json", '[{"image": "a", "caption": "b"}]\n[]', "line 2", "damaged"),
        ("a.json", '["a"]', "entry 1 (line 1)", "wrong-type"),
        ("a.csv", b"caption,image\na,b\n\xff\xfe,c\n", "", "unreadable"),
        ("a.csv", "caption,image\n".encode("utf-16"), "", "unreadable"),
        ("a.csv", "caption,image\na\0,b\n", "", "unreadable"),
        ("a.json", b'[{"image": "\xff"}]', "", "unreadable"),
        ("a.csv.gz", b"caption,image\na,b\n", "", "unreadable"),
        ("a.csv.gz", gzip.compress(b"caption,image\n" * 999, mtime=0)[:-20], "", "unreadable"),
    ],
)
def test_tables_that_are_damaged(tmp_path, name, content, where, kind):
    if kind == "missing":
        (tmp_path / name).write_text(content)
        with refused(DataError, "missing", "caption") as caught:
            values(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} {where}: ")
    else:
        refused_at(tmp_path / name, where, kind, content)


# --------------------------------------------------------------------------------------------------
# Prompts of these tables


def test_what_of_prompt_files_is_no_prompt_is_counted_and_named(tmp_path):
    text, table, names = tmp_path / "a.txt", tmp_path / "b.csv", io.BytesIO()
    text.write_text("# heading\na cat\n\na cat\n  # two\n")
    table.write_text('prompt,n\n# one,1\n"",2\n  ,3\n# one,4\n')
    spec = Prompts(train=str(text), heldout=str(table))
    left_out = LeftOut(names)
    assert read_prompts(spec, 0, left_out) == (["a cat"], ["# one"], [])
    assert left_out.rows == {REPEATED: 2, EMPTY: 2}
    assert left_out.beside == {COMMENT: 2, BLANK: 1}
    lines = [(line[0], line[1]) for line in csv.reader(names.getvalue().decode().splitlines())]
    assert lines == [
        *((str(text), f"line {number}") for number in (1, 3, 4, 5)),
        *((str(table), f"line {number}") for number in (3, 4, 5)),
    ]


# --------------------------------------------------------------------------------------------------
# Cells that hold no path


@pytest.mark.parametrize(
    "cell",
    [
        "data:image/png;base64,iVBORw0KGgo" + "A" * 9000,
        "https://example.org/cat.png",
        str(b"\x89PNG\r\n\x1a\n" + bytes(9000)),
        str({"bytes": b"\x89PNG", "path": None}),
        "iVBORw0KGgoAAAANSUhEUgAA" + "A" * 90_000,
        "/9j/4AAQSkZJRgABAQAAAQABAAD",
        "x" * 5000,
        "<PIL.PngImagePlugin.PngImageFile image mode=RGB size=8x8>",
    ],
    ids=["uri", "url", "bytes", "struct", "png", "jpeg", "long", "object"],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_image_that_is_written_out_is_refused_in_a_short_line(tmp_path, kind, cell):
    path = written(tmp_path / f"a.{kind}", ["image", "caption"], [["a.png", "x"], [cell, "y"]])
    with refused(DataError, "wrong-type", "image") as caught:
        values(path)
    where = f"{path} line {3 if kind == 'csv' else 2}: image holds "
    assert str(caught.value).startswith(where) and len(str(caught.value)) < len(where) + 250


@pytest.mark.parametrize(
    "cell", [7, [7], [["a.png"]], {"bytes": "iVBO", "path": "a"}, "a\ud83d.png"]
)
def test_json_that_is_no_path(tmp_path, cell):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": cell, "caption": "x"}))
    with refused(DataError, "wrong-type", "image"):
        values(tmp_path / "a.jsonl")
