"""Training that goes on from an adapter that is there, against the base without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import of_noise
from cdpo.engine.basics.errors import DataError, RecipeError
from cdpo.engine.models import sd
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.objectives import build_objective
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.export_formats import about_adapter, save_for_all
from cdpo.engine.training.lora import trained_lora
from cdpo.engine.training.networks import PolicyAndReference, build_networks, started_parts
from peft import get_peft_model_state_dict
from refusals import refused

CPU = torch.device("cpu")
Tiny = Callable[..., Recipe]


@pytest.fixture
def start(tiny_recipe: Tiny, tmp_path: Path) -> Path:
    """An adapter of rank 2 and alpha 3, exported."""
    recipe = tiny_recipe("adapter.rank=2", "adapter.alpha=3.0")
    backbone = sd.load(recipe.model, CPU, torch.float32)
    policy = add_lora(backbone.denoiser, recipe.adapter, seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    lora = trained_lora(get_peft_model_state_dict(policy), recipe.adapter)
    save_for_all(lora, backbone.pipeline, about_adapter(recipe, backbone), tmp_path / "lora")
    return tmp_path / "lora"


def build(recipe: Recipe) -> PolicyAndReference:
    backbone = sd.load(recipe.model, CPU, torch.float32)
    return build_networks(recipe, backbone, build_objective(recipe.objective))


def predictions(net: torch.nn.Module) -> torch.Tensor:
    given = of_noise()
    timesteps = torch.cat([given.draw.timesteps] * 2)
    embeddings = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net.eval()(given.noisy, timesteps, embeddings, return_dict=False)[0]


@pytest.mark.parametrize("alpha", ["3.0", "4.0"])
def test_the_policy_starts_as_the_adapter_draws_and_the_reference_as_the_base(
    tiny_recipe: Tiny, start: Path, alpha: str
) -> None:
    knobs = ("adapter.rank=2", f"adapter.alpha={alpha}", f"adapter.start={start}")
    networks = build(tiny_recipe(*knobs))
    stock = sd.load(tiny_recipe().model, CPU, torch.float32)
    base = predictions(stock.denoiser)
    stock.load_adapter(start)
    drawn = predictions(stock.denoiser)
    assert (drawn - base).abs().max() > 1e-2  # the example says something
    torch.testing.assert_close(predictions(networks.policy), drawn, rtol=1e-4, atol=1e-5)
    assert torch.equal(predictions(networks.reference), base)
    # What evaluation compares with is what the run began from, and stays that.
    assert torch.equal(predictions(networks.base), predictions(networks.policy))
    for parameter in networks.policy.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    torch.testing.assert_close(predictions(networks.base), drawn, rtol=1e-4, atol=1e-5)
    networks.policy.train()
    assert networks(of_noise()).loss.item() != pytest.approx(math.log(2), abs=1e-4)


def test_another_adapter_is_another_start(tiny_recipe: Tiny, start: Path) -> None:
    recipe = tiny_recipe("adapter.rank=2", f"adapter.start={start}")
    assert started_parts(recipe.adapter).keys() == {"start"}
    assert started_parts(tiny_recipe().adapter) == {}


def test_what_is_no_such_adapter_is_named(tiny_recipe: Tiny, start: Path) -> None:
    with refused(DataError, "mismatch", "adapter.start"):
        build(tiny_recipe("adapter.rank=3", f"adapter.start={start}"))
    with refused(DataError, "mismatch", "adapter.start"):
        build(tiny_recipe("adapter.rank=2", f"adapter.start={start}", "adapter.targets=[to_q]"))
    with refused(DataError, "unreadable", "adapter.start"):
        build(tiny_recipe("adapter.rank=2", f"adapter.start={start.parent}"))


@pytest.mark.parametrize(
    "other",
    [
        ("adapter.dora=true",),
        ("adapter.type=full", "export.formats=[merged]"),
        ("adapter.rank_schedule=[1,2]", "adapter.rank=2"),
        ("objective.reference_ema=0.9",),
    ],
)
def test_what_does_not_go_on_from_an_adapter(tiny_recipe: Tiny, other: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.start=there does not go with"):
        tiny_recipe("adapter.start=there", *other)
