"""Rewards loaded from files written in their published formats, with CLIP's own vocabulary.

Each oracle is the model's forward written down here in plain float64 PyTorch, over the tensors as
they stand in the file: none of the names, models and processors that the rewards use.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reward_files as files
import torch
import torch.nn.functional as F
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.recipe.reward import (
    AestheticSpec,
    ClipScoreSpec,
    HpsSpec,
    ImageRewardSpec,
    PickScoreSpec,
)
from cdpo.engine.rewards import load_reward
from cdpo.engine.rewards.aesthetic import LAYERS, linear_layers
from cdpo.engine.rewards.hps import HEADS, fitted_whole
from cdpo.engine.rewards.tensor_files import read_tensors
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "An astronaut, riding a HORSE!", "a photo of a cat", "", "dog " * 99]
IMAGES = files.pictures(len(PROMPTS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    files.clip_tokenizer(folder)
    return folder


def clip_ids(folder: Path) -> torch.Tensor:
    """As open_clip tokenizes: 77 places, zeros after the end token, which a cut text keeps."""
    tokens = files.CLIPTokenizer.from_pretrained(folder)
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        own = tokens(prompt, add_special_tokens=False).input_ids[:75]
        ids[row, : len(own) + 2] = torch.tensor([49406, *own, 49407])
    return ids


def test_the_vocabulary_is_clips_own(tokenizer):
    tokens = files.CLIPTokenizer.from_pretrained(tokenizer)
    assert tokens("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokens) == 49408


# --------------------------------------------------------------------------------------------------
# open_clip, written down


class OpenClip:
    """Both towers over an open_clip state dict, in float64."""

    def __init__(self, tensors: files.Tensors) -> None:
        self.tensors = {name: value.double() for name, value in tensors.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def block(self, x: torch.Tensor, name: str, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.norm(x, f"{name}.ln_1")
        packed = normed @ self.tensors[f"{name}.attn.in_proj_weight"].T
        packed = packed + self.tensors[f"{name}.attn.in_proj_bias"]
        x = x + self.linear(attend(*packed.chunk(3, -1), HEADS, mask), f"{name}.attn.out_proj")
        inner = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        return x + self.linear(F.gelu(inner), f"{name}.mlp.c_proj")

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = F.conv2d(pixels, self.tensors["visual.conv1.weight"], stride=8)
        patches = patches.flatten(2).transpose(1, 2)
        first = self.tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.tensors["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre")
        for number in range(2):
            x = self.block(x, f"visual.transformer.resblocks.{number}", None)
        pooled = self.norm(x[:, 0], "visual.ln_post") @ self.tensors["visual.proj"]
        return F.normalize(pooled, dim=-1)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tensors["token_embedding.weight"][ids] + self.tensors["positional_embedding"]
        later = torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1)
        for number in range(2):
            x = self.block(x, f"transformer.resblocks.{number}", later)
        x = self.norm(x, "ln_final")[torch.arange(len(ids)), ids.argmax(-1)]
        return F.normalize(x @ self.tensors["text_projection"], dim=-1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def open_clip() -> files.Tensors:
    return files.open_clip_tensors(49408)


WRITTEN: dict[str, Callable[[files.Tensors, Path], None]] = {
    "as published": lambda tensors, path: torch.save({"epoch": 3, "state_dict": tensors}, path),
    "of several GPUs": lambda tensors, path: torch.save(
        {"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, path
    ),
    "in half precision": torch.save,
    "as safetensors": save_file,
}


@pytest.mark.parametrize("way", WRITTEN)
def test_hps_is_the_cosine_of_open_clip(way, open_clip, tokenizer, tmp_path):
    path = tmp_path / ("hps.safetensors" if way == "as safetensors" else "HPS_v2.1_compressed.pt")
    stored = open_clip
    if way == "in half precision":
        stored = {name: value.half() for name, value in open_clip.items()}
    WRITTEN[way](stored, path)
    reward = load_reward(HpsSpec(path=str(path), tokenizer=str(tokenizer)), CPU)
    oracle = OpenClip(stored)
    image, text = oracle.image(files.normalised(IMAGES)), oracle.text(clip_ids(tokenizer))
    found = reward.score(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (image * text).sum(-1).numpy(), rtol=0, atol=2e-6)
    assert np.ptp(found) > 0.05


def test_hps_shows_all_of_an_image_that_is_not_square():
    """Ends red and blue, bars black: 40 x 20 becomes 16 x 8 with 4 rows above and below."""
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    fitted = np.asarray(fitted_whole(image, 16)).astype(int)
    assert fitted.shape == (16, 16, 3)
    assert (fitted[4:12] == 255).all() and (fitted[:4] == 0).all() and (fitted[12:] == 0).all()
    tall = np.asarray(fitted_whole(image.rotate(90, expand=True), 16))
    assert (tall == fitted.transpose(1, 0, 2)).all()
    same = files.pictures(1)[0]
    assert fitted_whole(same, 16).tobytes() == same.tobytes()


@dataclass(frozen=True)
class PreferenceModel:
    """As PickScore is published, weights alone and the processor elsewhere; and in one folder."""

    model: CLIPModel
    weights: Path
    processor: Path
    whole: Path


@pytest.fixture(scope="module")
def preference(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> PreferenceModel:
    torch.manual_seed(2)
    small = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"hidden_size": 16, "projection_dim": 12}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 49408, "eos_token_id": 49407},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model, size = CLIPModel(config).eval(), {"height": 16, "width": 16}
    folders = [tmp_path_factory.mktemp(name) for name in ("weights", "processor", "whole")]
    weights, processor, whole = folders
    model.save_pretrained(weights)
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(processor)
    shutil.copytree(tokenizer, processor, dirs_exist_ok=True)
    for part in (weights, processor):
        shutil.copytree(part, whole, dirs_exist_ok=True)
    return PreferenceModel(model, *folders)


@torch.no_grad()
def test_pick_score_is_the_logit_of_the_whole_model(preference, tokenizer):
    with refused(OutsideError, "unreadable"):
        load_reward(PickScoreSpec(path=str(preference.weights)), CPU)
    spec = PickScoreSpec(path=str(preference.weights), processor=str(preference.processor))
    pixels = files.normalised(IMAGES).float()
    ids = clip_ids(tokenizer)
    logits = preference.model(input_ids=ids, pixel_values=pixels).logits_per_image
    reward = load_reward(spec, CPU)
    found = reward.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(found, logits.diagonal().numpy(), rtol=0, atol=2e-5)
    half = load_reward(spec.model_copy(update={"precision": "bf16"}), CPU)
    rough = half.score(IMAGES, PROMPTS)
    assert rough.dtype == np.float32 and (rough != found).any()
    np.testing.assert_allclose(rough, found, rtol=0, atol=0.15)
    assert half.fingerprint != reward.fingerprint


def test_the_same_weights_as_another_reward_are_another_reward(preference, tmp_path):
    """Cosine and logit of one folder: kept scores of the one are none of the other."""
    cosines, logits = (
        load_reward(kind(path=str(preference.whole)), CPU, tmp_path).score(IMAGES, PROMPTS)
        for kind in (ClipScoreSpec, PickScoreSpec)
    )
    np.testing.assert_allclose(
        logits, preference.model.logit_scale.exp().item() * cosines, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_rates_normalised_image_embeddings(suffix, preference, tmp_path):
    head = tmp_path / f"sac+logos+ava1-l14-linearMSE.{suffix}"
    tensors = files.rating_tensors(12)
    save_file(tensors, head) if suffix == "safetensors" else torch.save(tensors, head)
    reward = load_reward(AestheticSpec(path=str(preference.whole), head=str(head)), CPU)
    pixels = files.normalised(IMAGES).float()
    seen = preference.model.get_image_features(pixel_values=pixels)
    x = (seen if isinstance(seen, torch.Tensor) else seen.pooler_output).double()
    x = x / x.norm(dim=-1, keepdim=True)
    for place in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{place}.weight"].double().T + tensors[f"layers.{place}.bias"]
    found = reward.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(found, x[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(reward.score(IMAGES, [""] * len(IMAGES)), found)


@torch.no_grad()
def test_the_first_aesthetic_predictor_is_one_layer(tiny_world, tmp_path):
    head = tmp_path / "sa_0_4_vit_l_14_linear.pth"
    layer = nn.Linear(16, 1)
    torch.save(layer.state_dict(), head)
    reward = load_reward(AestheticSpec(path=str(tiny_world / "reward"), head=str(head)), CPU)
    seen = reward.scorer.clip.embed_images(IMAGES).double()
    expected = (seen @ layer.weight.double().T + layer.bias)[:, 0]
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), expected.numpy(), rtol=1e-5)


FIELD = Path(__file__).parents[4] / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"


@torch.no_grad()
@pytest.mark.skipif(not FIELD.is_file(), reason="the field's own files are not beside the tree")
def test_the_published_aesthetic_head_rates_around_five():
    head = linear_layers(read_tensors(str(FIELD)), "layers.", LAYERS)
    unit = F.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    ratings = head(unit)
    assert ratings.isfinite().all() and 3 < ratings.mean() < 7 and ratings.std() > 0.05


# --------------------------------------------------------------------------------------------------
# ImageReward, written down


class Blip(OpenClip):
    """BLIP's encoders and the rating layers over an ImageReward state dict, in float64."""

    def attention(
        self, x: torch.Tensor, seen: torch.Tensor, name: str, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = self.linear(x, f"{name}.self.query")
        key, value = (self.linear(seen, f"{name}.self.{part}") for part in ("key", "value"))
        mixed = self.linear(attend(query, key, value, 1, mask), f"{name}.output.dense")
        return self.post_norm(x + mixed, f"{name}.output.LayerNorm")

    def post_norm(self, x: torch.Tensor, name: str, eps: float = 1e-12) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = "blip.visual_encoder"
        weight = self.tensors[f"{tower}.patch_embed.proj.weight"]
        bias = self.tensors[f"{tower}.patch_embed.proj.bias"]
        patches = F.conv2d(pixels, weight, bias, stride=8).flatten(2).transpose(1, 2)
        first = self.tensors[f"{tower}.cls_token"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.tensors[f"{tower}.pos_embed"]
        block = f"{tower}.blocks.0"
        packed = self.linear(self.post_norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
        x = x + self.linear(attend(*packed.chunk(3, -1), 2, None), f"{block}.attn.proj")
        inner = self.linear(self.post_norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
        x = x + self.linear(F.gelu(inner), f"{block}.mlp.fc2")
        return self.post_norm(x, f"{tower}.norm", 1e-6)

    def rate(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen, tower = self.see(pixels), "blip.text_encoder"
        x = self.tensors[f"{tower}.embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors[f"{tower}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.post_norm(x, f"{tower}.embeddings.LayerNorm")
        hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, -torch.inf)
        for number in range(2):
            layer = f"{tower}.encoder.layer.{number}"
            x = self.attention(x, x, f"{layer}.attention", hidden[:, None, None])
            x = self.attention(x, seen, f"{layer}.crossattention", None)
            inner = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.post_norm(
                x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm"
            )
        x = x[:, 0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{place}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, files.Tensors]:
    """Folder of a tokenizer, checkpoint, and what is in that."""
    folder = tmp_path_factory.mktemp("image_reward")
    tensors = files.image_reward_tensors(len(files.bert_tokenizer(folder)))
    torch.save(tensors, folder / "ImageReward.pt")
    return folder, folder / "ImageReward.pt", tensors


def test_image_reward_is_the_rating_of_its_blip(image_reward):
    folder, path, tensors = image_reward
    prompts = ["a dog on a bike", "red apple", "", "tree " * 60, "a cat"]
    tokens = files.BertTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    oracle = Blip(tensors)
    expected = oracle.rate(files.normalised(IMAGES), tokens.input_ids, tokens.attention_mask)
    reward = load_reward(ImageRewardSpec(path=str(path), tokenizer=str(folder)), CPU)
    found = reward.score(IMAGES, prompts)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert len(set(found.tolist())) == len(prompts)


# --------------------------------------------------------------------------------------------------
# Files that are not what they should be


class Malicious:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("code of a checkpoint ran",)


def changed(edit: Callable[[files.Tensors], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        edit(tensors)
        torch.save(tensors, path)

    return change


def last_of_block_1(tensors: files.Tensors, ending: str = "") -> str:
    return max(name for name in tensors if "1." in name and name.endswith(ending))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no file": Path.unlink,
    "no tensors": lambda path: torch.save({"state_dict": {}}, path),
    "code": lambda path: torch.save({"state_dict": {"a": torch.zeros(1), "b": Malicious()}}, path),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4000]),
    "not a checkpoint": lambda path: path.write_text("<html>404</html>"),
    "no block": changed(lambda tensors: [tensors.pop(n) for n in list(tensors) if "0.mlp" in n]),
    "a tensor less": changed(lambda tensors: tensors.pop(last_of_block_1(tensors))),
    "a tensor more": changed(
        lambda tensors: tensors.update({"blip.text_encoder.x": torch.zeros(1)})
    ),
    "another shape": changed(
        lambda tensors: tensors.update({last_of_block_1(tensors, "weight"): torch.zeros(3, 3)})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["HPS", "ImageReward"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    kind, damage, image_reward, tiny_world, tmp_path
):
    path = tmp_path / "weights.pt"
    torch.save(files.open_clip_tensors(50) if kind == "HPS" else image_reward[2], path)
    DAMAGES[damage](path)
    spec = {
        "HPS": HpsSpec(path=str(path), tokenizer=str(tiny_world / "reward")),
        "ImageReward": ImageRewardSpec(path=str(path), tokenizer=str(image_reward[0])),
    }[kind]
    wording = "reward-missing" if (kind, damage) == ("HPS", "no file") else None
    with refused(OutsideError, "unreadable", wording=wording) as told:
        load_reward(spec, CPU)
    assert f"reward at {path} is no {kind} checkpoint: " in str(told.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (None, "there is no such file"),
        (files.rating_tensors(9), "it rates embeddings of width 9, and those of"),
        (files.rating_tensors(16, "mlp.layers."), "it lacks layers.0.weight"),
        (
            files.rating_tensors(16) | {"layers.4.weight": torch.zeros(64)},
            "layers.4.weight is no matrix",
        ),
        (files.rating_tensors(16) | {"x": torch.zeros(1)}, "it has 11 tensors instead of 10"),
        (
            files.rating_tensors(16) | {"layers.2.weight": torch.zeros(128, 7)},
            "its layers do not follow each other",
        ),
    ],
)
def test_another_head_is_one_line_that_names_it(tensors, reason, tiny_world, tmp_path):
    head = tmp_path / "head.pth"
    if tensors is not None:
        torch.save(tensors, head)
    with refused(OutsideError, "unreadable", "reward.head") as told:
        load_reward(AestheticSpec(path=str(tiny_world / "reward"), head=str(head)), CPU)
    assert f"{head} is no aesthetic predictor: {reason}" in str(told.value)


def test_a_tokenizer_of_another_vocabulary_is_refused(open_clip, tmp_path, tiny_world):
    path = tmp_path / "hps.pt"
    torch.save(open_clip, path)
    with refused(OutsideError, "unreadable") as told:
        load_reward(HpsSpec(path=str(path), tokenizer=str(tiny_world / "reward")), CPU)
    assert "it has 49408 tokens" in str(told.value)
    with refused(OutsideError, "unreachable", "reward.tokenizer"):
        load_reward(HpsSpec(path=str(path), tokenizer="nowhere"), CPU)


@pytest.mark.parametrize("damage", [{"model": {}}, {"added_tokens": {"a": 1}}])
def test_a_damaged_tokenizer_is_one_line_that_names_it(damage, tokenizer, tmp_path):
    """tokenizers raises plain Exception over the first, transformers AttributeError over the
    second.
    """
    folder = tmp_path / "damaged"
    shutil.copytree(tokenizer, folder)
    own = json.loads((folder / "tokenizer.json").read_text()) | damage
    (folder / "tokenizer.json").write_text(json.dumps(own))
    with refused(OutsideError, "unreadable", "reward.tokenizer"):
        load_reward(HpsSpec(path="hps.pt", tokenizer=str(folder)), CPU)
