"""Of random mixtures of what other people's data have: whatever is there is used or named.

Rows that are used and rows that are left out are all the rows that were made; every file or member
beside them has a line; counts and lines agree.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
from cdpo.engine.recipe import Imported, Paired, Ranked
from cdpo.engine.sources import open_source
from cdpo.engine.sources.index import Index, open_index
from cdpo.engine.sources.left_out import NAME
from hypothesis import given, settings
from hypothesis import strategies as st

HELD_OUT = "held out"
CAPTIONS = st.sampled_from(["a cat", "a dog", HELD_OUT, "", " \n", "x" * 2001, 'é, "quoted"'])
ROWS = st.lists(st.tuples(CAPTIONS, st.sampled_from([0, 1, 0.5, None])), min_size=1, max_size=12)
JUNK = ["._{}.jpg_0", ".DS_Store", "__MACOSX/{}.json", "{}.npz", "README", "lone{}.txt"]
KEYS = ["{:04d}", "v7.5_{:04d}", "sub.dir/{}", "{}.5.x"]
mixtures = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def hold(folder: Path, spec: Imported, rows: int, others: list[str]) -> None:
    """``rows`` rows, and ``others`` that are none, are all used or named."""
    source = open_source(spec)
    facts = open_index(folder / "index", source, spec, {HELD_OUT})
    with (folder / "index" / NAME).open(newline="") as file:
        lines = list(csv.DictReader(file))
    of_rows = [line for line in lines if line["fate"] == "left out"]
    beside = [line for line in lines if line["fate"] == "passed over"]
    assert len(lines) == len(of_rows) + len(beside)
    assert Counter(line["reason"] for line in of_rows) == facts.left_out
    assert Counter(line["reason"] for line in beside) == facts.noted
    index = Index(folder / "index", facts)
    assert facts.rows == rows == len(index) + len(of_rows)
    places = Counter((line["file"], line["where"]) for line in of_rows)
    for record in range(len(index)):
        file = source.files.name(index.value(record, "file"))
        places[file, index.value(record, "where")] += 1
    assert len(places) == rows and set(places.values()) <= {1}
    assert sorted(line["where"] or line["file"] for line in beside) == sorted(others)


@mixtures
@given(ROWS, st.data())
def test_tars(rows, data):
    with tempfile.TemporaryDirectory() as name:
        folder, others, halves = Path(name), [], [list[tuple[str, bytes]](), []]
        (folder / "data").mkdir()
        rows = [("a cat", 1), *rows]  # an import without a pair is an error
        for number, (caption, label) in enumerate(rows):
            key = data.draw(st.sampled_from(KEYS)).format(number)
            record = {"caption": caption, "label_0": label}
            has_text = data.draw(st.booleans())
            if has_text:
                del record["caption"]
            half = halves[number >= len(rows) // 2]
            half += [(f"{key}.jpg_0", b"0"), (f"{key}.jpg_1", b"1")]
            half += [(f"{key}.json", json.dumps(record).encode())]
            half += [(f"{key}.txt", caption.encode())] * has_text
            for junk in data.draw(st.lists(st.sampled_from(JUNK), max_size=2, unique=True)):
                half.append((junk.format(number), b""))
                others.append(junk.format(number))
            if data.draw(st.booleans()):
                half.append((f"{key}.mask.jpg_0", b"m"))
                others.append(f"{key}.mask.jpg_0")
        blobs = []
        for half in filter(None, halves):
            part = preferences.write_plain_tar(folder / "part", half)
            blobs.append(part.read_bytes())
        path = folder / "data" / "a.tar"
        path.write_bytes(b"".join(blobs))
        if data.draw(st.booleans()):
            last = path.read_bytes().rstrip(b"\0")
            path.write_bytes(last + bytes(-len(last) % 512))
            others.append("a.tar")
        if data.draw(st.booleans()):
            (folder / "data" / "a.parquet").write_bytes(b"")
            others.append("a.parquet")
        hold(folder, Paired(path=str(folder / "data")), len(rows), others)


@mixtures
@given(ROWS, st.data())
def test_folders(rows, data):
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(name) / "data"
        others: list[str] = []

        def put(place: str, content: str = "") -> None:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text(content)

        rows = [("a cat", 1), *rows]
        for number, (caption, _) in enumerate(rows):
            stem = data.draw(st.sampled_from(["{}", "10_cat/{}", "v7.5_{}"])).format(number)
            for side in ("chosen", "rejected"):
                put(f"{side}/{stem}{data.draw(st.sampled_from(['.png', '.JPG', '.tiff', '.bmp']))}")
            place = data.draw(st.sampled_from(["caption", "chosen", "rejected"]))
            put(f"{place}/{stem}.{data.draw(st.sampled_from(['txt', 'caption']))}", caption)
            if place == "caption" and data.draw(st.booleans()):
                put(f"chosen/{stem}.txt", f"not {caption}")
                others.append(f"chosen/{stem}.txt")
            if data.draw(st.booleans()):
                junk = ["chosen/{}.npz", "caption/no{}.txt", "more/{}.png", "._{}.png", "{}.txt"]
                others.append(data.draw(st.sampled_from(junk)).format(stem.replace("/", "_")))
                put(others[-1])
        spec = Paired(path=str(root), images=("chosen", "rejected"), label=None)
        hold(folder, spec, len(rows), others)


@mixtures
@given(ROWS, st.sampled_from(["csv", "parquet"]))
def test_tables(rows, kind):
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), [("a cat", 1), *rows]
        path = folder / f"data.{kind}"
        table = [{"image": "a.png", "caption": caption} for caption, _ in rows]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(table), path, row_group_size=5)
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, ["image", "caption"])
            writer.writeheader()
            writer.writerows(table)
            path.write_text(text.getvalue())
        hold(folder, Ranked(path=str(path), score=None), len(rows), [])
