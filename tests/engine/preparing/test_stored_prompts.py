"""Prompts that are stored beside shards: those of every pair, from every kind of source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cdpo.engine.basics.errors import NumericsError
from cdpo.engine.models import load_backbone
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.prompts import PromptFiles
from cdpo.engine.shards.store import LocalStore
from prepared import is_finished, pairs_of, prepare
from refusals import refused
from safetensors.torch import load_file, save_file

KINDS = ["paired", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("sampled", "masked"))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_of_a_pair_is_stored_as_the_encoders_make_it(
    load: Callable[..., Recipe], tmp_path: Path, ranks: Ranks, kind: str
) -> None:
    recipe = load(kind, tmp_path, "data.text=stored", "train.precision=bf16")
    shards = prepare(recipe, ranks)
    stored = load_manifest(shards).text
    assert stored is not None and stored.precision == "bf16" != recipe.prepare.precision
    found = PromptFiles(LocalStore(shards), stored)
    backbone = load_backbone(recipe.model, ranks.device, "bf16")
    assert backbone.fingerprints()["text"] == stored.fingerprint
    prompts = sorted({"", *(meta.prompt for meta, _ in pairs_of(shards))})
    for prompt, row in zip(prompts, backbone.embedded(prompts), strict=True):
        assert all(map(torch.equal, found.row(prompt), row))

    assert is_finished(recipe, ranks)
    for asked, finished in (("data.text=live", True), ("train.precision=fp32", False)):
        assert is_finished(load(kind, tmp_path, "data.text=stored", asked), ranks) is finished


def test_embeddings_that_overflow_are_not_stored(
    load: Callable[..., Recipe], tmp_path: Path, tiny_world: Path, ranks: Ranks
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_world / "sd", model)
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["final_layer_norm.weight"][0] = torch.inf
    save_file(tensors, weights, {"format": "pt"})
    recipe = load("paired", tmp_path / "run", "data.text=stored", f"model.path={model}")
    with refused(NumericsError, "non-finite", "train.precision"):
        prepare(recipe, ranks)
    shards = tmp_path / "run" / "shards"
    assert load_manifest(shards).text is None and not [*shards.glob("prompts-*")]
