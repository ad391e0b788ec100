"""Each format, loaded by stock diffusers over the same base, predicts what the policy predicts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.models import load_backbone, pipelines, sd, sdxl
from cdpo.engine.models.adapters import add_lora
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.recipe import Adapter, Model, Recipe
from cdpo.engine.training.export_formats import save_for_all, save_merged
from cdpo.engine.training.kohya_format import describe, kohya_tensors, save_for_kohya
from cdpo.engine.training.lora import Lora, trained_lora
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from flow_models import as_users_load
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from stock import levels_apart, picture, stock_pipeline
from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
MERGED = ("to_q", "to_k", "to_v", "proj_mlp")  # layers that are one in some original code
# One alpha above the rank, one below, neither equal to it.
SPECS = {
    "lora": Adapter(rank=2, alpha=7.0, targets="lcm"),
    "attention": Adapter(rank=2, alpha=0.5),
    "rslora": Adapter(rank=4, alpha=3.0, targets="lcm", rslora=True),
    "dora": Adapter(rank=2, alpha=3.0, targets="lcm", dora=True),
    "dropout": Adapter(rank=2, alpha=3.0, dropout=0.5),
}
LONG = pytest.mark.long
OTHERS = ("sd", "sdxl", "flux2", "sana", "qwen_image", "qwen_image21", "z_image")


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


def exported(backbone: LatentDiffusion, spec: Adapter, folder: Path) -> tuple[ModelMixin, Lora]:
    """A tuned policy, and its adapter as it was written to `folder/lora`."""
    policy = tune(backbone, spec)
    lora = trained_lora(get_peft_model_state_dict(policy), spec)
    is_unet = backbone.denoiser_name == "unet"
    about = describe(policy.config, "epsilon", (512, 512), "a run") if is_unet else {}
    save_for_all(lora, backbone.pipeline, about, folder / "lora")
    return policy, lora


@pytest.mark.parametrize("name", SPECS)
def test_stock_readers_load_each_format(
    tiny_backbone: LatentDiffusion, tiny_recipe, tiny_world: Path, tmp_path: Path, name: str
) -> None:
    base = predict(tiny_backbone.denoiser)
    policy, _ = exported(tiny_backbone, SPECS[name], tmp_path)
    wanted = predict(policy)
    assert (wanted - base).abs().max() > 0.01
    save_merged(tiny_recipe().model, tmp_path / "lora", tmp_path / "merged", 10**9)
    for form in ("lora", "merged", *([] if SPECS[name].dora else ["lora/kohya.safetensors"])):
        stock = stock_pipeline(tiny_world / "sd", tmp_path, form)
        torch.testing.assert_close(predict(stock.unet), wanted, rtol=0, atol=1e-5)
        assert any("lora" in key for key in stock.unet.state_dict()) == (form != "merged")
    own = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
    by_peft = PeftModel.from_pretrained(own.denoiser, tmp_path / "lora")
    torch.testing.assert_close(predict(by_peft), wanted, rtol=0, atol=1e-5)


def test_merged_draws_what_the_adapter_draws_on_the_base(
    tiny_recipe, tiny_world: Path, tmp_path: Path
) -> None:
    """With the base's own scheduler, in which users draw both."""
    base = tmp_path / "base"
    shutil.copytree(tiny_world / "sd", base)
    scheduler = PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear")
    StableDiffusionPipeline.from_pretrained(base, scheduler=scheduler).save_pretrained(base)
    model = tiny_recipe(f"model.path={base}").model
    exported(sd.load(model, torch.device("cpu"), torch.float32), SPECS["lora"], tmp_path)
    save_merged(model, tmp_path / "lora", tmp_path / "merged", 10**9)
    stock = [stock_pipeline(base, tmp_path, form) for form in ("lora", "merged")]
    assert {type(pipeline.scheduler) for pipeline in stock} == {PNDMScheduler}
    on_base, merged = map(picture, stock)
    assert levels_apart(on_base, merged) <= 1


