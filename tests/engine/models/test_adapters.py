"""Adapters on the tiny UNet: what is trained, where, and what the reference sees."""

import pytest
import torch
from batches import corrupted
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.models import load_backbone, sd
from cdpo.engine.models.adapters import PRESETS, add_lora, twin_of
from cdpo.engine.recipe import Adapter
from cdpo.engine.recipe.family import FAMILIES
from refusals import refused
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    return noisy, torch.tensor([0, 400, 999]), torch.randn(3, 9, 16, generator=generator)


@torch.no_grad()
def predict(net: nn.Module) -> Tensor:
    noisy, timesteps, text = inputs()
    dtype = next(net.parameters()).dtype
    return net(noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype)).sample


def perturb(policy: nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator)


def trainable(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_shares_the_weights_and_never_sees_the_adapter(tiny_recipe, dtype):
    backbone = sd.load(tiny_recipe().model, torch.device("cpu"), dtype)
    base = backbone.denoiser
    before = predict(base)
    reference = twin_of(base)
    pairs = zip(base.parameters(), reference.parameters(), strict=True)
    assert all(own is others for own, others in pairs)
    assert torch.equal(predict(reference), before)

    policy = add_lora(base, Adapter(rank=2, alpha=2.0), seed=0)
    assert torch.equal(predict(policy), before)  # B starts at zero
    assert torch.equal(predict(reference), before)
    perturb(policy)
    assert not torch.equal(predict(policy), before)
    assert torch.equal(predict(reference), before)
    assert not any("lora" in name for name, _ in reference.named_parameters())


def test_only_the_adapters_train(tiny_backbone):
    policy = add_lora(tiny_backbone.denoiser, Adapter(rank=3, alpha=3.0), seed=0)
    found = trainable(policy)
    assert found and all("lora_A" in name or "lora_B" in name for name in found)
    assert len(found) == 2 * sum(
        name.endswith(tuple(f".{t}.base_layer" for t in ATTENTION))
        for name, _ in policy.named_modules()
    )
    assert {min(p.shape) for p in found.values()} == {3}


def test_every_named_layer_and_no_other_gets_one(tiny_backbone):
    wanted = {
        name
        for name, module in tiny_backbone.denoiser.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".to_q", ".proj"))
    }
    policy = add_lora(tiny_backbone.denoiser, Adapter(targets=("to_q", "proj")), seed=0)
    adapted = {name.split(".lora_A")[0] for name in trainable(policy) if "lora_A" in name}
    assert adapted == wanted and len({name.split(".")[-1] for name in adapted}) == 2


def test_the_start_is_a_function_of_the_seed(tiny_recipe):
    def start(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # global state is neither used ...
        backbone = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
        state = torch.get_rng_state()
        found = trainable(add_lora(backbone.denoiser, Adapter(rank=2), seed))
        assert torch.equal(torch.get_rng_state(), state)  # ... nor advanced
        return {name: p.detach() for name, p in found.items()}

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not p.any() for name, p in first.items() if "lora_B" in name)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "both": {"rslora": True, "dora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_output_is_unchanged_to_the_bit(tiny_recipe, variant, dtype):
    """DoRA too: it divides each row by a norm computed just as its length was."""
    backbone = sd.load(tiny_recipe().model, torch.device("cpu"), dtype)
    before = predict(backbone.denoiser)
    spec = Adapter(rank=2, alpha=3.0, targets="lcm", **VARIANTS[variant])
    assert torch.equal(predict(add_lora(backbone.denoiser, spec, seed=0).train()), before)


def test_rslora_divides_by_the_root_of_the_rank(tiny_recipe):
    """At rank 4, alpha 2 under rsLoRA does what alpha 4 does without: 2 / 2 = 4 / 4."""

    def tuned(**spec) -> Tensor:
        backbone = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
        policy = add_lora(backbone.denoiser, Adapter(rank=4, **spec), seed=0)
        perturb(policy)
        return predict(policy)

    assert torch.equal(tuned(alpha=2.0, rslora=True), tuned(alpha=4.0))
    assert not torch.equal(tuned(alpha=2.0), tuned(alpha=4.0))


def adapted(policy: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0] for name in trainable(policy) if "lora_A" in name}


def layers(network: nn.Module, kinds: type | tuple[type, ...]) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, kinds)}


def test_presets_adapt_what_they_say(tiny_recipe):
    def load() -> nn.Module:
        model = tiny_recipe().model
        return sd.load(model, torch.device("cpu"), torch.float32).denoiser

    linear, convolutions = layers(load(), nn.Linear), layers(load(), nn.Conv2d)
    found = {
        preset: adapted(add_lora(load(), Adapter(targets=preset), seed=0))
        for preset in ("attention", "attention+ff", "all-linear", "lcm")
    }
    attention = {name for name in linear if ".attn1." in name or ".attn2." in name}
    feed_forward = {name for name in linear if ".ff." in name}
    assert found["attention"] == attention and attention
    assert found["attention+ff"] == attention | feed_forward and feed_forward
    assert found["all-linear"] == linear
    outer = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert found["lcm"] == (linear | convolutions) - outer


@pytest.mark.parametrize("targets", [("to_queue",), ("to_q", "nothing"), ("_q",)])
def test_targets_that_match_nothing_are_refused_with_what_there_is(tiny_backbone, targets):
    with refused(RecipeError, "unknown", "adapter.targets") as told:
        add_lora(tiny_backbone.denoiser, Adapter(targets=targets), seed=0)
    known = (*ATTENTION, "proj", "net.2", "time_emb_proj", "conv1", "conv_in", "all-linear", "lcm")
    assert all(name in str(told.value) for name in (targets[-1], *known))
    assert not any("lora" in name for name, _ in tiny_backbone.denoiser.named_parameters())


# Of tiny models, whose last blocks these are: what is made of text there is not used.
UNUSED = {
    "sd3": {"transformer_blocks.1.attn.add_q_proj"},
    "qwen_image": {
        *(f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "to_add_out")),
        *(f"transformer_blocks.0.txt_mlp.net.{name}" for name in ("0.proj", "2")),
    },
}
FLOW = [name for name, family in FAMILIES.items() if family.is_flow]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(family, targets, marks=[] if targets == "lcm" else pytest.mark.long)
        for family in FLOW
        for targets in [*PRESETS, "all-linear"]
    ],
)
def test_every_adapter_of_what_is_used_has_a_gradient(recipe_of, family, targets):
    backbone = load_backbone(recipe_of(family).model, torch.device("cpu"))
    policy = add_lora(backbone.denoiser, Adapter(rank=2, alpha=2.0, targets=targets), seed=0)
    batch = corrupted(backbone, ["red apple", "a house by the sea"])
    times = batch.draw.timesteps.repeat(2)
    backbone.predict(policy, batch.noisy, times, batch.conditioning).square().mean().backward()
    gradients = {
        name.partition(".lora_B")[0]: p.grad
        for name, p in policy.named_parameters()
        if "lora_B" in name
    }
    still = {name for name, grad in gradients.items() if grad is None or not grad.any()}
    assert still == UNUSED.get(family, set()) & set(gradients)
    assert len(gradients) > len(still)
