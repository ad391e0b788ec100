"""The CLIP score against transformers' own forward of the whole model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.recipe.reward import ClipScoreSpec
from cdpo.engine.rewards import RewardModel, load_reward
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

CPU = torch.device("cpu")
PROMPTS = ["red apple", "house", "a long prompt " * 40, "red apple", ""]


def load(folder: Path, batch_size: int = 64) -> RewardModel:
    return load_reward(ClipScoreSpec(path=str(folder), batch_size=batch_size), CPU)


@pytest.fixture(scope="module")
def reward(tiny_world: Path) -> RewardModel:
    return load(tiny_world / "reward")


def pictures(count: int = len(PROMPTS), size: tuple[int, int] = (24, 24)) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_a_folder_of_open_clip_is_named_as_such(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 24}}')
    (tmp_path / "open_clip_model.safetensors").touch()
    with refused(OutsideError, "unreadable", str(tmp_path)) as told:
        load_reward(ClipScoreSpec(path=str(tmp_path)), CPU)
    assert str(told.value).endswith("of open_clip: the model is wanted in transformers' format")


@torch.no_grad()
def test_it_is_the_cosine_that_clip_itself_computes(reward, tiny_world):
    folder = tiny_world / "reward"
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS,
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt")
    output = model(**tokens, **pixels)
    expected = (output.logits_per_image / model.logit_scale.exp()).diagonal()
    found = reward.score(pictures(), PROMPTS)
    assert found.dtype == np.float32 and found.shape == (len(PROMPTS),)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(reward, tiny_world):
    whole = reward.score(pictures(), PROMPTS)
    for batch_size in (1, 2):
        other = load(tiny_world / "reward", batch_size).score(pictures(), PROMPTS)
        np.testing.assert_allclose(other, whole, rtol=0, atol=1e-6)
    backwards = reward.score(pictures()[::-1], PROMPTS[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, rtol=0, atol=1e-6)


def test_images_of_any_size_and_mode(reward):
    large, gray = pictures(1, (40, 33))[0], pictures(1)[0].convert("L")
    scores = reward.score([large, gray.convert("RGB"), gray], ["tree"] * 3)
    assert np.isfinite(scores).all()
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)


def test_each_prompt_is_embedded_once(tiny_world):
    reward = load(tiny_world / "reward", batch_size=2)
    rows: list[int] = []
    reward.scorer.clip.model.text_model.register_forward_hook(lambda *_: rows.append(1))
    reward.score(pictures(), PROMPTS)
    reward.score(pictures(), PROMPTS)
    assert len(rows) == len(set(PROMPTS))


def test_none_and_unequal_numbers(reward):
    assert reward.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="5 images but 1 prompts"):
        reward.score(pictures(), ["house"])


def test_fingerprint_tells_models_apart(reward, tiny_world):
    assert load(tiny_world / "reward").fingerprint == reward.fingerprint
    assert load(tiny_world / "judge").fingerprint != reward.fingerprint


def a_tensor_is_missing(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "absent": shutil.rmtree,
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "bad JSON": lambda folder: (folder / "config.json").write_text("{"),
    "truncated": lambda folder: cut(folder / "model.safetensors"),
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "a tensor is missing": a_tensor_is_missing,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_it(damage, tmp_path, tiny_world):
    """transformers fills missing tensors with random numbers and makes up an empty tokenizer:
    either would rank the candidates by chance.
    """
    folder = shutil.copytree(tiny_world / "reward", tmp_path / "reward")
    DAMAGES[damage](folder)
    with refused(OutsideError, "unreadable") as told:
        load(folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)
