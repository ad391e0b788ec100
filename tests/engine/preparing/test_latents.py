"""Latents of candidates: encoded once with one VAE, of the images they claim to be of."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.latents import LatentStore
from PIL import Image
from torch import Tensor

PROMPT = "a dog"


def pictures(seed: int, count: int = 4) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


class CountingBackbone:
    """Encodes images with the tiny VAE and remembers how many at a time."""

    def __init__(self, backbone: LatentDiffusion) -> None:
        self.backbone = backbone
        self.calls: list[int] = []
        self.change: Callable[[Tensor], Tensor] = lambda latents: latents

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        self.calls.append(len(images))
        return self.change(self.backbone.encode_images(images))


@pytest.fixture
def backbone(tiny_backbone: LatentDiffusion) -> CountingBackbone:
    return CountingBackbone(tiny_backbone)


def candidates(folder: Path, seed: int = 0) -> CandidateSet:
    images = CandidateSet(folder / "candidates", {"count": 4, "seed": seed})
    images.write(PROMPT, pictures(seed))
    return images


def expected(backbone: CountingBackbone, seed: int, candidate: int) -> np.ndarray:
    [latents] = backbone.backbone.encode_images(pictures(seed)[candidate : candidate + 1])
    return latents.half().numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """To one unit of fp16, where arithmetic may depend on the batch."""
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2**-10, atol=1e-6)


def test_a_pair_is_the_winner_then_the_loser_in_half_precision(tmp_path, backbone):
    store = LatentStore(tmp_path / "latents", candidates(tmp_path), "vae")
    store.encode(backbone, PROMPT, [0, 2, 3], batch_size=2)
    assert backbone.calls == [2, 1]
    pair = store.pair(PROMPT, winner=3, loser=0)
    assert pair.shape == (2, 4, 8, 8) and pair.dtype == np.float16
    assert_close(pair[0], expected(backbone, 0, 3))
    assert_close(pair[1], expected(backbone, 0, 0))
    assert not np.array_equal(pair[0], pair[1])


def test_encoded_once(tmp_path, backbone):
    images = candidates(tmp_path)
    LatentStore(tmp_path / "latents", images, "vae").encode(backbone, PROMPT, [0, 2], 8)
    LatentStore(tmp_path / "latents", images, "vae").encode(backbone, PROMPT, [0, 2], 8)
    assert backbone.calls == [2]


def test_encoded_again_with_another_vae_or_for_other_candidates(tmp_path, backbone):
    images = candidates(tmp_path)
    for vae, chosen in [("vae", [0, 2]), ("other", [0, 2]), ("other", [0, 1, 2])]:
        LatentStore(tmp_path / "latents", images, vae).encode(backbone, PROMPT, chosen, 8)
    assert backbone.calls == [2, 2, 3]


def test_encoded_again_when_the_images_were_sampled_again(tmp_path, backbone):
    """Killed while encoding, then started with another seed or guidance: the old latents would be
    latents of other images.
    """
    LatentStore(tmp_path / "latents", candidates(tmp_path, seed=0), "vae").encode(
        backbone, PROMPT, [0, 2], 8
    )
    store = LatentStore(tmp_path / "latents", candidates(tmp_path, seed=1), "vae")
    store.encode(backbone, PROMPT, [0, 2], 8)
    assert_close(store.pair(PROMPT, 2, 0)[0], expected(backbone, 1, 2))


@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_a_file_that_was_not_finished_is_written_again(tmp_path, backbone, content):
    store = LatentStore(tmp_path / "latents", candidates(tmp_path), "vae")
    store.encode(backbone, PROMPT, [0, 2], 8)
    [path] = (tmp_path / "latents").iterdir()
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    again = LatentStore(tmp_path / "latents", store.images, "vae")
    again.encode(backbone, PROMPT, [0, 2], 8)
    assert_close(again.pair(PROMPT, 2, 0)[1], expected(backbone, 0, 0))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, backbone, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LatentStore(tmp_path / "latents", candidates(tmp_path), "vae")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*\.safetensors: No space left on device"):
        store.encode(backbone, PROMPT, [0, 2], 8)
    assert list((tmp_path / "latents").iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70_000.0])
def test_latents_that_half_precision_cannot_hold_are_refused(tmp_path, backbone, bad):
    def spoil(latents: Tensor) -> Tensor:
        latents[-1, 0, 0, 0] = bad
        return latents

    backbone.change = spoil
    store = LatentStore(tmp_path / "latents", candidates(tmp_path), "vae")
    with pytest.raises(DataError, match="latents of 'a dog' overflow half precision or are NaN"):
        store.encode(backbone, PROMPT, [0, 2], 8)
    assert list((tmp_path / "latents").iterdir()) == []
    assert torch.isfinite(backbone.backbone.encode_images(pictures(0))).all()
