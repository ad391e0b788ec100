"""Each format, loaded by stock diffusers over the same base, predicts what the policy predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.models import sd, sdxl
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.recipe import Adapter, Model
from cdpo.engine.training.export_formats import save_for_diffusers, save_for_kohya, save_merged
from diffusers import ModelMixin, StableDiffusionXLPipeline
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from stock import stock_pipeline
from torch import Tensor

# One alpha above the rank, one below, neither equal to it.
SPECS = {
    "lora": Adapter(rank=2, alpha=7.0, targets="lcm"),
    "attention": Adapter(rank=2, alpha=0.5),
    "rslora": Adapter(rank=4, alpha=3.0, targets="lcm", rslora=True),
    "dora": Adapter(rank=2, alpha=3.0, targets="lcm", dora=True),
    "dropout": Adapter(rank=2, alpha=3.0, dropout=0.5),
}


@torch.no_grad()
def predict(net: ModelMixin) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 9, 16, generator=generator)
    return net(noisy, torch.tensor([0, 400, 999]), encoder_hidden_states=text).sample


def tune(backbone: LatentDiffusion, spec: Adapter) -> ModelMixin:
    """An adapter of which every part has moved."""
    policy = add_lora(backbone.denoiser, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
    return policy.eval()


@pytest.mark.parametrize("name", SPECS)
def test_stock_diffusers_loads_each_format(
    tiny_backbone: LatentDiffusion, tiny_recipe, tiny_world: Path, tmp_path: Path, name: str
) -> None:
    base = predict(tiny_backbone.denoiser)
    policy = tune(tiny_backbone, SPECS[name])
    wanted = predict(policy)
    assert (wanted - base).abs().max() > 0.01
    state = get_peft_model_state_dict(policy)
    save_for_diffusers(state, policy, tiny_backbone.pipeline, tmp_path)
    save_merged(tiny_recipe().model, tmp_path / "lora", tmp_path / "merged", 10**9)
    forms = ["lora", "merged"]
    if not SPECS[name].dora:  # the recipe refuses it
        save_for_kohya(state, SPECS[name], tmp_path)
        forms.append("kohya")
    for form in forms:
        stock = stock_pipeline(tiny_world / "sd", tmp_path, form)
        torch.testing.assert_close(predict(stock.unet), wanted, rtol=0, atol=1e-5)
        assert any("lora" in key for key in stock.unet.state_dict()) == (form != "merged")


@pytest.mark.parametrize("targets", ["lcm", "all-linear"])
def test_stock_diffusers_loads_adapters_of_xl(tmp_path: Path, targets: str) -> None:
    """What ComfyUI calls a layer is the same in both families; diffusers reads it by patterns."""
    tiny.xl_pipeline().save_pretrained(tmp_path / "base")
    model = Model(backbone="sdxl", path=str(tmp_path / "base"), resolution=(16, 16))
    spec = Adapter(rank=2, alpha=7.0, targets=targets)
    backbone = sdxl.load(model, torch.device("cpu"), torch.float32)
    policy = tune(backbone, spec)
    state = get_peft_model_state_dict(policy)
    save_for_diffusers(state, policy, backbone.pipeline, tmp_path)
    save_for_kohya(state, spec, tmp_path)
    tuned = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    for form in ("lora", "kohya"):
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
        stock.load_lora_weights(tmp_path / form)
        loaded = {name: p for name, p in stock.unet.named_parameters() if "lora_" in name}
        assert len(loaded) == len(tuned) > 0
        for name, value in tuned.items():
            assert torch.equal(loaded[name.replace(".default.", ".default_0.")], value), form
        scales = {
            scale
            for module in stock.unet.modules()
            if isinstance(module, LoraLayer)
            for scale in module.scaling.values()
        }
        assert scales == {3.5}


def test_a_backbone_loads_an_adapter_and_a_merged_pipeline(
    tiny_backbone: LatentDiffusion, tiny_recipe, tmp_path: Path
) -> None:
    policy = tune(tiny_backbone, SPECS["lora"])
    state = get_peft_model_state_dict(policy)
    save_for_diffusers(state, policy, tiny_backbone.pipeline, tmp_path)
    save_merged(tiny_recipe().model, tmp_path / "lora", tmp_path / "merged", 10**9)
    for folder, load in (("lora", "load_adapter"), ("merged", "load_denoiser")):
        other = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
        getattr(other, load)(tmp_path / folder)
        torch.testing.assert_close(predict(other.denoiser), predict(policy), rtol=0, atol=1e-5)
        assert not any(p.requires_grad for p in other.denoiser.parameters()) or folder == "lora"
        assert other.pipeline.unet is other.denoiser


def test_names_and_scales_of_the_kohya_format(
    tiny_backbone: LatentDiffusion, tmp_path: Path
) -> None:
    """An rsLoRA of rank 4 and alpha 3 is scaled by 3 / 2, which readers get from 6 / 4."""
    policy = tune(tiny_backbone, SPECS["rslora"])
    state = get_peft_model_state_dict(policy)
    save_for_kohya(state, SPECS["rslora"], tmp_path)
    path = tmp_path / "kohya" / "lora.safetensors"
    kept = load_file(path)
    layers = {key.partition(".")[0] for key in kept}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0" in layers
    assert "lora_unet_mid_block_resnets_0_conv1" in layers
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert set(kept) == {f"{layer}.{part}" for layer in layers for part in parts}
    assert len(kept) == 3 * len(state) / 2
    assert all(kept[f"{layer}.alpha"] == 6 for layer in layers)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4"
