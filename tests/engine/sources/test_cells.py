"""Layouts of data sets that people have, each small: they are read as docs/data.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.recipe import Imported, Paired, Ranked
from cdpo.engine.sources import open_source, parquet
from cdpo.engine.sources.index import Index, open_index
from cdpo.engine.sources.left_out import LeftOut
from cdpo.engine.sources.rows import UnreadableImage
from refusals import refused

IMAGES = [preferences.picture(number) for number in range(4)]
CONTENT = ("bytes", "path")
EXAMPLES = {
    "jsonl": Paired(path="a.jsonl", images=("chosen", "rejected"), label=None, caption="prompt"),
    "json": Paired(path="a.json", images="file_path", label="human_preference", caption="prompt"),
    "csv": Ranked(path="a.csv", image="image_path", caption="prompt", score="rank", order="lower"),
}
READ = {
    "jsonl": [("a cat", 0, (1, 0)), ("a dog", 0, (2, 3))],
    "json": [("a cat", 0, (0, 1)), ("a dog", 1, (2, 3))],
    "csv": [("a cat", 0, (0,)), ("a cat", 0, (1,)), ("a dog, sitting", 0, (2,))],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images in it."""
    (tmp_path / "images").mkdir()
    for number, data in enumerate(IMAGES):
        (tmp_path / "images" / f"{number}.png").write_bytes(data)
    return tmp_path


def read(folder: Path, spec: Imported) -> list[tuple[str, int, tuple[Any, ...]]]:
    """Caption, winner and images of every record: numbers of our images, or why they are none."""
    reader = open_source(spec)
    index = Index(folder / "index", open_index(folder / "index", reader, spec, ()))
    winners, found = index.numbers("winner").tolist(), []
    for number in range(index.num_parts):
        part = index.part(number)
        loaded = reader.load(part.file, part.group, part.places)
        for caption, pair in zip(part.captions, loaded, strict=True):
            known = (IMAGES.index(i) if isinstance(i, bytes) else i.kind for i in pair)
            found.append((caption, winners[len(found)], tuple(known)))
    return found


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_of_the_docs(folder, kind):
    docs = (Path(__file__).parents[3] / "docs/data.md").read_text()
    [example] = re.findall(rf"^```{kind}\n(.*?)^```", docs, re.M | re.S)
    (folder / f"a.{kind}").write_text(example)
    spec = EXAMPLES[kind].model_copy(update={"path": str(folder / f"a.{kind}")})
    assert read(folder, spec) == READ[kind]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_lists_of_ranked_pictures(folder, kind):
    """HPDv2's `test.json`: each picture of a list is a row with the rank at its place."""
    raw = [{"rank": [2, 1], "user_hash": "u"}]
    rows = [
        {"prompt": "a", "image_path": ["images/0.png", "images/1.png"], "rank": [2, 1]},
        {"prompt": "b", "image_path": ["images/2.png"], "rank": [1], "raw_annotations": raw},
    ]
    path = folder / f"test.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    spec = EXAMPLES["csv"].model_copy(update={"path": str(path)})
    assert read(folder, spec) == [("a", 0, (0,)), ("a", 0, (1,)), ("b", 0, (2,))]
    index = Index(folder / "index", open_index(folder / "index", open_source(spec), spec, ()))
    assert index.numbers("scores")[:, 0].tolist() == [-2, -1, -1]  # `order: lower`
    assert index.numbers("number").tolist() == [0, 1, 2] and len(set(index.numbers("id"))) == 3
    assert index.value(1, "where").endswith("(line 1) image 2" if kind == "json" else "1 image 2")


@pytest.mark.parametrize(
    ("paths", "ranks", "key"), [(["a.png"], [1, 2], "rank"), ([], [], "rank"), ([1], [1], "image")]
)
def test_lists_that_do_not_go_together(tmp_path, paths, ranks, key):
    path = lines(tmp_path / "a.jsonl", [{"caption": "x", "image": paths, "rank": ranks}])
    spec = Ranked(path=path, score="rank", order="lower")
    with refused(DataError, "wrong-type" if key == "image" else "mismatch", key):
        read(tmp_path, spec)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_hpdv2(folder, kind):
    """Lists of two paths and of whether each was preferred; ties are left out."""
    rows = [
        {"prompt": text, "human_preference": votes, "file_path": ["images/0.png", "images/1.png"]}
        for text, votes in [("a", [1, 0]), ("b", [0, 1]), ("c", [1, 1]), ("d", [None, 1])]
    ]
    path = folder / f"train.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    named = {"images": "file_path", "label": "human_preference", "caption": "prompt"}
    spec = Paired(path=str(path), **named)
    assert read(folder, spec) == [("a", 0, (0, 1)), ("b", 1, (0, 1))]
    reader = open_source(spec)
    assert reader.images == ("file_path[0]", "file_path[1]")
    assert open_index(folder / "index", reader, spec, ()).left_out == {
        "ties": 1,
        "without a label": 1,
    }


