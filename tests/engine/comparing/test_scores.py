"""Scores and distances of several sides: relative rewards, keeping, and diversity by definition."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cdpo.engine.comparing.result_cache import KeptTables
from cdpo.engine.comparing.scores import SideScoring, mean_distance
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.rewards import clip_of, load_reward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

PROMPTS = ["red apple", "tree"]


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, CandidateSet]:
    generator = np.random.default_rng(0)
    found = {}
    for name in ("base", "a", "b"):
        found[name] = CandidateSet(tmp_path / name, {"count": 3, "of": name})
        for prompt in PROMPTS:
            pixels = generator.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
            found[name].write(prompt, [Image.fromarray(picture) for picture in pixels])
    return found


class Rank:
    """A reward that says where an image's brightness stands among those of its call."""

    fingerprint = "0" * 64
    calls = 0

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        assert len(set(prompts)) == 1
        Rank.calls += 1
        brightness = [np.asarray(image).mean() for image in images]
        return np.argsort(np.argsort(brightness)).astype(np.float32)


SPEC: Any = SimpleNamespace(knobs=lambda: {"type": "rank"}, label="rank")


def test_all_sides_of_a_prompt_are_scored_in_one_call_and_once(sides, tmp_path, ranks):
    Rank.calls = 0
    tables = SideScoring(tmp_path / "s", ranks, sides, PROMPTS).scores(SPEC, Rank())
    assert Rank.calls == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ranked = np.concatenate([tables[name][row] for name in sides])
        assert sorted(ranked) == list(range(9))
        bright = [np.asarray(i).mean() for side in sides.values() for i in side.read(prompt)]
        assert np.argsort(ranked).tolist() == np.argsort(bright).tolist()
    again = SideScoring(tmp_path / "s", ranks, sides, PROMPTS).scores(SPEC, Rank())
    assert Rank.calls == len(PROMPTS)
    assert all(np.array_equal(again[name], tables[name]) for name in sides)
    fewer = {name: sides[name] for name in ("base", "a")}
    SideScoring(tmp_path / "s", ranks, fewer, PROMPTS).scores(SPEC, Rank())
    assert Rank.calls == 2 * len(PROMPTS)  # other company, other relative scores


def test_distances_equal_an_independent_computation(sides, tmp_path, ranks, tiny_world):
    spec = load_recipe(tiny_world / "recipe.yaml").reward
    clip = clip_of(load_reward(spec, torch.device("cpu")))
    assert clip is not None
    found = SideScoring(tmp_path / "s", ranks, sides, PROMPTS).distances(clip, 2, "f")
    model = CLIPModel.from_pretrained(tiny_world / "reward").double()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_world / "reward")
    for name, side in sides.items():
        for row, prompt in enumerate(PROMPTS):
            pixels = processor(side.read(prompt), return_tensors="pt")["pixel_values"].double()
            with torch.no_grad():
                pooled = model.vision_model(pixel_values=pixels).pooler_output
                vectors = model.visual_projection(pooled)
            distances = [
                1 - float(torch.cosine_similarity(vectors[i], vectors[j], dim=0))
                for i, j in itertools.combinations(range(3), 2)
            ]
            assert found[name][row] == pytest.approx(np.mean(distances), rel=1e-4, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(2, 6), st.integers(1, 5)),
        elements=st.floats(-1, 1, width=32).filter(lambda x: abs(x) > 1e-3),
    )
)
def test_mean_distance_is_the_mean_over_pairs(vectors):
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - one @ two for one, two in itertools.combinations(units, 2)]
    assert mean_distance(units) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert -1e-12 <= mean_distance(units) <= 2
    alike = np.repeat(units[:1], 4, axis=0)
    assert mean_distance(alike) == pytest.approx(0, abs=1e-12)


def test_one_image_has_no_distance():
    assert np.isnan(mean_distance(np.ones((1, 3))))


def test_kept_tables_are_of_their_ingredients_or_none(tmp_path):
    kept = KeptTables(tmp_path)
    table = np.array([[1.5, np.nan], [0.1, 2.0]])
    kept.write("scores", {"weights": "a"}, {"base": table, "beta 50": table[:, ::-1]})
    found = kept.read("scores", {"weights": "a"})
    assert found is not None
    np.testing.assert_array_equal(found["base"], table)
    np.testing.assert_array_equal(found["beta 50"], table[:, ::-1])
    assert kept.read("scores", {"weights": "b"}) is None
    assert kept.read("other", {"weights": "a"}) is None
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert kept.read("scores", {"weights": "a"}) is None