@pytest.mark.parametrize("family", ["sd3", "flux", *(pytest.param(f, marks=LONG) for f in OTHERS)])
def test_merging_reads_no_text_encoder_and_copies_it(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch, family: str
) -> None:
    model = recipe_of(family).model
    base = Path(model.path)
    backbone = load_backbone(model, torch.device("cpu"))
    untuned = picture(as_users_load(base))
    exported(backbone, SPECS["lora"], tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(pipelines, "read_text_encoder")
        save_merged(model, tmp_path / "lora", tmp_path / "merged", 10**9)
    own = {path.relative_to(base): path for path in base.rglob("*") if path.is_file()}
    copied = {path: tmp_path / "merged" / path for path in own}
    assert all(path.is_file() for path in copied.values())
    changed = {str(p) for p in own if own[p].read_bytes() != copied[p].read_bytes()}
    assert changed == {f"{backbone.denoiser_name}/diffusion_pytorch_model.safetensors"}
    stock = [stock_pipeline(base, tmp_path, form) for form in ("lora", "merged")]
    on_base, merged = map(picture, stock)
    assert levels_apart(on_base, merged) <= 1 < levels_apart(on_base, untuned)


@pytest.mark.parametrize("targets", ["lcm", "all-linear"])
def test_stock_diffusers_loads_adapters_of_xl(tmp_path: Path, targets: str) -> None:
    """What ComfyUI calls a layer is the same in both families; diffusers reads it by patterns."""
    tiny.xl_pipeline().save_pretrained(tmp_path / "base")
    model = Model(backbone="sdxl", path=str(tmp_path / "base"), resolution=(16, 16))
    spec = Adapter(rank=2, alpha=7.0, targets=targets)
    backbone = sdxl.load(model, torch.device("cpu"), torch.float32)
    _, lora = exported(backbone, spec, tmp_path)
    for form in ("lora", "lora/kohya.safetensors"):
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
        stock.load_lora_weights(tmp_path / form)
        loaded = {name: p for name, p in stock.unet.named_parameters() if "lora_" in name}
        assert len(loaded) == len(lora.values) > 0
        for name, value in lora.values.items():
            assert torch.equal(loaded[name.replace(".weight", ".default_0.weight")], value), form
        scales = {
            scale
            for module in stock.unet.modules()
            if isinstance(module, LoraLayer)
            for scale in module.scaling.values()
        }
        assert scales == {1.0}


def lora_of(name: str, targets: str | tuple[str, ...]) -> tuple[ModelMixin, Lora]:
    """A transformer of a block of each kind on the meta device, and an adapter of it; of FLUX.1 as
    wide as it is, which diffusers takes for granted.
    """
    made = {
        "flux": lambda: FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True
        ),
        "flux2": lambda: tiny.flux2_transformer(16),
        "qwen_image": lambda: QwenImageTransformer2DModel(num_layers=1),
        "z_image": lambda: ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1),
    }
    with torch.device("meta"):
        network = made[name]()
        add_lora(network, Adapter(rank=2, alpha=2.0, targets=targets), seed=0)
    shapes = get_peft_model_state_dict(network)
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(of.shape, generator=generator) for key, of in shapes.items()}
    return network, Lora(values, 2)