@pytest.mark.parametrize(
    ("images", "votes", "key"),
    [(["a"], [1, 0], "images"), ("a", [1, 0], "images"), (["a", "b"], [1], "votes")],
)
def test_lists_of_another_length_are_named(folder, images, votes, key):
    path = lines(folder / "a.jsonl", [{"caption": "x", "images": images, "votes": votes}])
    with refused(DataError, "mismatch" if key == "votes" else "wrong-type", key) as caught:
        read(folder, Paired(path=path, images="images", label="votes"))
    assert str(caught.value).startswith(f"{path} line 1: ")


def test_image_reward_rows_with_ranks(folder):
    rows = [{"prompt": "x", "image_path": f"images/{n}.png", "rank": n + 1} for n in range(3)]
    path = lines(folder / "a.jsonl", rows)
    named = {"image": "image_path", "caption": "prompt", "score": "rank", "order": "lower"}
    assert read(folder, Ranked(path=path, **named)) == [("x", 0, (n,)) for n in range(3)]


STRUCTS = [
    ({"bytes": IMAGES[0], "path": "0.png"}, 0),
    ({"bytes": None, "path": "images/1.png"}, 1),
    ({"bytes": None, "path": None}, "missing"),
    (None, "missing"),
    ({"bytes": None, "path": "images/absent.png"}, "unreadable"),
]


@pytest.mark.parametrize("statistics", [True, False])
def test_images_as_datasets_writes_them(folder, statistics):
    """Bytes inside, or the path of a file, absolute or relative to the table."""
    cells, found = zip(*STRUCTS, strict=True)
    absolute = {"bytes": None, "path": str(folder / "images/2.png")}
    rows = [{"image": cell, "caption": "x"} for cell in [*cells, absolute]]
    path = folder / "a.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=4, write_statistics=statistics)
    spec = Ranked(path=str(path), score=None)
    assert read(folder, spec) == [("x", 0, (image,)) for image in [*found, 2]]


def test_where_all_images_are_inside_their_paths_are_not_names(folder):
    rows = [{"image": {"bytes": data, "path": "same.png"}, "caption": "x"} for data in IMAGES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    spec = Ranked(path=str(folder / "a.parquet"), score=None)
    assert [images for _, _, images in read(folder, spec)] == [(0,), (1,), (2,), (3,)]
    reader = open_source(spec)
    assert all(row.paths == () for rows in reader.rows(0, [], LeftOut()) for row in rows)


@pytest.mark.parametrize("content", CONTENT)
def test_lists_of_images_in_parquet(folder, content):
    """One that does not hold two is no pair: unreadable, where the images are inside."""
    pairs = [
        [
            {"bytes": IMAGES[n], "path": None}
            if content == "bytes"
            else {"bytes": None, "path": f"images/{n}.png"}
            for n in pair
        ]
        for pair in [(0, 1), (3, 2)]
    ]
    rows = [{"images": pair, "caption": "x", "label_0": 0} for pair in pairs]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    spec = Paired(path=str(folder / "a.parquet"), images="images")
    assert read(folder, spec) == [("x", 1, (0, 1)), ("x", 1, (3, 2))]
    rows.append({"images": pairs[0][:1], "caption": "x", "label_0": 0})
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    if content == "bytes":
        assert read(folder, spec)[2] == ("x", 1, ("mismatch", "mismatch"))
    else:
        with refused(DataError, "wrong-type", "images"):
            read(folder, spec)


def test_tars_and_folders_hold_no_lists(folder):
    preferences.write_tar(folder / "a.tar", [preferences.judged(0)])
    with refused(DataError, "unsupported", "prepare.source.images"):
        open_source(Paired(path=str(folder / "a.tar"), images="jpg"))


def test_a_row_group_is_read_once_whatever_the_number_of_its_parts(folder, monkeypatch):
    rows, read_rows = 1500, []
    table = pa.table({"image": [IMAGES[0]] * rows, "caption": ["x"] * rows})
    pq.write_table(table, folder / "a.parquet")
    spec = Ranked(path=str(folder / "a.parquet"), score=None)
    reader = open_source(spec)
    index = Index(folder / "index", open_index(folder / "index", reader, spec, ()))
    batches = parquet._batches

    def counted(*asked: Any) -> Any:
        for batch in batches(*asked):
            read_rows.append(batch)
            yield batch

    monkeypatch.setattr(parquet, "_batches", counted)
    for _ in range(2):
        for number in range(index.num_parts):
            part = index.part(number)
            images = list(reader.load(part.file, part.group, part.places[::2]))
            assert not any(isinstance(image, UnreadableImage) for [image] in images)
    assert index.num_parts == 6 and len(read_rows) <= 2 * rows
