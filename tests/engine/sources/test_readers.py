"""Every kind of source gives the same rows and images; what is wrong with one is said in a line."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.recipe import Imported, Paired, Ranked
from cdpo.engine.recipe.identity import RESOLVED_HEADER
from cdpo.engine.sources import open_source
from cdpo.engine.sources.files import BESIDE_TARS, HIDDEN, OF_DESKTOPS, OTHER_KINDS, UNPACK
from cdpo.engine.sources.folders import LONE_TEXT, TWO_TEXTS
from cdpo.engine.sources.index import Index, open_index
from cdpo.engine.sources.left_out import NAME, LeftOut
from cdpo.engine.sources.pictures import load_records
from cdpo.engine.sources.records import NO_CAPTION
from cdpo.engine.sources.rows import Place, Row, RowReader, UnreadableImage, in_lists
from cdpo.engine.sources.tars import NO_END, OF_A_DESKTOP, OTHERS
from refusals import refused

ROWS = [preferences.judged(number) for number in range(40)]
DECIDED = [row for row in ROWS if row.label_0 != 0.5]
WINNER_LOSER = {"images": ("winner", "loser"), "label": None}


def opened(folder: Path, spec: Imported) -> tuple[RowReader, Index]:
    reader = open_source(spec)
    return reader, Index(folder, open_index(folder, reader, spec, ()))


def read(folder: Path, spec: Imported) -> list[tuple[str, int, tuple[object, ...]]]:
    """Caption, winner and images of every record."""
    reader, index = opened(folder, spec)
    found = []
    winners = index.numbers("winner")
    for number in range(index.num_parts):
        part = index.part(number)
        images = reader.load(part.file, part.group, part.places)
        for row, (caption, pair) in enumerate(zip(part.captions, images, strict=True)):
            found.append((caption, int(winners[part.first + row]), pair))
    return found


EXPECTED = [(row.caption, int(row.label_0 == 0), (row.jpg_0, row.jpg_1)) for row in DECIDED]
SORTED = [(c, 0, images if not w else images[::-1]) for c, w, images in EXPECTED]


def test_parquet_of_several_files_and_row_groups(tmp_path):
    for number in range(2):
        part = ROWS[number * 20 : number * 20 + 20]
        preferences.write_parquet(tmp_path / "data" / f"train-{number}.parquet", part, per_group=8)
    assert read(tmp_path / "index", Paired(path=str(tmp_path / "data"))) == EXPECTED
    pattern = Paired(path=str(tmp_path / "data" / "*-1.parquet"))
    assert read(tmp_path / "index", pattern) == EXPECTED[16:]
    whole = Paired(path=str(tmp_path / "data"), limit=10)
    assert read(tmp_path / "index", whole) == EXPECTED[:8]


def test_webdataset_tars(tmp_path):
    preferences.write_tar(tmp_path / "a.tar", ROWS[:30])
    preferences.write_tar(tmp_path / "b.tar", ROWS[30:])
    assert read(tmp_path / "index", Paired(path=str(tmp_path))) == EXPECTED


def test_a_csv_of_paths(tmp_path):
    path = preferences.write_csv(tmp_path / "pairs.csv", ROWS)
    assert read(tmp_path / "index", Paired(path=str(path), **WINNER_LOSER)) == SORTED


def test_a_folder_of_winners_and_losers(tmp_path):
    path = preferences.write_folder(tmp_path / "pairs", ROWS)
    assert read(tmp_path / "index", Paired(path=str(path), **WINNER_LOSER)) == SORTED


def test_parquet_of_paths_and_of_hugging_face_images(tmp_path):
    (tmp_path / "a.png").write_bytes(ROWS[0].jpg_0)
    pq.write_table(
        pa.table({"image": ["a.png"], "caption": ["x"], "score": [1]}), tmp_path / "p.parquet"
    )
    spec = Ranked(path=str(tmp_path / "p.parquet"))
    assert read(tmp_path / "index", spec) == [("x", 0, (ROWS[0].jpg_0,))]
    path = preferences.write_ranked(tmp_path / "r.parquet")
    found = read(tmp_path / "index", Ranked(path=str(path)))
    assert found[5] == (preferences.CAPTIONS[1], 0, (preferences.picture(17 + 1),))


def test_names_and_scores_come_with_the_data(tmp_path):
    path = preferences.write_parquet(tmp_path / "a.parquet", ROWS)
    _, index = opened(tmp_path / "index", Paired(path=str(path)))
    assert index.value(4, "names") == ["image-10", "image-11"]
    path = preferences.write_ranked(tmp_path / "r.parquet")
    _, index = opened(tmp_path / "index", Ranked(path=str(path)))
    assert index.numbers("scores")[:5, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 1.0]


def test_the_index_is_made_once_and_a_copy_of_the_data_has_the_same_content(tmp_path, monkeypatch):
    path = preferences.write_parquet(tmp_path / "a" / "x.parquet", ROWS)
    spec = Paired(path=str(path))
    facts = open_index(tmp_path / "index", open_source(spec), spec, ())
    with monkeypatch.context() as patch:
        patch.setattr("cdpo.engine.sources.index._make", lambda *_: pytest.fail("made again"))
        assert open_index(tmp_path / "index", open_source(spec), spec, ()) == facts
    copied = Paired(path=str(preferences.write_parquet(tmp_path / "b" / "x.parquet", ROWS)))
    again = open_index(tmp_path / "index", open_source(copied), copied, ())
    assert again.content == facts.content
    changed = [*ROWS[:-1], preferences.judged(0, caption="another")]
    other = Paired(path=str(preferences.write_parquet(tmp_path / "b" / "x.parquet", changed)))
    assert open_index(tmp_path / "index", open_source(other), other, ()).content != facts.content


def test_a_file_that_comes_into_a_folder_is_noticed(tmp_path):
    path = preferences.write_folder(tmp_path / "pairs", ROWS[:10])
    (path / "winner").rename(tmp_path / "elsewhere")
    (path / "winner").symlink_to(tmp_path / "elsewhere")
    spec = Paired(path=str(path), **WINNER_LOSER)
    assert len(read(tmp_path / "index", spec)) == 8
    for name, data in (("winner", ROWS[0].jpg_0), ("loser", ROWS[0].jpg_1), ("caption", b"new")):
        (path / name / f"9999.{'txt' if name == 'caption' else 'png'}").write_bytes(data)
    assert [caption for caption, _, _ in read(tmp_path / "index", spec)][8:] == ["new"]


def test_a_table_that_loses_rows_while_it_is_read(tmp_path):
    path = preferences.write_parquet(tmp_path / "a.parquet", DECIDED)
    reader, index = opened(tmp_path / "index", Paired(path=str(path)))
    preferences.write_parquet(path, DECIDED[:5])
    with refused(DataError, "changed", str(path)):
        list(load_records(reader, index.part(0), range(16), (8, 8)))


def wheres(index: Index) -> list[str]:
    return [index.value(number, "where") for number in range(len(index))]


def by_reason(folder: Path, column: str = "where") -> dict[str, list[str]]:
    """What the list of an index names, by reason."""
    found: dict[str, list[str]] = {}
    with (folder / NAME).open(newline="") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["reason"], []).append(line[column])
    return found


# What is wrong with a source


def is_refused(folder: Path, spec: Imported, kind: str, key: str | None = None) -> None:
    with refused(DataError, kind, key) as caught:
        read(folder / "index", spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.mkdir(), "empty"),
        (lambda path: path.write_text("hello"), "empty"),
    ],
)
def test_nothing_to_read(tmp_path, make: Callable[[Path], object], kind):
    make(tmp_path / "data")
    is_refused(tmp_path, Paired(path=str(tmp_path / "data")), kind, "prepare.source.path")


def test_several_kinds_in_a_folder(tmp_path):
    preferences.write_parquet(tmp_path / "data" / "a.parquet", ROWS)
    preferences.write_tar(tmp_path / "data" / "b.tar", ROWS)
    is_refused(tmp_path, Paired(path=str(tmp_path / "data")), "ambiguous", "prepare.source.path")


@pytest.mark.parametrize("kind", ["parquet", "csv", "tar"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, kind):
    write = {"parquet": preferences.write_parquet, "tar": preferences.write_tar}
    path = write.get(kind, preferences.write_csv)(tmp_path / f"a.{kind}", ROWS)
    extra = WINNER_LOSER if kind == "csv" else {}
    is_refused(tmp_path, Paired(path=str(path), caption="text", **extra), "missing", "text")


def test_defaults_on_a_table_of_winners_say_what_to_set(tmp_path):
    path = preferences.write_csv(tmp_path / "a.csv", ROWS)
    with refused(DataError, "missing", "label_0") as caught:
        read(tmp_path / "index", Paired(path=str(path)))
    assert "prepare.source.images=[winner,loser]" in str(caught.value)


def test_columns_that_hold_no_images(tmp_path):
    path = preferences.write_parquet(tmp_path / "a.parquet", ROWS)
    spec = Paired(path=str(path), images=("jpg_0", "label_0"))
    is_refused(tmp_path, spec, "wrong-type", "label_0")


@pytest.mark.parametrize("kind", ["parquet", "csv", "tar"])
def test_files_that_are_something_else(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"\x00\x01 nothing of the kind" * 99)
    is_refused(tmp_path, Paired(path=str(path)), "unreadable", str(path))


def test_a_table_cut_in_the_middle(tmp_path):
    path = preferences.write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-2000])
    is_refused(tmp_path, Paired(path=str(path)), "unreadable", str(path))


def test_a_source_without_rows(tmp_path):
    table = pa.Table.from_pylist([vars(ROWS[0])]).slice(0, 0)
    pq.write_table(table, tmp_path / "a.parquet")
    is_refused(tmp_path, Paired(path=str(tmp_path / "a.parquet")), "empty", "prepare.source.path")
    ties = [preferences.judged(number, 0.5) for number in range(3)]
    path = preferences.write_parquet(tmp_path / "b.parquet", ties)
    is_refused(tmp_path, Paired(path=str(path)), "empty", "prepare.source.path")


# Tars


RECORD = json.dumps({"label_0": 1, "caption": "x"}).encode()
WHOLE = [("a.jpg_0", b"0"), ("a.jpg_1", b"1"), ("a.json", RECORD)]


@pytest.mark.parametrize(
    ("members", "key", "kind"),
    [
        (WHOLE[:2], "a", "missing"),
        ([WHOLE[0], WHOLE[2]], "a", "missing"),
        ([*WHOLE, ("b.jpg_0", b""), *WHOLE[:1]], "b", "missing"),
        ([*WHOLE, *[("b" + n[1:], d) for n, d in WHOLE], *WHOLE], "a", "duplicate"),
        ([*WHOLE, WHOLE[0]], "a", "duplicate"),
        ([*WHOLE[:2], ("a.json", b"[]")], "a", "wrong-type"),
        ([*WHOLE[:2], ("a.json", b"{")], "a", "damaged"),
        ([*WHOLE[:2], ("a.json", b"[" * 100_000)], "a", "damaged"),
    ],
)
def test_samples_that_are_not_whole(tmp_path, members, key, kind):
    path = preferences.write_plain_tar(tmp_path / "a.tar", members)
    is_refused(tmp_path, Paired(path=str(path)), kind, key)


def renamed(key: str, caption: str = "x") -> list[tuple[str, bytes]]:
    """A sample of that key."""
    record = json.dumps({"label_0": 1, "caption": caption}).encode()
    return [(f"{key}.jpg_0", b"0"), (f"{key}.jpg_1", b"1"), (f"{key}.json", record)]


IMAGES = (b"0", b"1")
JUNK = [("._a.jpg_0", b""), (".DS_Store", b""), ("__MACOSX/a.json", b"{")]


@pytest.mark.parametrize(
    ("members", "keys", "passed_over"),
    [
        (
            [("README", b"hi"), *WHOLE, ("a.txt", b"caption"), ("d/b.txt", b"lone")],
            ["a"],
            {OTHERS: ["README", "d/b.txt"]},
        ),
        # Dots in keys, also where what is before the first is the same, or is a key itself.
        (
            [*renamed("sdxl_cfg7.5_0002"), *renamed("sdxl_cfg7.5_0003"), *renamed("v1/b.c.d")],
            ["sdxl_cfg7.5_0002", "sdxl_cfg7.5_0003", "v1/b.c.d"],
            {},
        ),
        (
            [*renamed("7.5_1"), *renamed("8.5_1"), *renamed("7.5_2")],
            ["7.5_1", "8.5_1", "7.5_2"],
            {},
        ),
        ([*renamed("a"), *renamed("a.b")], ["a", "a.b"], {}),
        # Side files by the same ending.
        ([*WHOLE, ("a.mask.jpg_0", b"m")], ["a"], {OTHERS: ["a.mask.jpg_0"]}),
        ([("a.mask.json", b"m"), *WHOLE], ["a"], {OTHERS: ["a.mask.json"]}),
        ([*JUNK, *WHOLE, *JUNK[:1]], ["a"], {OF_A_DESKTOP: [n for n, _ in (*JUNK, JUNK[0])]}),
    ],
)
def test_members_go_to_the_key_that_they_are_of_or_are_named(tmp_path, members, keys, passed_over):
    path = preferences.write_plain_tar(tmp_path / "a.tar", members)
    _, index = opened(tmp_path / "index", Paired(path=str(path)))
    found = {where: index.caption(n) for n, where in enumerate(wheres(index))}
    assert found == {f"key {key}": "x" for key in keys}
    assert by_reason(tmp_path / "index") == passed_over
    assert index.facts.noted == {why: len(names) for why, names in passed_over.items()}


def test_samples_with_a_text_in_place_of_a_record(tmp_path):
    """As img2dataset and hand-made tars have them, with pictures of any kind."""
    members = [
        *[("a.jpg", b"0"), ("a.txt", "é\n".encode()), ("a.json", b'{"score": 1}')],
        *[("b.PNG", b"1"), ("b.json", b'{"score": 2, "caption": "own"}'), ("b.txt", b"not this")],
        *[("c.webp", b"2"), ("c.txt", b"z"), ("c.json", b'{"score": 3, "caption": null}')],
        *[("d.jpg", b"3"), ("d.webp", b"not this"), ("d.JSON", b'{"score": 3, "caption": "d"}')],
    ]
    path = preferences.write_plain_tar(tmp_path / "a.tar", members)
    expected = [("é", 0, (b"0",)), ("own", 0, (b"1",)), ("z", 0, (b"2",)), ("d", 0, (b"3",))]
    assert read(tmp_path / "index", Ranked(path=str(path), image="jpg")) == expected
    assert by_reason(tmp_path / "index") == {OTHERS: ["d.webp"]}
    alone = preferences.write_plain_tar(tmp_path / "b.tar", [("a.jpg", b"0"), ("a.txt", b"y")])
    spec = Ranked(path=str(alone), image="png", score=None)
    assert read(tmp_path / "index", spec) == [("y", 0, (b"0",))]


def test_two_pictures_that_could_both_be_meant(tmp_path):
    members = [("a.png", b"0"), ("a.webp", b"1"), ("a.txt", b"x")]
    path = preferences.write_plain_tar(tmp_path / "a.tar", members)
    is_refused(tmp_path, Ranked(path=str(path), image="jpg", score=None), "duplicate", "a")
    pair = Paired(path=str(path), images=("png", "webp"), label=None)
    assert read(tmp_path / "index", pair) == [("x", 0, (b"0", b"1"))]


@pytest.mark.parametrize(
    ("second", "kind"),
    [(renamed("b", "y"), None), (WHOLE, "duplicate"), (None, "damaged")],
)
def test_tars_that_were_joined(tmp_path, second, kind):
    """By `cat`: both are read, as `tar --ignore-zeros` does; what is no tar is damage."""
    path = preferences.write_plain_tar(tmp_path / "a.tar", WHOLE)
    other = b"no tar" * 999
    if second is not None:
        other = preferences.write_plain_tar(tmp_path / "b.tar", second).read_bytes()
    path.write_bytes(path.read_bytes() + other)
    if kind:
        is_refused(tmp_path, Paired(path=str(path)), kind)
    else:
        assert read(tmp_path / "index", Paired(path=str(path))) == [
            ("x", 0, IMAGES),
            ("y", 0, IMAGES),
        ]


@pytest.mark.parametrize("blanks", [True, False])
def test_a_tar_without_an_end_is_read_and_told_of(tmp_path, blanks):
    path = preferences.write_plain_tar(tmp_path / "a.tar", WHOLE)
    end = 5 * 512 + (512 if blanks else len(RECORD))
    path.write_bytes(path.read_bytes()[:end])
    assert read(tmp_path / "index", Paired(path=str(path))) == [("x", 0, IMAGES)]
    assert by_reason(tmp_path / "index") == {NO_END: [""]}
    path.write_bytes(path.read_bytes()[: 5 * 512 + len(RECORD) - 1])
    is_refused(tmp_path, Paired(path=str(path)), "unreadable", str(path))


@pytest.mark.parametrize(
    ("name", "data", "kind", "key"),
    [
        ("a.tar.gz", b"", "unsupported", None),
        ("a.tgz", b"", "unsupported", None),
        ("a.tar", b"\x1f\x8b\x08", "unsupported", "a.tar"),
        ("a.tar", b"version https://git-lfs.github.com/spec/v1\n", "unreadable", "a.tar"),
    ],
)
def test_tars_that_are_not_there_yet(tmp_path, name, data, kind, key):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(data)
    where = str(tmp_path / "data" / key) if key else "prepare.source.path"
    is_refused(tmp_path, Paired(path=str(tmp_path / "data")), kind, where)


def test_files_beside_the_source_are_named(tmp_path):
    """A folder as img2dataset and the hub leave it."""
    data = tmp_path / "data"
    preferences.write_tar(data / "sub" / "00000.TAR", ROWS[:5])
    for name in ("sub/00000.parquet", "00000_stats.json", "._x.tar", "a.tar.gz", ".cache/x/y.txt"):
        (data / name).parent.mkdir(exist_ok=True, parents=True)
        (data / name).write_bytes(b"")
    spec = Paired(path=str(data))
    assert len(read(tmp_path / "index", spec)) == 4
    lines = by_reason(tmp_path / "index", "file")
    assert lines.pop("ties") == ["00000.TAR"]
    assert lines == {
        HIDDEN: [".cache"],
        OF_DESKTOPS: ["._x.tar"],
        OTHER_KINDS: ["00000_stats.json"],
        UNPACK: ["a.tar.gz"],
        BESIDE_TARS: ["sub/00000.parquet"],
    }
    (data / "new.txt").write_bytes(b"")  # is noticed
    read(tmp_path / "index", spec)
    assert by_reason(tmp_path / "index", "file")[OTHER_KINDS] == ["00000_stats.json", "new.txt"]


def test_a_run_folder_beside_the_data_is_no_data(tmp_path):
    """What a first `prepare` leaves there changes nothing for the second."""
    preferences.write_tar(tmp_path / "data" / "0.tar", ROWS[:5])
    spec = Paired(path=str(tmp_path / "data"))
    before = open_source(spec).files
    run = tmp_path / "data" / "runs" / "a"
    (run / "source").mkdir(parents=True)
    for name in ("left_out.csv", "scores.parquet", "source/left_out.csv"):
        (run / name).write_bytes(b"caption\n")
    (run / "recipe.yaml").write_text(f"{RESOLVED_HEADER}seed: 1\n")
    assert open_source(spec).files == before
    (run / "recipe.yaml").write_text("seed: 1\n")  # somebody's own file
    with refused(DataError, "ambiguous", "prepare.source.path"):
        open_source(spec)


def test_an_empty_folder_is_told_with_what_there_is(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.PNG", "c"):
        (tmp_path / "data" / name).write_bytes(b"")
    with refused(DataError, "empty", "prepare.source.path") as caught:
        open_source(Paired(path=str(tmp_path / "data")))
    assert "there is 2 .png, 1 c" in str(caught.value)


def test_tars_that_were_cut_off(tmp_path):
    """At every block: never a shorter data set without a word."""
    path = preferences.write_plain_tar(tmp_path / "a.tar", WHOLE)
    whole = path.read_bytes()
    for blocks in range(6):
        path.write_bytes(whole[: blocks * 512])
        with pytest.raises(DataError) as caught:
            read(tmp_path / "index", Paired(path=str(path)))
        assert caught.value.kind in ("empty", "unreadable", "damaged", "missing")
    damaged = bytearray(whole)
    damaged[1024 + 10] ^= 1  # the second header, whose checksum no longer holds
    path.write_bytes(damaged)
    is_refused(tmp_path, Paired(path=str(path)), "damaged", str(path))


def test_links_in_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg_0")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link, io.BytesIO())
    path = tmp_path / "a.tar"
    is_refused(tmp_path, Paired(path=str(path)), "unsupported", str(path))


# Folders and paths


def test_folders_of_any_depth_and_pictures_of_any_kind(tmp_path):
    """Captions beside the pictures, as trainers have them."""
    data = tmp_path / "pairs"
    pictures = ["chosen/10_cat/a.JPG", "rejected/10_cat/a.webp", "chosen/b.tif", "rejected/b.jfif"]
    pictures += ["chosen/c.gif", "rejected/c.bmp"]
    texts = {"chosen/10_cat/a.caption": "x", "rejected/b.TXT": "y", "caption/c.txt": "z"}
    texts |= {"rejected/c.txt": "z", "chosen/c.txt": "another", "caption/c.caption": "kohya's"}
    others = ["notes.txt", "logs/x.txt", "caption/d.txt", "chosen/d.caption", "chosen/b.npz"]
    others += ["chosen/.DS_Store", "chosen/._b.png"]
    numbered = {name: str(number) for number, name in enumerate(pictures)}
    for name, content in (numbered | texts | dict.fromkeys(others, "")).items():
        (data / name).parent.mkdir(exist_ok=True, parents=True)
        (data / name).write_text(content)
    spec = Paired(path=str(data), images=("chosen", "rejected"), label=None)
    found = read(tmp_path / "index", spec)
    assert found == [("x", 0, (b"0", b"1")), ("y", 0, (b"2", b"3")), ("z", 0, (b"4", b"5"))]
    assert by_reason(tmp_path / "index") == {
        LONE_TEXT: ["caption/d.txt", "chosen/d.caption"],
        OF_DESKTOPS: ["chosen/.DS_Store", "chosen/._b.png"],
        OTHER_KINDS: ["chosen/b.npz", "logs/x.txt", "notes.txt"],
        TWO_TEXTS: ["caption/c.caption", "chosen/c.txt"],
    }


def test_folders_without_images_are_told_with_what_there_is(tmp_path):
    for name in ("winner", "loser"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.psd").write_bytes(b"")
    spec = Paired(path=str(tmp_path / "data"), **WINNER_LOSER)
    is_refused(tmp_path, spec, "empty", str(tmp_path / "data" / "winner"))


def test_folders_whose_names_do_not_match(tmp_path):
    path = preferences.write_folder(tmp_path / "pairs", ROWS)
    (path / "loser" / "0003.png").unlink()
    is_refused(tmp_path, Paired(path=str(path), **WINNER_LOSER), "missing", "winner/0003.png")


def test_a_missing_caption_is_named(tmp_path):
    path = preferences.write_folder(tmp_path / "pairs", ROWS)
    (path / "caption" / "0003.txt").unlink()
    lost = str(path / "caption" / "0003.txt")
    is_refused(tmp_path, Paired(path=str(path), **WINNER_LOSER), "unreadable", lost)


def test_a_caption_that_is_a_book_is_left_out(tmp_path):
    preferences.write_folder(tmp_path / "data", DECIDED)
    caption = sorted((tmp_path / "data" / "caption").iterdir())[0]
    caption.write_text("é" * 40_000)
    _, index = opened(tmp_path / "index", Paired(path=str(tmp_path / "data"), **WINNER_LOSER))
    assert index.facts.left_out == {NO_CAPTION: 1}


def test_paths_that_are_no_files_are_unreadable_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = ["image,caption", "pipe,x", "absent.png,x", ".,x", ",x"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = read(tmp_path / "index", Ranked(path=str(tmp_path / "a.csv"), score=None))
    assert all(isinstance(images[0], UnreadableImage) for _, _, images in found)
    kinds = [images[0].kind for _, _, images in found]
    assert kinds == ["wrong-type", "unreadable", "wrong-type", "wrong-type"]


def test_a_value_that_all_rows_share_is_not_read_once_a_row(tmp_path):
    """Parquet of some kilobytes, whose rows would take gigabytes if they were read together."""
    large, rows, small = 8 << 20, 300, pa.array(["a cat"] * 300)
    indices = pa.array([0] * rows, pa.int32())
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()

    def written(name: str, **columns: pa.Array) -> Ranked:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)
        assert path.stat().st_size < 50_000
        return Ranked(path=str(path), score=None)

    pixels = pa.DictionaryArray.from_arrays(indices, pa.array([bytes(large)]))
    words = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * large]))
    images = written("images", caption=small, image=pixels)
    captions = written("captions", caption=words, image=pa.array([b"y"] * rows))
    del pixels, words
    pa.set_memory_pool(pool)
    try:
        reader = open_source(images)
        [first, *_] = reader.rows(0, ["caption"], LeftOut())
        places = [Place(row.number, (), ()) for row in first[:20]]
        assert sum(len(image) == large for [image] in reader.load(0, 0, places)) == len(places)
        del reader  # which holds memory of the pool
        with refused(DataError, "too-large", str(captions.path)):
            read(tmp_path / "other", captions)
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 5 * large


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (256, [256]), (513, [256, 256, 1])])
def test_rows_come_in_lists_of_bounded_length(count, lengths):
    rows = [Row(0, number, {}) for number in range(count)]
    lists = list(in_lists(rows))
    assert [len(one) for one in lists] == lengths
    assert [row for one in lists for row in one] == rows
