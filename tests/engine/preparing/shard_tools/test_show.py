"""`cdpo shards show`: counts, histograms and a sheet of the pairs that a set holds."""

import re

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.models import fingerprint
from cdpo.engine.models.autoencoder import Autoencoder
from cdpo.engine.preparing.shard_tools import sheet
from cdpo.engine.preparing.shard_tools.command import main
from cdpo.engine.preparing.shard_tools.show import BINS, pairs_of, sparkline, spread, survey
from cdpo.engine.shards.contents import contents_of
from cdpo.engine.shards.manifest import VaeSource, load_manifest, save_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.writer import write_shard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture
def folder(small, tmp_path):
    small.write_set(tmp_path / "set", 2, [12, 8], 3)
    return tmp_path / "set"


def test_a_set_on_one_screen(folder, capsys):
    assert main(["show", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "12", "4", "3", "0.0", "1"] in rows
    assert ["2", "8", "4", "2", "0.0", "1"] in rows
    assert "20 pairs, latents 4x2x2 of 16x16 px" in out
    assert "winner's score less loser's (all pairs)" in out
    assert len(re.findall(rf"\|.{{{BINS}}}\|", out)) == 6  # three histograms of two tiers
    assert ["0.5", "0.5", "0.5"] in [row[-3:] for row in rows]  # 0.75 against 0.25 everywhere


def test_few_pairs_of_many_shards(folder, capsys):
    main(["show", str(folder), "--pairs", "2"])
    assert "(4 of 20 pairs)" in capsys.readouterr().out
    manifest = load_manifest(folder)
    assert [len(tier.scores) for tier in survey(folder, manifest, 7)] == [7, 7]
    readers = ShardReaders(folder, manifest)
    read = [sample.pair_id for sample in pairs_of(readers, manifest.shards[:4], 100)]
    assert len(read) == len(set(read)) == 12


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_spread_is_even_and_without_repeats(count, at_most):
    chosen = spread(count, at_most)
    assert len(chosen) == len(set(chosen)) == min(count, at_most)
    assert chosen[0] == 0
    assert chosen[-1] < count
    steps = np.diff([*chosen, count])
    assert steps.max() - steps.min() <= 1


def test_sparklines_by_hand():
    line = sparkline(np.array([0.0, 0.0, 0.0, 0.0, 1.0]), 0.0, 1.0)
    assert line == "█" + " " * (BINS - 2) + "▂"
    assert sparkline(np.array([2.0]), 2.0, 2.0, unicode=False).strip() == "@"


@pytest.fixture
def pictured(small, tmp_path):
    """A set whose VAE is in a pipeline's folder, and that VAE."""
    torch.manual_seed(0)
    vae = tiny.vae()
    vae.save_pretrained(tmp_path / "model" / "vae")
    small.write_set(tmp_path / "set", 2, [4, 4], 3)
    autoencoder = Autoencoder(vae)
    source = VaeSource(
        path=str(tmp_path / "model"), fingerprint=fingerprint(vae), scaling_factor=0.5
    )
    manifest = load_manifest(tmp_path / "set").model_copy(update={"vae": source})
    save_manifest(tmp_path / "set", manifest)
    return tmp_path / "set", autoencoder


def test_the_sheet_shows_what_the_latents_are(pictured, tmp_path, capsys, monkeypatch):
    folder, autoencoder = pictured
    drawn = []
    real = sheet.draw_contact_sheet
    monkeypatch.setattr(
        sheet, "draw_contact_sheet", lambda path, rows: drawn.extend(rows) or real(path, rows)
    )
    assert main(["show", str(folder), "--sheet", str(tmp_path / "s.png"), "--prompts", "3"]) == 0
    assert f"look at: {tmp_path / 's.png'}" in capsys.readouterr().out
    assert min(Image.open(tmp_path / "s.png").size) > 100
    assert len(drawn) == 3
    [pair] = drawn[0].pairs
    readers = ShardReaders(folder, load_manifest(folder))
    sample = readers.read(load_manifest(folder).shards[0], 0)
    assert (drawn[0].prompt, pair.tier) == (sample.prompt, 1)
    decoded = autoencoder.decode(torch.from_numpy(sample.images.copy()))
    assert np.array_equal([*map(np.asarray, pair.images)], [*map(np.asarray, decoded)])


def test_the_sheet_of_moments_and_of_raw_images(small, pictured, tmp_path):
    _, autoencoder = pictured
    meta, moments = small.meta(1, 0), np.zeros((2, 8, 8, 8), np.float16)
    moments[0, :4] = 0.5  # means; variances show in no picture
    moments[:, 4:] = -3
    path, source = str(tmp_path / "model"), fingerprint(autoencoder.vae)
    decoded = autoencoder.decode(autoencoder.latents(torch.from_numpy(moments)))
    pixels = np.stack([np.asarray(image) for image in decoded])
    for kind, pair, vae in (("moments", moments, path), ("raw", pixels, "nowhere")):
        entry = write_shard(
            tmp_path / "t.tar", [(meta, pair)], contents_of(kind, (4, 8, 8), (16, 16))
        )
        manifest = small.manifest(
            [entry],
            1,
            1,
            kind=kind,
            latent_shape=(4, 8, 8),
            vae=VaeSource(path=vae, fingerprint=source, scaling_factor=0.5),
        )
        sheet.draw_sheet(tmp_path, manifest, tmp_path / f"{kind}.png", 1)
    drawn = [np.asarray(Image.open(tmp_path / f"{kind}.png")) for kind in ("moments", "raw")]
    assert np.array_equal(*drawn)


def test_prompts_with_most_tiers_come_first(small, tmp_path):
    def shard(tier, prompts):
        metas = [
            small.meta(tier, number).model_copy(update={"prompt": prompt})
            for number, prompt in enumerate(prompts)
        ]
        samples = [(meta, small.latents(meta)) for meta in metas]
        return write_shard(tmp_path / f"t{tier}.tar", samples, small.CONTENTS)

    manifest = small.manifest([shard(1, ["a", "b", "c"]), shard(2, ["c", "c", "b"])], 1, 2)
    chosen = sheet.choose(tmp_path, manifest, 2)
    found = [[(pair.prompt, pair.tier) for pair in pairs] for pairs in chosen]
    assert found == [[("b", 1), ("b", 2)], [("c", 1), ("c", 2)]]


def test_no_sheet_without_the_vae_that_made_the_set(pictured, tmp_path, capsys):
    folder, _ = pictured
    tiny.vae().save_pretrained(tmp_path / "model" / "vae")
    arguments = ["show", str(folder), "--sheet", str(tmp_path / "s.png")]
    assert main(arguments) == 6
    assert "has other weights than the one that made the set" in capsys.readouterr().err
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert main(arguments) == 6
    assert "that is no folder here" in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()
