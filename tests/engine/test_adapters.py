"""LoRA on the tiny UNet: what is trained, what the reference sees, what is exported."""

from pathlib import Path

import pytest
import torch
from cdpo.engine.adapters import LORA_FILE, add_lora, export_lora, twin_of
from cdpo.engine.backbones import sd
from cdpo.engine.errors import RecipeError
from cdpo.engine.recipe import Lora
from diffusers import StableDiffusionPipeline
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

    policy = add_lora(base, Lora(rank=2, alpha=2.0), seed=0)
    assert torch.equal(predict(policy), before)  # B starts at zero
    assert torch.equal(predict(reference), before)
    perturb(policy)
    assert not torch.equal(predict(policy), before)
    assert torch.equal(predict(reference), before)
    assert not any("lora" in name for name, _ in reference.named_parameters())


def test_only_the_adapters_train(tiny_backbone):
    policy = add_lora(tiny_backbone.denoiser, Lora(rank=3, alpha=3.0), seed=0)
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
    policy = add_lora(tiny_backbone.denoiser, Lora(targets=("to_q", "proj")), seed=0)
    adapted = {name.split(".lora_A")[0] for name in trainable(policy) if "lora_A" in name}
    assert adapted == wanted and len({name.split(".")[-1] for name in adapted}) == 2


def test_the_start_is_a_function_of_the_seed(tiny_recipe):
    def start(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # global state is neither used ...
        backbone = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
        state = torch.get_rng_state()
        found = trainable(add_lora(backbone.denoiser, Lora(rank=2), seed))
        assert torch.equal(torch.get_rng_state(), state)  # ... nor advanced
        return {name: p.detach() for name, p in found.items()}

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not p.any() for name, p in first.items() if "lora_B" in name)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("targets", [("to_queue",), ("to_q", "nothing"), ("conv1",), ("_q",)])
def test_targets_that_match_nothing_are_refused_with_what_there_is(tiny_backbone, targets):
    with pytest.raises(RecipeError) as caught:
        add_lora(tiny_backbone.denoiser, Lora(targets=targets), seed=0)
    message = str(caught.value)
    assert message.startswith(f"adapter.targets: {targets[-1]} matches no linear layer")
    assert all(name in message for name in (*ATTENTION, "proj", "net.2", "time_emb_proj"))
    assert not any("lora" in name for name, _ in tiny_backbone.denoiser.named_parameters())


def stock_with_adapter(model: Path, adapter: Path) -> StableDiffusionPipeline:
    """As a user of the result loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(adapter)
    return pipeline


@pytest.mark.parametrize("alpha", [2.0, 7.0, 0.5])
def test_the_stock_pipeline_loads_what_is_exported(tiny_backbone, tiny_world, tmp_path, alpha):
    """Alpha too: without it in the file an adapter of rank 2 and alpha 7 is 3.5 times too weak."""
    policy = add_lora(tiny_backbone.denoiser, Lora(rank=2, alpha=alpha), seed=0)
    perturb(policy)
    base = predict(twin_of(tiny_backbone.denoiser).eval())
    export_lora(policy, tmp_path / "lora", write=True)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    stock = stock_with_adapter(tiny_world / "sd", tmp_path / "lora")
    torch.testing.assert_close(predict(stock.unet), predict(policy), rtol=0, atol=1e-5)
    stock.disable_lora()
    assert torch.equal(base, predict(policy))
    assert not torch.allclose(predict(stock.unet), predict(policy), atol=1e-3)


def test_a_backbone_loads_what_is_exported(tiny_backbone, tiny_recipe, tmp_path):
    policy = add_lora(tiny_backbone.denoiser, Lora(rank=2, alpha=5.0), seed=0)
    perturb(policy)
    export_lora(policy, tmp_path / "lora", write=True)
    other = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
    other.load_adapter(tmp_path / "lora")
    torch.testing.assert_close(predict(other.denoiser), predict(policy), rtol=0, atol=1e-5)


def test_exports_in_float32_what_was_trained_in_bfloat16(tiny_recipe, tmp_path, tiny_world):
    backbone = sd.load(tiny_recipe().model, torch.device("cpu"), torch.bfloat16)
    policy = add_lora(backbone.denoiser, Lora(rank=2, alpha=5.0), seed=0)
    perturb(policy)
    export_lora(policy, tmp_path / "lora", write=True)
    stock = stock_with_adapter(tiny_world / "sd", tmp_path / "lora").unet
    kept = {name: p for name, p in stock.named_parameters() if "lora" in name}
    own = {name: p for name, p in policy.named_parameters() if "lora" in name}
    assert len(kept) == len(own) > 0
    for name, value in own.items():
        loaded = kept[name.replace(".default.", ".default_0.")]
        assert loaded.dtype == torch.float32 and torch.equal(loaded, value.float())


def test_other_ranks_write_nothing(tiny_backbone, tmp_path):
    policy = add_lora(tiny_backbone.denoiser, Lora(rank=2), seed=0)
    export_lora(policy, tmp_path / "lora", write=False)
    assert not (tmp_path / "lora").exists()
