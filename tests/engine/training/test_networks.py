"""The reference of full fine-tuning: a copy that never trains, on the device or beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import corrupted, of_noise
from cdpo.engine.models import Framing, load_backbone, sd
from cdpo.engine.objectives import build_objective
from cdpo.engine.training.networks import PolicyAndReference, build_networks
from diffusers.hooks.group_offloading import ModuleGroup

FULL = ("adapter.type=full", "export.formats=[merged]")
CPU = torch.device("cpu")


def build(tiny_recipe, *overrides: str) -> PolicyAndReference:
    recipe = tiny_recipe(*FULL, *overrides)
    backbone = sd.load(recipe.model, CPU, torch.float32)
    return build_networks(recipe, backbone, build_objective(recipe.objective))


def test_all_of_the_policy_trains_and_nothing_of_the_reference(tiny_recipe) -> None:
    networks = build(tiny_recipe)
    pairs = list(
        zip(networks.policy.named_parameters(), networks.reference.parameters(), strict=True)
    )
    for (name, ours), theirs in pairs:
        assert ours.requires_grad and not theirs.requires_grad, name
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), name
    loss = networks(of_noise()).loss
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for (_, parameter), _ in pairs)


LORA = ("adapter.targets=all-linear",)
LONG = ("sd", "flux", "flux2", "sana", "qwen_image", "qwen_image21", "z_image")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "family", ["sdxl", "sd3", *(pytest.param(f, marks=pytest.mark.long) for f in LONG)]
)
def test_a_fresh_policy_is_its_reference_to_the_bit(
    recipe_of, family: str, adapter: tuple[str, ...], precision: str
) -> None:
    """As each family lays out what its layers are given: PyTorch rounds by that."""
    recipe = recipe_of(family, *adapter)
    backbone = load_backbone(recipe.model, CPU, precision)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    prompts, none = ["red apple", "a rocket"], torch.zeros(4, 2, dtype=torch.int64)
    told = backbone.encode_prompts([*prompts, *prompts], Framing(none + 16, none, (16, 16)))
    loss = networks(replace(corrupted(backbone, prompts), conditioning=told))
    assert loss.logits.abs().max() == 0


def test_layers_that_train_are_those_that_do_not_however_their_inputs_lie(recipe_of) -> None:
    recipe = recipe_of("sdxl", *FULL)
    backbone = load_backbone(recipe.model, CPU, "fp16")
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    torch.manual_seed(0)
    for ours, theirs in zip(networks.policy.modules(), networks.reference.modules(), strict=True):
        if isinstance(ours, torch.nn.Linear):
            x = torch.randn(8, ours.in_features, 24, dtype=torch.float16).transpose(1, 2)
            assert torch.equal(ours(x), theirs(x))


def test_an_offloaded_reference_is_streamed_layer_by_layer_and_equal(
    tiny_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here both places are one memory; that each layer is fetched and given back shows in calls."""
    fetched, given_back = [], []
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_
    monkeypatch.setattr(
        ModuleGroup, "onload_", lambda self: (fetched.append(id(self)), onload(self))
    )
    monkeypatch.setattr(
        ModuleGroup, "offload_", lambda self: (given_back.append(id(self)), offload(self))
    )
    networks = build(tiny_recipe, "train.reference=offload")
    # DeepSpeed sees, moves and partitions the policy alone ...
    trained = {id(parameter) for parameter in networks.policy.parameters()}
    assert {id(parameter) for parameter in networks.parameters()} == trained
    assert "reference" not in dict(networks.named_children())
    # ... and every layer of the reference that holds weights comes and goes by itself.
    fetched.clear(), given_back.clear()
    networks(of_noise()).loss.backward()
    layers = [m for m in networks.reference.modules() if list(m.parameters(recurse=False))]
    assert len(set(fetched)) == len(layers) > 50
    assert set(given_back) == set(fetched)

    copied = build(tiny_recipe)
    for some in (networks, copied):
        with torch.no_grad():
            some.policy.conv_out.bias += 0.1
    ours, theirs = networks(of_noise()), copied(of_noise())
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.loss.item() != pytest.approx(math.log(2), abs=1e-3)
