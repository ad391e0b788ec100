"""Stage 1 over data sets that are already there: what the shards hold, whatever the form, however
often it was killed.
"""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.display.contact_sheet import ContactRow
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing import imported, latents, preparation
from cdpo.engine.preparing.imported import NOT_TAKEN
from cdpo.engine.recipe import Recipe
from cdpo.engine.rewards import load_reward
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.sources.pictures import FIRST_FRAME, Loaded, load_records, read_picture
from PIL import Image
from prepared import DECIDED, OVERRIDES, ROWS, contents, is_finished, named, pairs_of, prepare
from refusals import refused

PAIRED = OVERRIDES["paired"]
WINNERS = ("prepare.source.images=[winner,loser]", "prepare.source.label=null")
RANKED = ("prepare.source.type=ranked", "data.lanes=1")


@pytest.fixture
def paired(tiny_recipe: Callable[..., Recipe], parquet: Path) -> Callable[..., Recipe]:
    """The tiny recipe over those files."""

    def load(*overrides: str, path: Path = parquet, run: str = "run") -> Recipe:
        return tiny_recipe(*PAIRED, f"prepare.source.path={path}", *overrides, run=run)

    return load


@pytest.fixture
def plain(made: Callable[[str], Path]) -> Path:
    """The shards of an undisturbed import, with 2 images of the last shard dropped: read only."""
    return made("paired") / "shards"


# What comes out


def test_pairs_are_those_of_the_labels_tiered_by_the_reward(plain, tiny_recipe, tiny_backbone):
    """Against labels, reward and VAE, straight from the rows."""
    recipe = tiny_recipe()
    reward = load_reward(recipe.reward, tiny_backbone.device)
    by_name = {
        uid: (row.caption, read_picture(data, (16, 16)))
        for row in ROWS
        for uid, data in ((row.image_0_uid, row.jpg_0), (row.image_1_uid, row.jpg_1))
    }
    scores = {
        uid: float(reward.score([picture.image], [caption])[0])
        for uid, (caption, picture) in by_name.items()
    }
    found = pairs_of(plain)
    manifest = load_manifest(plain)
    left = sum(manifest.statistics.dropped_remainder_by_tier)
    assert len(found) + left == len(DECIDED) == 48
    rows = {frozenset((row.image_0_uid, row.image_1_uid)): row for row in DECIDED}
    gaps: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for meta, pair in found:
        row = rows.pop(frozenset(meta.images))
        winner, loser = meta.images
        assert meta.prompt == row.caption and meta.ranks == (1, 2)
        assert scores[winner] > scores[loser]  # swapped where the label says otherwise
        assert meta.scores == pytest.approx((scores[winner], scores[loser]), abs=1e-5)
        assert meta.original_size == ((20, 24), (20, 24)) and meta.crop == ((0, 1), (0, 1))
        images = [by_name[name][1].image for name in meta.images]
        expected = tiny_backbone.encode_images(images).numpy()
        np.testing.assert_allclose(pair, expected, rtol=2**-9, atol=1e-3)
        gaps[meta.tier].append(meta.scores[0] - meta.scores[1])
    assert min(gaps[1]) >= max(gaps[2]) and min(gaps[2]) >= max(gaps[3])


def test_the_manifest_says_what_became_of_every_row(plain, tiny_world):
    manifest = load_manifest(plain)
    statistics = manifest.statistics
    assert statistics.imported is not None
    overruled = statistics.imported.pop("labels overruled by scores")
    assert statistics.imported == {"rows": 60, "ties": 12} and 0 < overruled < 48
    assert statistics.candidates == 96 and statistics.eligible_pairs == 48
    assert sum(statistics.pairs_by_tier) == manifest.num_pairs
    assert (manifest.reward.type, manifest.reward.path) == (
        "clip_score",
        str(tiny_world / "reward"),
    )


