"""The reference of full fine-tuning: a copy that never trains, on the device or beside it."""

from __future__ import annotations

import math

import pytest
import torch
from batches import of_noise
from cdpo.engine.models import sd
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
