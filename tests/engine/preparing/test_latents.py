"""Latents of candidates: encoded once with one VAE, of the images they claim to be of."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.latents import Latents
from cdpo.engine.preparing.sampled import CandidateParts
from cdpo.engine.ranks import Ranks
from cdpo.engine.sources.pictures import Tolerance
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
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


@pytest.fixture
def encode(
    tmp_path: Path, backbone: CountingBackbone, ranks: Ranks, terminal: Terminal
) -> Callable[..., Latents]:
    """Encode some candidates of the prompt."""

    def run(chosen: list[int], seed: int = 0, vae: str = "vae", batch_size: int = 8) -> Latents:
        parts = CandidateParts([PROMPT], candidates(tmp_path, seed), (16, 16))
        latents = Latents(tmp_path / "latents", parts, vae)
        lost = latents.run(backbone, np.array(chosen), batch_size, ranks, Tolerance(0), terminal)
        assert len(lost) == 0
        return latents

    return run


def expected(backbone: CountingBackbone, seed: int, candidate: int) -> np.ndarray:
    [latents] = backbone.backbone.encode_images(pictures(seed)[candidate : candidate + 1])
    return latents.half().numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """To one unit of fp16, where arithmetic may depend on the batch."""
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2**-10, atol=1e-6)


def test_an_image_is_in_half_precision_with_its_framing(encode, backbone):
    latents = encode([0, 2, 3], batch_size=2)
    assert backbone.calls == [2, 1]
    for candidate in (3, 0):
        found, framing = latents.image(candidate)
        assert found.shape == (4, 8, 8) and found.dtype == np.float16
        assert framing == ((16, 16), (0, 0))
        assert_close(found, expected(backbone, 0, candidate))
    assert not np.array_equal(latents.image(0)[0], latents.image(3)[0])


def test_encoded_once(encode, backbone):
    encode([0, 2])
    encode([0, 2])
    assert backbone.calls == [2]


def test_encoded_again_with_another_vae_or_for_other_candidates(encode, backbone):
    for vae, chosen in [("vae", [0, 2]), ("other", [0, 2]), ("other", [0, 1, 2])]:
        encode(chosen, vae=vae)
    assert backbone.calls == [2, 2, 3]


def test_encoded_again_when_the_images_were_sampled_again(encode, backbone):
    """Killed while encoding, then started with another seed or guidance: the old latents would be
    latents of other images.
    """
    encode([0, 2], seed=0)
    assert_close(encode([0, 2], seed=1).image(2)[0], expected(backbone, 1, 2))


@pytest.mark.parametrize("content", [b"", b"half a file", None, "of an older version"])
def test_a_file_that_was_not_finished_is_written_again(tmp_path, encode, backbone, content):
    encode([0, 2])
    [path] = (tmp_path / "latents").iterdir()
    if content == "of an older version":  # which kept candidates, and named them in the metadata
        made_of = {"vae": "vae", "kind": "latents", "images": "0" * 64, "candidates": "0,2"}
        save_file({"latents": torch.zeros(2, 4, 8, 8).half()}, path, metadata=made_of)
    else:
        path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    assert_close(encode([0, 2]).image(0)[0], expected(backbone, 0, 0))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path, encode, monkeypatch, fill_disk
):
    candidates(tmp_path)
    monkeypatch.setattr(CandidateSet, "write", lambda *_: None)
    fill_disk()
    with refused(DataError, "unwritable"):
        encode([0, 2])
    assert list((tmp_path / "latents").iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70_000.0])
def test_latents_that_half_precision_cannot_hold_are_refused(tmp_path, encode, backbone, bad):
    def spoil(latents: Tensor) -> Tensor:
        latents[-1, 0, 0, 0] = bad
        return latents

    backbone.change = spoil
    with refused(DataError, "non-finite", "model.vae"):
        encode([0, 2])
    assert list((tmp_path / "latents").iterdir()) == []
    assert torch.isfinite(backbone.backbone.encode_images(pictures(0))).all()


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e4])
def test_latents_of_no_vae_are_refused_before_a_shard_is_written(encode, backbone, factor):
    """A scaling factor that is none: 1e-9 of any latent is 0 or -0 in half precision."""
    backbone.change = lambda latents: latents / latents.abs().max() * factor
    with refused(DataError, "out-of-range", "model.vae"):
        encode([0, 2])
