"""Masked prompts: which entries are zero, and that stock pipelines draw what the masks say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics import keyed
from cdpo.engine.basics.keyed import Stream, content_id
from cdpo.engine.models import load_backbone
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.masking import PromptMask
from cdpo.engine.recipe.reading import load_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house", "tree"]
SHARES = (0.9, 0.0, 0.3)


def keys_of(*names: str, seed: int = 3) -> torch.Tensor:
    return keyed.make_keys(seed, Stream.PROMPT_MASK, [content_id(name) for name in names])


def zeros(
    share: float, size: int = 500, part: int = 0, name: str = "a", seed: int = 3
) -> np.ndarray:
    return PromptMask(keys_of(name, seed=seed), [share]).zeros(0, part, size, CPU).numpy()


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_shares_are_exact_and_a_larger_one_zeroes_what_a_smaller_one_does(size, one, other):
    smaller, larger = sorted((one, other))
    few, many = zeros(smaller, size), zeros(larger, size)
    assert abs(few.sum() - smaller * size) <= 0.5 and abs(many.sum() - larger * size) <= 0.5
    assert not (few & ~many).any()
    assert not zeros(0.0, size).any() and zeros(1.0, size).all()


def test_what_is_zero_is_drawn_by_seed_name_and_part():
    base = zeros(0.5)
    assert np.array_equal(base, zeros(0.5))
    others = (zeros(0.5, seed=4), zeros(0.5, name="b"), zeros(0.5, part=1))
    for other in others:
        assert 150 < (base != other).sum() < 350  # 250 expected, 11 standard deviation


def test_entries_are_drawn_evenly():
    """Over many prompts every entry is zero as often as the share says."""
    mask = PromptMask(keys_of(*map(str, range(400))), [0.3] * 400)
    hits = torch.stack([mask.zeros(row, 0, 64, CPU) for row in range(400)]).sum(0)
    assert hits.min() > 80 and hits.max() < 160  # 120 expected, 9.2 standard deviation


def test_prompts_of_their_own_lengths_lose_their_share_each():
    """Of its own entries: what a batch would fill up with counts for nothing."""
    given = [torch.ones(2, 10), torch.ones(30, 10)]
    found = PromptMask(keys_of("a", "b"), [0.5, 0.1]).apply({"prompt_embeds": given})
    assert [int((row == 0).sum()) for row in found["prompt_embeds"]] == [10, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_the_prompts_own_embeddings_are_masked(dtype):
    inputs = {
        name: torch.full(shape, 2.0, dtype=dtype)
        for name, shape in (
            ("prompt_embeds", (3, 7, 16)),
            ("negative_prompt_embeds", (3, 7, 16)),
            ("pooled_prompt_embeds", (3, 12)),
            ("negative_pooled_prompt_embeds", (3, 12)),
        )
    }
    masked = PromptMask(keys_of(*PROMPTS), SHARES).apply(inputs)
    assert all(torch.equal(value, torch.full_like(value, 2.0)) for value in inputs.values())
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert torch.equal(masked[name], inputs[name])
    for name, counts in (("prompt_embeds", [101, 0, 34]), ("pooled_prompt_embeds", [11, 0, 4])):
        assert masked[name].dtype == dtype and masked[name].shape == inputs[name].shape
        assert (masked[name].flatten(1) == 0).sum(1).tolist() == counts
        assert set(masked[name].unique().tolist()) == {0.0, 2.0}


# --------------------------------------------------------------------------------------------------
# In the families


@pytest.fixture(scope="module", params=["sd", "sdxl", "lcm"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp(request.param)
    recipe = tiny.write_recipe(folder / "recipe.yaml", tiny.build(folder, request.param))
    return load_backbone(load_recipe(recipe).model, CPU)


def expected_zeros(prompt: str, part: int, size: int, share: float) -> np.ndarray:
    """By the definition: the entries with the lowest words of the keyed draw, sorted in Python."""
    key = keyed.make_keys(3, Stream.PROMPT_MASK, [content_id(prompt)], part)
    words = keyed.philox_uint32(key, size)[0].tolist()
    lowest = sorted(range(size), key=lambda entry: (words[entry], entry))
    found = np.zeros(size, dtype=bool)
    found[lowest[: round(share * size)]] = True
    return found


def masked_by_hand(values: torch.Tensor, part: int) -> torch.Tensor:
    rows = values.float().numpy().copy()
    for row, (prompt, share) in enumerate(zip(PROMPTS, SHARES, strict=True)):
        rows[row].reshape(-1)[expected_zeros(prompt, part, rows[row].size, share)] = 0
    return torch.from_numpy(rows)


def test_stock_pipelines_draw_the_same_from_masked_embeddings(
    backbone: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
):
    """To the last bit: the pipeline of diffusers on embeddings that were masked without our code,
    against ours; the latents, before anything is rounded to 256 levels.
    """
    monkeypatch.setattr(backbone.vae, "decode", lambda latents: latents)
    noise = keyed.normal(keyed.make_keys(3, Stream.CANDIDATE_NOISE, [1, 2, 3]), (4, 8, 8))
    given = {"steps": 3, "guidance": 4.0}
    mask = PromptMask(keys_of(*PROMPTS), SHARES)
    found = backbone.sample(backbone.denoiser, PROMPTS, noise, mask=mask, **given)

    whole, empty = backbone.encode_prompts(PROMPTS), backbone.encode_prompts([""] * 3)
    embeds = {"prompt_embeds": masked_by_hand(whole.text, 0), "negative_prompt_embeds": empty.text}
    if "text_embeds" in whole.extras:
        embeds["pooled_prompt_embeds"] = masked_by_hand(whole.extras["text_embeds"], 1)
        embeds["negative_pooled_prompt_embeds"] = empty.extras["text_embeds"]
    pipeline = type(backbone.pipeline)(**backbone.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [content_id(row.numpy().tobytes().hex()) for row in noise]
    expected = pipeline(
        **embeds,
        latents=noise,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3,
        guidance_scale=4.0,
        height=16,
        width=16,
        output_type="latent",
    ).images
    assert torch.equal(found, expected)

    unmasked = backbone.sample(backbone.denoiser, PROMPTS, noise, **given)
    differs = [not torch.equal(one, other) for one, other in zip(found, unmasked, strict=True)]
    assert differs == [True, False, True]
    nothing = PromptMask(keys_of(*PROMPTS), [0.0] * 3)
    again = backbone.sample(backbone.denoiser, PROMPTS, noise, mask=nothing, **given)
    assert torch.equal(again, unmasked)