def changes_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, a few rows of what an adapter of rank 2 adds, in float64: exact but for one sum."""
    ups = {key.removesuffix(B): value for key, value in values.items() if key.endswith(B)}
    return {key: up[::97].double() @ values[key + A].double() for key, up in ups.items()}


STOCK = {
    "flux": FluxPipeline,
    "flux2": Flux2Pipeline,
    "qwen_image": QwenImagePipeline,
    "z_image": ZImagePipeline,
}


@pytest.mark.parametrize("targets", ["attention", "attention+ff", ("to_q",)], ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_reads_kohyas_names_of_transformers(tmp_path, name, targets) -> None:
    """To the bit, also where the original code has one layer for several: what is not adapted of
    those is zero.
    """
    network, lora = lora_of(name, targets)
    about = describe(network.config, "flow", (512, 512), "a run")
    save_for_kohya(lora, network.config, about, tmp_path / "lora.safetensors")
    found = STOCK[name].lora_state_dict(tmp_path / "lora.safetensors")
    found = changes_of({key.removeprefix("transformer."): value for key, value in found.items()})
    for layer, change in changes_of(lora.values).items():
        assert torch.equal(found.pop(layer), change)
    assert all(layer.endswith(MERGED) and not change.any() for layer, change in found.items())
    assert bool(found) == (
        (name == "flux" and targets == "attention")
        or (name in {"flux", "flux2", "z_image"} and targets == ("to_q",))
    )


def test_a_file_of_a_transformer_says_what_it_fits_as_kohyas_trainers_say_it() -> None:
    """sd-scripts of FLUX.1, musubi-tuner of others; FLUX.2's sizes differ in their text's width."""
    flux = {"num_single_layers": 1}
    configs = (
        flux | {"pooled_projection_dim": 768, "guidance_embeds": True},
        flux | {"pooled_projection_dim": 768, "guidance_embeds": False},
        *(flux | {"joint_attention_dim": 3 * width} for width in (5120, 2560, 4096)),
        {"joint_attention_dim": 3584, "guidance_embeds": False},
        {"cap_feat_dim": 2560},
    )
    told = [
        [
            about["modelspec.architecture"],
            about["ss_network_module"],
            about["ss_base_model_version"],
        ]
        for about in (describe(config, "flow", (512, 512), "a run") for config in configs)
    ]
    assert told == [
        ["flux-1-dev/lora", "networks.lora_flux", "flux1"],
        ["flux-1-schnell/lora", "networks.lora_flux", "flux1"],
        ["Flux.2-dev/lora", "networks.lora_flux_2", "flux_2_dev"],
        ["Flux.2-klein-4b/lora", "networks.lora_flux_2", "flux_2_klein_4b"],
        ["Flux.2-klein-9b/lora", "networks.lora_flux_2", "flux_2_klein_9b"],
        ["Qwen-Image/lora", "networks.lora_qwen_image", "qwen_image"],
        ["Z-Image/lora", "networks.lora_zimage", "z_image"],
    ]


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_every_layer_of_flux_has_a_name_of_the_original_code(name) -> None:
    """Scale and shift of the last norm stand the other way there."""
    network, lora = lora_of(name, "all-linear")
    found = kohya_tensors(lora, network.config)
    kinds = {key.rsplit(".", 2)[0] for key in found if key.endswith("lora_up.weight")}
    outside = {key for key in kinds if "_blocks_" not in key}
    both = {"img_in", "txt_in", "time_in_in_layer", "time_in_out_layer"}
    both |= {"guidance_in_in_layer", "guidance_in_out_layer"}
    both |= {"final_layer_linear", "final_layer_adaLN_modulation_1"}
    own = {
        "flux": {"vector_in_in_layer", "vector_in_out_layer"},
        "flux2": {
            f"{of}_modulation{stream}_lin"
            for of, stream in (("double_stream", "_img"), ("double_stream", "_txt"))
        }
        | {"single_stream_modulation_lin"},
    }
    assert outside == {f"lora_unet_{key}" for key in both | own[name]}
    up = lora.values["norm_out.linear.lora_B.weight"]
    scale, shift = up.chunk(2)
    key = "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"
    assert torch.equal(found[key], torch.cat([shift, scale]))


def test_a_backbone_loads_an_adapter_and_a_merged_pipeline(
    tiny_backbone: LatentDiffusion, tiny_recipe, tmp_path: Path
) -> None:
    policy, _ = exported(tiny_backbone, SPECS["lora"], tmp_path)
    save_merged(tiny_recipe().model, tmp_path / "lora", tmp_path / "merged", 10**9)
    for folder, load in (("lora", "load_adapter"), ("merged", "load_denoiser")):
        other = sd.load(tiny_recipe().model, torch.device("cpu"), torch.float32)
        getattr(other, load)(tmp_path / folder)
        torch.testing.assert_close(predict(other.denoiser), predict(policy), rtol=0, atol=1e-5)
        assert not any(p.requires_grad for p in other.denoiser.parameters()) or folder == "lora"
        assert other.pipeline.unet is other.denoiser


@pytest.mark.parametrize(("name", "scale"), [("lora", 3.5), ("attention", 0.25), ("rslora", 1.5)])
def test_the_scale_is_in_the_numbers(
    tiny_backbone: LatentDiffusion, tmp_path: Path, name: str, scale: float
) -> None:
    """An rsLoRA of rank 4 and alpha 3 is scaled by 3 / 2: readers that know of no alpha see it."""
    policy, lora = exported(tiny_backbone, SPECS[name], tmp_path)
    for key, value in get_peft_model_state_dict(policy).items():
        factor = scale if "lora_B" in key else 1
        assert torch.equal(lora.values[key], value * factor)
    assert (lora.config["lora_alpha"], lora.config["use_rslora"]) == (SPECS[name].rank, False)
    kept = load_file(tmp_path / "lora" / "kohya.safetensors")
    assert {float(value) for key, value in kept.items() if key.endswith("alpha")} == {lora.rank}
    with safe_open(tmp_path / "lora" / "kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == str(lora.rank)
        assert file.metadata()["ss_output_name"] == "a run"
