"""Sampling of candidates: the same image wherever, whenever and with whomever it is drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.basics.keyed import Stream
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import sd
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.preparing.candidates import CandidateSampler, CandidateSet, drawn_by
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Model, Sampler
from PIL import Image
from refusals import refused

PROMPTS = ["red apple", "house", "tree"]
COUNT = 3


@pytest.fixture(scope="module")
def backbone(tiny_world: Path) -> LatentDiffusion:
    spec = Model(path=str(tiny_world / "sd"), resolution=(16, 16))
    return sd.load(spec, torch.device("cpu"), torch.float32)


@pytest.fixture
def sampler(backbone: LatentDiffusion, tmp_path: Path) -> Callable[..., CandidateSampler]:
    def make(folder: str = "candidates", **changes: object) -> CandidateSampler:
        settings = {
            "seed": 3,
            "stream": Stream.CANDIDATE_NOISE,
            "count": COUNT,
            "sampler": Sampler(steps=2, guidance=2.0),
            "resolution": (16, 16),
            "batch_size": 4,
            "made_by": {"model": "tiny"},
        }
        return CandidateSampler(
            backbone, backbone.denoiser, tmp_path / folder, **settings | changes
        )

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, backbone: LatentDiffusion) -> list[str]:
    """The prompts of all images drawn so far."""
    prompts: list[str] = []
    original = backbone.sample

    def sample(net: object, names: Sequence[str], *args: object, **kwargs: object) -> object:
        prompts.extend(names)
        return original(net, names, *args, **kwargs)

    monkeypatch.setattr(backbone, "sample", sample)
    return prompts


def run(
    sampler: CandidateSampler,
    prompts: Sequence[str] = PROMPTS,
    ranks: Ranks | None = None,
) -> dict[str, np.ndarray]:
    """Sample, then read everything back as {prompt: (count, H, W, 3)}."""
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    sampler.run(prompts, ranks or alone, Terminal(enabled=False), "sample")
    return {prompt: as_array(sampler.images.read(prompt)) for prompt in prompts}


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal but for one step of the last bit of 8, where arithmetic depends on the batch."""
    for prompt, images in found.items():
        assert np.abs(images - expected[prompt]).max() <= 1, prompt


def test_every_prompt_gets_its_own_images_and_no_two_are_alike(sampler, drawn):
    found = run(sampler())
    assert sorted(drawn) == sorted(PROMPTS * COUNT)
    everything = np.concatenate(list(found.values()))
    assert everything.shape == (9, 16, 16, 3)
    assert len({image.tobytes() for image in everything}) == 9


def test_images_depend_neither_on_the_order_of_prompts_nor_on_the_batch(sampler):
    expected = run(sampler())
    assert_same(run(sampler("backwards"), PROMPTS[::-1]), expected)
    assert_same(run(sampler("alone"), PROMPTS[1:2]), expected)
    for batch_size in (1, 2, 16):
        assert_same(run(sampler(f"batch-{batch_size}", batch_size=batch_size)), expected)


def test_more_candidates_are_the_same_and_more(sampler):
    fewer, more = run(sampler("few")), run(sampler("many", count=COUNT + 2))
    assert_same(fewer, {prompt: images[:COUNT] for prompt, images in more.items()})


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_prompts(sampler, drawn, ranks, monkeypatch, world_size):
    expected = run(sampler("alone"))
    drawn.clear()
    monkeypatch.setattr(Ranks, "meet", lambda self: None)
    monkeypatch.setattr(Ranks, "until_stopped", lambda self, items: items)
    shares = []
    for rank in range(world_size):
        # What a peer has finished must not be missing from this rank's point of view: they all
        # start at once, so each is given the list of the first.
        own = Ranks(rank, world_size, rank, ranks.device)
        monkeypatch.setattr(Ranks, "on_first", lambda self, work: list(PROMPTS))
        before = len(drawn)
        sampler("shared").run(PROMPTS, own, Terminal(enabled=False), "sample")
        shares.append(set(drawn[before:]))
    assert sorted(drawn) == sorted(PROMPTS * COUNT)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    images = sampler("shared").images
    assert_same({prompt: as_array(images.read(prompt)) for prompt in PROMPTS}, expected)


def test_what_is_there_is_not_drawn_again(sampler, drawn):
    run(sampler(), PROMPTS[:2])
    drawn.clear()
    run(sampler())
    assert drawn == [PROMPTS[2]] * COUNT
    drawn.clear()
    run(sampler())
    assert drawn == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"stream": Stream.COMPARE_NOISE},
        {"count": COUNT + 1},
        {"sampler": Sampler(steps=3, guidance=2.0)},
        {"sampler": Sampler(steps=2, guidance=2.5)},
        {"resolution": (16, 24)},
        {"made_by": {"model": "other"}},
    ],
    ids=str,
)
def test_other_settings_are_drawn_again(sampler, drawn, change):
    before = run(sampler())
    drawn.clear()
    after = run(sampler(**change))
    assert len(drawn) == len(PROMPTS) * change.get("count", COUNT)
    if "made_by" not in change:  # the weights are the same here: only their name differs
        assert not np.array_equal(after["house"], before["house"])


def test_batch_size_is_no_setting(sampler, drawn):
    run(sampler())
    drawn.clear()
    run(sampler(batch_size=1))
    assert drawn == []


def test_no_call_is_larger_than_the_batch(sampler, backbone, monkeypatch):
    sizes = []
    original = backbone.sample

    def sample(net: object, names: Sequence[str], *args: object, **kwargs: object) -> object:
        sizes.append(len(names))
        return original(net, names, *args, **kwargs)

    monkeypatch.setattr(backbone, "sample", sample)
    run(sampler("small", batch_size=2))
    assert sizes == [2, 1] * len(PROMPTS)  # a prompt is drawn as a whole, in parts
    sizes.clear()
    run(sampler("large", batch_size=7))
    assert sizes == [6, 3]  # two prompts at a time


def test_images_that_have_gone_are_an_error(sampler, tmp_path):
    one = sampler()
    run(one)
    for path in (tmp_path / "candidates").iterdir():
        path.unlink()
    with refused(DataError, "missing", "house"):
        one.images.read("house")


def test_images_that_do_not_tell_their_parts_are_held_to_the_rest(tiny_world, tmp_path, picture):
    """The denoiser, and the VAE if the recipe names one: as before there were parts."""
    spec = Model(path=str(tiny_world / "sd"), resolution=(16, 16))
    backbone = sd.load(spec, torch.device("cpu"), torch.float32)
    for vae in (None, str(tiny_world / "sd" / "vae")):
        meta = {**drawn_by(spec.model_copy(update={"vae": vae}), backbone), "seed": 3}
        parts = meta.pop("parts")
        assert set(meta) == ({"model", "seed"} if vae is None else {"model", "vae", "seed"})
        folder = tmp_path / f"of {vae is None}"
        CandidateSet(folder, meta).write("house", [picture(16)])
        assert CandidateSet(folder, meta | {"parts": parts}).has("house")
        for changed in ({"seed": 4}, {"model": "another"}):
            other = CandidateSet(folder, meta | changed | {"parts": parts})
            assert not other.has("house") and other.differs_in("house") == list(changed)
