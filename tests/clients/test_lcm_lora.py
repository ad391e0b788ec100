"""An adapter that was trained on top of an LCM-LoRA: with it, or as one file of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.models import lcm
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.models.lcm import lcm_lora_layers
from cdpo.engine.recipe import Adapter, Model
from cdpo.engine.training.export_formats import save_for_all
from cdpo.engine.training.lora import Lora, both, trained_lora
from diffusers import ModelMixin, StableDiffusionPipeline
from launching import ForkServer
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

LCM_RANK, LCM_ALPHA = 3, 6.0
ABOUT = {"ss_output_name": "a run"}  # of kohya's file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd`, and `lcm.safetensors`, which adapts attention and convolutions, at scale 2."""
    folder = tmp_path_factory.mktemp("lcm_lora")
    pipeline = tiny.pipeline()
    pipeline.save_pretrained(folder / "sd")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, layer in pipeline.unet.named_modules():
        if name.endswith(("to_q", "conv1")):
            out, into, *kernel = layer.weight.shape
            key = "lora_unet_" + name.replace(".", "_")
            down = torch.randn(LCM_RANK, into, *kernel, generator=generator)
            up = torch.randn(out, LCM_RANK, *(1 for _ in kernel), generator=generator)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * 0.02}
            tensors[f"{key}.alpha"] = torch.tensor(LCM_ALPHA)
    save_file(tensors, folder / "lcm.safetensors")
    return folder


@torch.no_grad()
def predict(net: ModelMixin) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 9, 16, generator=generator)
    return net(noisy, torch.tensor([100, 900]), encoder_hidden_states=text).sample


def test_both_loras_together_and_as_one_are_what_was_trained(base: Path, tmp_path: Path) -> None:
    """Our adapter has some layers of the LCM-LoRA, and others."""
    lcm_lora = str(base / "lcm.safetensors")
    model = Model(backbone="lcm", path=str(base / "sd"), lcm_lora=lcm_lora, resolution=(16, 16))
    backbone = lcm.load(model, torch.device("cpu"), torch.float32)
    consistent = predict(backbone.denoiser)
    spec = Adapter(rank=2, alpha=1.0, targets=("to_q", "ff.net.2", "conv2"))
    policy = add_lora(backbone.denoiser, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    wanted = predict(policy.eval())
    lora = trained_lora(get_peft_model_state_dict(policy), spec)
    save_for_all(lora, backbone.pipeline, ABOUT, tmp_path / "lora")
    whole = both(Lora(*lcm_lora_layers(model, backbone.pipeline)), lora)
    assert whole.rank == LCM_RANK + spec.rank
    save_for_all(whole, backbone.pipeline, ABOUT, tmp_path / "both")

    plain = predict(StableDiffusionPipeline.from_pretrained(base / "sd").unet)
    assert (consistent - plain).abs().max() > 0.01
    assert (wanted - consistent).abs().max() > 0.01
    for files in (
        (base / "lcm.safetensors", tmp_path / "lora"),
        (tmp_path / "both",),
        (tmp_path / "both" / "kohya.safetensors",),
    ):
        stock = StableDiffusionPipeline.from_pretrained(base / "sd")
        for number, file in enumerate(files):
            stock.load_lora_weights(file, adapter_name=f"lora{number}")
        stock.set_adapters([f"lora{number}" for number in range(len(files))])
        torch.testing.assert_close(predict(stock.unet), wanted, rtol=0, atol=2e-5)


@pytest.mark.long
def test_a_run_says_that_both_belong_together_and_leaves_one_file_of_both(
    base: Path, tmp_path: Path, server: ForkServer
) -> None:
    recipe = tiny.build(tmp_path, "lcm")
    recipe["model"] |= {"path": str(base / "sd"), "lcm_lora": str(base / "lcm.safetensors")}
    del recipe["model"]["unet"]
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe)
    server.run("prepare", path).succeeded()
    said = server.run("train", path, ["train.optimizer.lr=0.02"]).succeeded().text
    (note,) = [line for line in said.splitlines() if line.startswith("note:")]
    assert "together" in note and str(base / "lcm.safetensors") in note and "lora_with_lcm" in note

    apart, joined = (StableDiffusionPipeline.from_pretrained(base / "sd") for _ in range(2))
    apart.load_lora_weights(base / "lcm.safetensors", adapter_name="lcm")
    lcm_alone = predict(apart.unet)
    apart.load_lora_weights(tmp_path / "run" / "lora", adapter_name="ours")
    apart.set_adapters(["lcm", "ours"])
    joined.load_lora_weights(tmp_path / "run" / "lora_with_lcm")
    torch.testing.assert_close(predict(joined.unet), predict(apart.unet), rtol=0, atol=2e-5)
    assert (predict(joined.unet) - lcm_alone).abs().max() > 1e-3