def test_every_row_that_is_not_used_as_it_stands_is_named(plain):
    lines = named(plain.parent)
    places = [f"train-{n // 40}.parquet row {n % 40}" for n in range(60)]
    by_fate: dict[str, list[str]] = {"left out": [], "used": []}
    for line in lines:
        by_fate[line["fate"]].append(f"{line['file']} {line['where']}")
    ties = [places[n] for n in range(60) if ROWS[n].label_0 == 0.5]
    written = {
        places[int(meta.images[0].removeprefix("image-")) // 2] for meta, _ in pairs_of(plain)
    }
    assert by_fate["left out"][:12] == ties
    assert set(by_fate["left out"]) == set(places) - written
    assert set(by_fate["used"]) <= written
    counts = Counter(line["reason"] for line in lines)
    assert load_manifest(plain).statistics.imported == {"rows": 60, **counts}
    assert all(float(n) for line in lines if line["fate"] == "used" for n in line["detail"].split())


def test_what_is_left_behind(plain):
    names = {path.name for path in plain.parent.iterdir()}
    assert names == {
        *("contact_sheet.png", "left_out.csv", "recipe.yaml", "scores.parquet", "shards"),
        *("source", ".shards.lock"),
    }
    assert not list(plain.parent.rglob("*.tmp"))
    table = pq.read_table(plain.parent / "scores.parquet").to_pylist()
    assert len(table) == 96
    assert (table[1]["file"], table[1]["row"], table[1]["image"]) == ("train-0.parquet", 0, "jpg_1")
    with Image.open(plain.parent / "contact_sheet.png") as sheet:
        assert sheet.width > 100 and sheet.height > 100


@pytest.mark.parametrize("form", ["tar", "csv", "folder"])
def test_every_form_gives_the_same_pairs(plain, paired, ranks, tmp_path, form):
    write = {
        "tar": preferences.write_tar,
        "csv": preferences.write_csv,
        "folder": preferences.write_folder,
    }
    path = write[form](tmp_path / ("data" if form == "folder" else f"data.{form}"), ROWS)
    shards = prepare(paired(*(() if form == "tar" else WINNERS), path=path), ranks)

    def facts(folder: Path) -> dict[tuple[object, ...], tuple[int, np.ndarray]]:
        return {(m.prompt, m.scores): (m.tier, latents) for m, latents in pairs_of(folder)}

    found, expected = facts(shards), facts(plain)
    left = sum(load_manifest(plain).statistics.dropped_remainder_by_tier)
    common = found.keys() & expected.keys()  # which pairs are left over hangs on their ids
    assert len(common) >= 48 - 2 * left
    for key in common:
        assert found[key][0] == expected[key][0]
        np.testing.assert_allclose(found[key][1], expected[key][1], rtol=2**-9, atol=1e-3)


def test_every_format_holds_the_same_pairs(plain, paired, ranks, tiny_backbone):
    """Moments whose mean is the latents, and pixels that have these latents."""
    latents = {meta.pair_id: (meta, pair) for meta, pair in pairs_of(plain)}
    for kind in ("moments", "raw"):
        folder = prepare(paired(f"data.format={kind}", run=kind), ranks)
        manifest = load_manifest(folder)
        readers = ShardReaders(folder, manifest)
        assert (manifest.kind, manifest.num_pairs) == (kind, len(latents))
        for entry in manifest.shards:
            for index in range(entry.count):
                sample = readers.read(entry, index)
                meta, wanted = latents[sample.pair_id]
                assert sample.meta == meta
                images = torch.from_numpy(sample.images.copy())
                if kind == "raw":
                    images = tiny_backbone.image_moments(images.permute(0, 3, 1, 2))
                found = tiny_backbone.latents_of(images).numpy()
                np.testing.assert_allclose(found, wanted, rtol=2**-9, atol=1e-4)


def test_scores_that_come_with_the_data_need_no_reward(tiny_recipe, ranks, tmp_path, monkeypatch):
    path = preferences.write_ranked(tmp_path / "ranked.parquet")
    monkeypatch.setattr(imported, "load_reward", lambda *_: pytest.fail("loaded"))
    drawn: list[ContactRow] = []
    monkeypatch.setattr(preparation, "draw_contact_sheet", lambda _, rows: drawn.extend(rows))
    recipe = tiny_recipe(*RANKED, f"prepare.source.path={path}")
    shards = prepare(recipe, ranks)
    manifest = load_manifest(shards)
    assert (manifest.reward.type, manifest.reward.path) == ("given", "score")
    assert manifest.statistics.prompts == 4 and manifest.statistics.candidates == 24
    assert not (shards.parent / "scores.parquet").exists()
    found = pairs_of(shards)
    # Of 6 ranks: gaps 5 and 4 are easy, 3 and 2 next, 1 hard; at most 6 pairs of each are kept.
    for caption in preferences.CAPTIONS[:4]:
        tiers = [meta.tier for meta, _ in found if meta.prompt == caption]
        assert (tiers.count(1), tiers.count(2)) <= (3, 6)
        for meta, _ in found:
            assert meta.scores[0] > meta.scores[1]
            assert meta.ranks == (6 - meta.scores[0], 6 - meta.scores[1])
    for row in drawn:  # the contact sheet: the best image first, and of each pair the winner
        assert list(row.scores) == sorted(row.scores, reverse=True) and row.pairs
        by_score = dict(zip(row.scores, row.images, strict=True))
        for pair in row.pairs:
            assert pair.scores[0] > pair.scores[1]
            assert list(pair.images) == [by_score[score] for score in pair.scores]
    assert len(drawn) == recipe.prepare.contact_sheet_prompts > 0
    assert is_finished(recipe, ranks)


@pytest.mark.parametrize("change", [0, 1])
def test_a_picture_is_not_preferred_to_itself(
    tiny_recipe, ranks, tmp_path, capsys, monkeypatch, change
):
    """Two rows of a caption with one picture, whose scores differ: the pair of both goes. So does
    that of two which differ by so little that a coarse VAE gives the same for both.
    """
    encode = latents.shard_images
    monkeypatch.setattr(latents, "shard_images", lambda *of: (2 * encode(*of)).round() / 2)
    path = preferences.write_ranked(tmp_path / "ranked.parquet", captions=2)
    knobs = (*RANKED, f"prepare.source.path={path}", "data.pairs_per_shard=1")

    def scores_of(run: str) -> set[tuple[str, tuple[float, float]]]:
        shards = prepare(tiny_recipe(*knobs, run=run), ranks, Terminal())
        return {(meta.prompt, meta.scores) for meta, _ in pairs_of(shards)}

    expected = scores_of("whole")
    rows = pq.read_table(path).to_pylist()
    first, other = rows[0], rows[4]
    assert first["caption"] == other["caption"]
    pixels = np.array(Image.open(io.BytesIO(first["image"]["bytes"])))
    pixels[8:12, 8:12] ^= change
    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    other["image"] = {"bytes": png.getvalue(), "path": None}
    pq.write_table(pa.Table.from_pylist(rows), path)
    gone = (first["caption"], tuple(sorted((first["score"], other["score"]), reverse=True)))
    assert expected - scores_of("run") == {gone}
    assert f"1 of {len(expected)} pairs" in " ".join(capsys.readouterr().err.split())


def test_images_are_ranked_under_every_spelling_of_their_caption(tiny_recipe, ranks, tmp_path):
    """The same pairs as under one spelling, each with the text of its winner's row."""
    one = preferences.write_ranked(tmp_path / "one" / "ranked.parquet")
    rows = pq.read_table(one).to_pylist()
    for row in rows[len(rows) // 2 :]:
        row["caption"] = row["caption"].upper() + " ."
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "ranked.parquet"
    pq.write_table(pa.Table.from_pylist(rows), other, row_group_size=5)
    found = []
    for path in (one, other):
        run_dir = f"run_dir={path.parent / 'run'}"
        recipe = tiny_recipe(*RANKED, f"prepare.source.path={path}", run_dir)
        found.append(pairs_of(prepare(recipe, ranks)))
    assert [meta.pair_id for meta, _ in found[0]] == [meta.pair_id for meta, _ in found[1]]
    assert any(meta.prompt.isupper() for meta, _ in found[1])


def test_ranked_images_may_be_scored_by_the_reward(tiny_recipe, ranks, tmp_path):
    path = preferences.write_ranked(tmp_path / "ranked.parquet", scores=False)
    mine = (*RANKED, f"prepare.source.path={path}", "prepare.source.score=null")
    assert load_manifest(prepare(tiny_recipe(*mine), ranks)).reward.type == "clip_score"


def test_held_out_captions_are_not_trained_on(paired, ranks, tmp_path):
    (tmp_path / "heldout.txt").write_text(f"{DECIDED[0].caption}\nrocket\n")
    mine = [f"prompts.heldout={tmp_path / 'heldout.txt'}", "prompts.train=null"]
    shards = prepare(paired(*mine), ranks)
    imported = load_manifest(shards).statistics.imported
    same = sum(row.caption == DECIDED[0].caption for row in ROWS)
    assert imported is not None and imported["held-out prompt"] == same >= 1
    assert all(meta.prompt != DECIDED[0].caption for meta, _ in pairs_of(shards))


# Again


def test_a_copy_of_the_data_elsewhere_is_the_same_data(plain, paired, parquet, ranks, tmp_path):
    shutil.copytree(plain.parent, tmp_path / "run")
    shutil.copytree(parquet, tmp_path / "copy", copy_function=shutil.copyfile)
    assert is_finished(paired(path=tmp_path / "copy"), ranks)


def test_a_picture_beside_a_table_that_is_replaced_is_noticed(paired, ranks, tmp_path):
    """Its size, or its time alone; a copy that keeps the times is the same data."""
    path = preferences.write_csv(tmp_path / "data" / "a.csv", ROWS[:15])
    recipe = paired(*WINNERS, path=path)
    before = contents(prepare(recipe, ranks))
    shutil.copytree(path.parent, tmp_path / "copy")
    assert is_finished(paired(*WINNERS, path=tmp_path / "copy" / "a.csv"), ranks)
    picture = path.parent / "images" / "image-0.png"
    picture.write_bytes(preferences.picture(99))
    assert not is_finished(recipe, ranks)
    assert contents(prepare(recipe, ranks)) != before
    os.utime(picture, (1, 1))
    assert not is_finished(recipe, ranks)


@pytest.mark.parametrize("order", ["higher", "lower"])
def test_a_rank_of_1_wins_where_the_recipe_says_so(tiny_recipe, ranks, tmp_path, order):
    """Shards are those of scores whose sign was turned by hand, tiers and all."""
    path = preferences.write_ranked(tmp_path / "a.parquet")
    table = pq.read_table(path)
    sign = -1 if order == "lower" else 1
    scores = pa.array([sign * score for score in table["score"].to_pylist()])
    (tmp_path / "b").mkdir()
    ranked = tmp_path / "b" / path.name
    pq.write_table(table.append_column("rank", scores), ranked, row_group_size=5)
    expected = pairs_of(prepare(tiny_recipe(*RANKED, f"prepare.source.path={path}"), ranks))
    mine = ("prepare.source.score=rank", f"prepare.source.order={order}")
    asked = (*RANKED, f"prepare.source.path={ranked}", *mine)
    found = pairs_of(prepare(tiny_recipe(*asked, run="ranks"), ranks))
    assert [meta for meta, _ in found] == [meta for meta, _ in expected]


def test_two_ranks_write_what_one_writes(plain, server, tiny_world, parquet, tmp_path):
    """And a rank that is killed in either pass leaves nothing that is lost or repeated."""
    mine = [f"run_dir={tmp_path / 'run'}", *PAIRED, f"prepare.source.path={parquet}"]
    recipe = tiny_world / "recipe.yaml"
    for failpoint in ("prepare.part@2:kill/rank1", "prepare.latents@1:kill/rank0"):
        env = {"CDPO_FAILPOINT": failpoint}
        assert set(server.run("prepare", recipe, mine, ranks=2, env=env).codes) != {0}
    outcome = server.run("prepare", recipe, mine, ranks=2).succeeded()
    assert "60 rows gave 48 pairs; 12 ties" in outcome.text
    assert contents(tmp_path / "run" / "shards") == contents(plain)
    assert named(tmp_path / "run") == named(plain.parent)


# Unreadable images


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    rows = list(ROWS)
    rows[3] = preferences.judged(3, jpg_1=b"no image")
    frames = [Image.new("RGB", (24, 20), color) for color in ("red", "blue")]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    rows[8] = preferences.judged(8, jpg_0=animation.getvalue())
    rows[21] = preferences.judged(21, jpg_0=preferences.picture(42)[:-300])
    return preferences.write_parquet(tmp_path / "damaged.parquet", rows)


def test_an_unreadable_image_stops_the_import_and_is_named(paired, ranks, damaged):
    most = "prepare.source.max_unreadable"
    with refused(DataError, "unreadable", most) as caught:
        prepare(paired(path=damaged), ranks)
    assert str(caught.value).startswith(f"{damaged} row 3: jpg_1: ")
    with refused(DataError, "unreadable", most):
        prepare(paired("prepare.source.max_unreadable=1", path=damaged), ranks)


def test_unreadable_images_may_be_left_out_and_are_counted(paired, ranks, damaged):
    shards = prepare(paired("prepare.source.max_unreadable=2", path=damaged), ranks)
    manifest = load_manifest(shards)
    imported = manifest.statistics.imported
    assert imported is not None and imported.pop("labels overruled by scores") > 0
    left = sum(manifest.statistics.dropped_remainder_by_tier)
    assert imported.pop(FIRST_FRAME) == 1
    unused = {"ties": 12, "unreadable images": 2, NOT_TAKEN: left}
    assert imported == {"rows": 60} | unused
    assert manifest.num_pairs + sum(unused.values()) == 60 and left > 0
    [used] = [line for line in named(shards.parent) if line["reason"] == FIRST_FRAME]
    assert (used["where"], used["column"], used["fate"]) == ("row 8", "jpg_0", "used")
    lines = [line for line in named(shards.parent) if line["reason"] == "unreadable images"]
    assert [(line["where"], line["column"]) for line in lines] == [
        ("row 3", "jpg_1"),
        ("row 21", "jpg_0"),
    ]
    assert lines[0]["detail"].startswith("is no image of ")
    names = {name for meta, _ in pairs_of(shards) for name in meta.images}
    assert not names & {"image-6", "image-7", "image-42", "image-43"}


def test_unreadable_images_with_given_scores_are_met_when_they_are_encoded(
    tiny_recipe, ranks, tmp_path
):
    path = preferences.write_ranked(tmp_path / "ranked.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[2]["image"]["bytes"] = b"no image"
    pq.write_table(pq.read_table(path).from_pylist(rows), path, row_group_size=5)
    mine = (*RANKED, f"prepare.source.path={path}")
    with refused(DataError, "unreadable", "prepare.source.max_unreadable"):
        prepare(tiny_recipe(*mine), ranks)
    shards = prepare(tiny_recipe(*mine, "prepare.source.max_unreadable=1"), ranks)
    imported = load_manifest(shards).statistics.imported
    assert imported == {"rows": 24, "unreadable images": 1}
    [line] = [line for line in named(shards.parent) if line["reason"] == "unreadable images"]
    assert list(line.values())[:4] == ["ranked.parquet", "row 2", "image", "left out"]
    assert all(f"#{2}/" not in name for meta, _ in pairs_of(shards) for name in meta.images)


# Memory


def test_memory_does_not_grow_with_the_data(paired, ranks, tmp_path, monkeypatch):
    """200 MB of images in one row group of many pages, which is the least that can be read; a JPEG
    ends before what follows it.
    """
    images = [preferences.picture(seed, kind="JPEG") + bytes(125_000) for seed in (1, 2)]
    path = tmp_path / "large.parquet"
    rows = [
        preferences.judged(number, 1.0, jpg_0=images[0], jpg_1=images[1]) for number in range(800)
    ]
    table = pa.Table.from_pylist([vars(row) for row in rows])
    pages = {"use_dictionary": False, "write_batch_size": 8, "data_page_size": 2**20}
    pq.write_table(table, path, compression="none", row_group_size=800, **pages)
    assert path.stat().st_size > 200e6
    del table, rows
    pa.default_memory_pool().release_unused()
    before, most = [], []

    def watched(*arguments: object) -> Iterator[Loaded]:
        before.append(resident())  # the models are in memory by then
        for number, record in enumerate(load_records(*arguments)):
            if number % 16 == 0:
                most.append(resident())
            yield record

    monkeypatch.setattr(imported, "load_records", watched)
    prepare(paired("prepare.contact_sheet_prompts=0", path=path), ranks)
    assert len(most) == 2 * (16 + 16 + 16 + 2) and max(most) - before[0] < 100e6


def resident() -> int:
    """Bytes of memory this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# No pairs


def test_labels_that_the_reward_all_contradicts_are_no_pairs(tiny_recipe, ranks, tmp_path):
    path = tmp_path / "a.csv"
    lines = ["winner,loser,caption,w,l", *["a.png,b.png,x,1,2"] * 5, *["a.png,b.png,x,,2"] * 2]
    path.write_text("\n".join(lines))
    mine = (*PAIRED[:3], *WINNERS, f"prepare.source.path={path}", "prepare.source.scores=[w,l]")
    with refused(DataError, "empty", "prepare.source.path") as caught:
        prepare(tiny_recipe(*mine), ranks)
    assert "7 rows: 2 without a score, 5 scores contradict the label" in str(caught.value)
    lines = named(tmp_path / "run")
    assert [line["where"] for line in lines] == [f"line {n + 2}" for n in (5, 6, 0, 1, 2, 3, 4)]
    assert [line["detail"] for line in lines] == ["nan 2"] * 2 + ["1 2"] * 5


def test_too_few_pairs_for_the_lanes_is_said_before_anything_is_encoded(paired, ranks, monkeypatch):
    monkeypatch.setattr(latents.Latents, "run", lambda *_: pytest.fail("encoded"))
    with refused(DataError, "too-few", "tier 1"):
        prepare(paired("prepare.source.limit=3"), ranks)
