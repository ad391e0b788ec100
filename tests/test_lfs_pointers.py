"""What Git leaves in place of a file that LFS keeps is recognised wherever a file is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import shard_sets
import torch
from cdpo.engine.basics.errors import CdpoError
from cdpo.engine.models import load_backbone
from cdpo.engine.recipe import Model, Prompts
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reward import AestheticSpec, ClipScoreSpec, HpsSpec, ImageRewardSpec
from cdpo.engine.rewards import load_reward
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.sources.prompts import read_prompts
from cdpo.engine.training.deepspeed_config import build_deepspeed_config

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
CPU = torch.device("cpu")


def says_what_to_do(path: Path, read: Callable[[], object]) -> None:
    path.write_bytes(POINTER)
    with pytest.raises(CdpoError) as told:
        read()
    assert str(path) in str(told.value) and "`git lfs pull`" in str(told.value)
    assert told.value.kind == "unreadable" and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "unet/config.json",
        "model_index.json",
    ],
)
def test_in_a_model(file, tiny_world, tmp_path):
    folder = shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    spec = Model(path=str(folder), resolution=(16, 16))
    says_what_to_do(folder / file, lambda: load_backbone(spec, CPU))


@pytest.mark.parametrize("key", ["vae", "unet"])
def test_in_a_part_of_its_own(key, tiny_world, tmp_path):
    folder = shutil.copytree(tiny_world / "sd" / key, tmp_path / key)
    spec = Model(path=str(tiny_world / "sd"), resolution=(16, 16), **{key: str(folder)})
    file = folder / "diffusion_pytorch_model.safetensors"
    says_what_to_do(file, lambda: load_backbone(spec, CPU))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_in_a_reward(file, tiny_world, tmp_path):
    folder = shutil.copytree(tiny_world / "reward", tmp_path / "clip")
    says_what_to_do(folder / file, lambda: load_reward(ClipScoreSpec(path=str(folder)), CPU))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_in_a_checkpoint_of_a_reward(ending, tiny_world, tmp_path):
    clip, file = str(tiny_world / "reward"), tmp_path / f"weights.{ending}"
    for spec in (
        AestheticSpec(path=clip, head=str(file)),
        HpsSpec(path=str(file), tokenizer=clip),
        ImageRewardSpec(path=str(file), tokenizer=clip),
    ):
        says_what_to_do(file, lambda spec=spec: load_reward(spec, CPU))


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv", "tsv", "parquet"])
def test_in_prompts(ending, tmp_path):
    file = tmp_path / f"prompts.{ending}"
    says_what_to_do(file, lambda: read_prompts(Prompts(train=str(file)), 0))


def test_in_a_recipe_and_in_a_config_of_deepspeed(tiny_recipe, tmp_path):
    file = tmp_path / "r.yaml"
    says_what_to_do(file, lambda: load_recipe(file))
    config = tmp_path / "ds.json"
    recipe = tiny_recipe(f"deepspeed={config}")
    says_what_to_do(config, lambda: build_deepspeed_config(recipe, 1, tmp_path))


def test_in_shards(tmp_path):
    manifest = shard_sets.write_set(tmp_path, 2, [8], 100)
    entry = manifest.shards[0]
    says_what_to_do(tmp_path / entry.name, lambda: ShardReaders(tmp_path, manifest).keys(entry))
    says_what_to_do(tmp_path / "manifest.json", lambda: load_manifest(tmp_path))
