"""What a model's folder leaves out: a schedule's gaps, and tensors that nobody may make up."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import load_backbone
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.recipe import Model
from cdpo.engine.training.dry_run.networks import read_meta_model
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from refusals import refused
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
LAYER = "encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd`, `sdxl` and `lcm_unet`: not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    tiny.pipeline().save_pretrained(folder / "sd")
    tiny.xl_pipeline().save_pretrained(folder / "sdxl")
    tiny.lcm_unet().save_pretrained(folder / "lcm_unet")
    return folder


def load(backbone: str, path: Path, **changes: object) -> LatentDiffusion:
    spec = Model(**{"backbone": backbone, "path": str(path), "resolution": (16, 16)} | changes)
    return load_backbone(spec, CPU)


def with_schedule(folder: Path, made: Path, **config: object) -> Path:
    """A copy of a model whose scheduler's config says no more than this."""
    shutil.copytree(folder, made)
    (made / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((made / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (made / "model_index.json").write_text(json.dumps(index))
    return made


@pytest.mark.parametrize("backbone", ["sd", "lcm"])
@pytest.mark.parametrize("named", [DDIMScheduler, LCMScheduler, EulerDiscreteScheduler])
def test_gaps_of_a_schedule_are_the_defaults_of_the_scheduler_it_names(
    tmp_path: Path, folders: Path, backbone: str, named: type
) -> None:
    """Not of the one that it is sampled with: their betas run from 0.0001 or from 0.00085."""
    own, others = named(), {DDIMScheduler: LCMScheduler, LCMScheduler: DDIMScheduler}
    expected = own.alphas_cumprod
    assert not torch.equal(expected, others.get(named, LCMScheduler)().alphas_cumprod)
    path = with_schedule(folders / "sd", tmp_path / "gaps", _class_name=named.__name__)
    unet = {"unet": str(folders / "lcm_unet")} if backbone == "lcm" else {}
    loaded = load(backbone, path, **unet)

    sampled = loaded.pipeline.scheduler
    again = type(sampled).from_config(sampled.config)  # as at each sampling
    assert torch.equal(sampled.alphas_cumprod, expected)
    assert torch.equal(again.alphas_cumprod, expected)
    alpha = loaded.noise.at(torch.arange(1000)).alpha
    assert torch.equal(alpha, expected.double().sqrt().float())

    loaded.pipeline.scheduler.save_pretrained(tmp_path / "exported")
    exported = DDIMScheduler.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.alphas_cumprod, expected)


def test_what_a_schedule_says_stands_and_sampling_is_as_diffusers_fills_it_in(
    tmp_path: Path, folders: Path
) -> None:
    """Euler's timesteps are spaced `linspace`, those of DDIM `leading`, where nothing is said."""
    said = {"beta_start": 0.001, "prediction_type": "v_prediction"}
    name = "EulerDiscreteScheduler"
    path = with_schedule(folders / "sd", tmp_path / "said", _class_name=name, **said)
    config = load("sd", path).pipeline.scheduler.config
    stock = DDIMScheduler.from_config(EulerDiscreteScheduler(**said).config)
    assert {key: config[key] for key in said} == said
    assert config["timestep_spacing"] == stock.config["timestep_spacing"] == "leading"
    path = with_schedule(
        folders / "sd", tmp_path / "spaced", _class_name=name, timestep_spacing="trailing"
    )
    assert load("sd", path).pipeline.scheduler.config["timestep_spacing"] == "trailing"


def drop(folder: Path, *endings: str, name: str = "model.safetensors") -> list[str]:
    """Take tensors out of a weights file; returns the endings of their names."""
    state = load_file(folder / name)
    kept = {key: value for key, value in state.items() if not key.endswith(endings)}
    assert len(kept) == len(state) - len(endings)
    save_file(kept, folder / name, metadata={"format": "pt"})
    return sorted(endings)


@pytest.mark.parametrize(
    ("backbone", "encoder"),
    [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_a_text_encoder_without_a_tensor_is_refused(
    tmp_path: Path, folders: Path, backbone: str, encoder: str
) -> None:
    """transformers would make it up, from random numbers."""
    path = shutil.copytree(folders / backbone, tmp_path / "model")
    drop(path / encoder, f"{LAYER}.weight")
    with pytest.raises(OutsideError) as caught:
        load(backbone, path)
    assert f"model.path={path} is no " in str(caught.value)
    assert f"the weights of its {encoder} lack " in str(caught.value)
    assert str(caught.value).endswith(f"{LAYER}.weight")


def test_of_many_missing_tensors_three_are_named(tmp_path: Path, folders: Path) -> None:
    path = shutil.copytree(folders / "sd", tmp_path / "model")
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "final_layer_norm.bias")
    drop(path / "text_encoder", *names)
    with refused(OutsideError, "unreadable", "model.path") as caught:
        load("sd", path)
    assert str(caught.value).endswith(" and 2 more")
    assert str(caught.value).count("mlp.fc") + str(caught.value).count("layer_norm") == 3


def test_the_projection_of_the_second_encoder_may_not_be_missing(
    tmp_path: Path, folders: Path
) -> None:
    path = shutil.copytree(folders / "sdxl", tmp_path / "model")
    drop(path / "text_encoder_2", "text_projection.weight")
    with refused(OutsideError, "unreadable", "model.path") as caught:
        load("sdxl", path)
    assert str(caught.value).endswith("text_encoder_2 lack text_projection.weight")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_variant_alone_name_the_key_that_reads_them(part, folders, tmp_path):
    path = shutil.copytree(folders / "sd", tmp_path / "model")
    (plain,) = (path / part).glob("*.safetensors")
    only = plain.with_suffix(".fp16.safetensors")
    plain.rename(only)
    with refused(OutsideError, "unreadable", "model.path") as told:
        load("sd", path)
    assert str(told.value).endswith(f"{only} is there: model.variant=fp16 reads it")
    expected = load("sd", folders / "sd").fingerprints()
    assert load("sd", path, variant="fp16").fingerprints() == expected
    if part != "text_encoder":  # as a part of its own: from a variant if there is one, else plain
        for folder in (path, folders / "sd"):
            changed = {part: str(folder / part), "variant": "fp16"}
            assert load("sd", path, **changed).fingerprints() == expected


@pytest.mark.parametrize(
    ("backbone", "key", "maker"),
    [
        ("sd", "path", "StableDiffusionPipeline"),
        ("sdxl", "path", "StableDiffusionXLPipeline"),
        ("sd", "vae", "AutoencoderKL"),
        ("sd", "unet", "UNet2DConditionModel"),
    ],
)
def test_a_single_file_is_one_line_that_makes_a_folder_of_it(
    backbone, key, maker, folders, tmp_path
):
    file = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, file)
    given = {"path": folders / backbone} | {key: str(file)}
    spec = Model(backbone=backbone, resolution=(16, 16), **{k: str(v) for k, v in given.items()})
    for read in (lambda: load_backbone(spec, CPU), lambda: read_meta_model(spec, torch.float32)):
        with refused(OutsideError, "unreadable", f"model.{key}") as told:
            read()
        code = str(told.value).partition('python -c "')[2].removesuffix('"')
        assert f"{maker}.from_single_file({str(file)!r}).save_pretrained('v1-5')" in code
        ast.parse(code)
        assert hasattr(getattr(diffusers, maker), "from_single_file")


def test_text_encoders_are_read_as_the_stock_pipeline_reads_them(
    tmp_path: Path, folders: Path
) -> None:
    """From a variant where there is one of them, else from the plain file; in the precision asked
    for.
    """
    path = shutil.copytree(folders / "sdxl", tmp_path / "model")
    plain = load("sdxl", path)
    for folder, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = path / folder / f"{name}.safetensors"
        state = {key: value.half() for key, value in load_file(file).items()}
        save_file(state, path / folder / f"{name}.fp16.safetensors", metadata={"format": "pt"})
        file.unlink()
    for part in ("text_encoder", "text_encoder_2"):
        varied = getattr(load("sdxl", path, variant="fp16").pipeline, part).state_dict()
        for key, value in getattr(plain.pipeline, part).state_dict().items():
            expected = value.half().float() if part == "text_encoder" else value
            assert torch.equal(varied[key], expected)
    spec = Model(backbone="sdxl", path=str(folders / "sdxl"), resolution=(16, 16))
    half = load_backbone(spec, CPU, "bf16").pipeline
    assert half.text_encoder.dtype == half.text_encoder_2.dtype == torch.bfloat16
    assert not half.text_encoder.training


def _says(entry: object) -> Callable[[Path], None]:
    """Another entry of its tokenizer in a model's model_index.json."""

    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": entry}))

    return change


def _without(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        (
            "flux2",
            lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"),
            "tokenizer/",
        ),
        ("flux2", _without("tokenizer/tokenizer.json"), "tokenizer/"),
        ("flux2", _without("tokenizer/chat_template.jinja"), "tokenizer/chat_template.jinja"),
        ("z_image", _without("tokenizer/chat_template.jinja"), "tokenizer/chat_template.jinja"),
        ("qwen_image21", _without("processor/chat_template.jinja"), "chat template"),
        ("sd", _says([None, None]), "no tokenizer"),
        ("sd", _says(None), "model_index.json says None of tokenizer"),
        ("sd", _says("CLIPTokenizer"), "model_index.json says 'CLIPTokenizer' of tokenizer"),
    ],
)
def test_what_reads_prompts_is_named_where_it_is_none(
    recipe_of, tmp_path: Path, family: str, change: Callable[[Path], None], told: str
) -> None:
    model = recipe_of(family).model
    shutil.copytree(model.path, tmp_path / "model")
    change(tmp_path / "model")
    broken = model.model_copy(update={"path": str(tmp_path / "model")})
    with refused(OutsideError, "unreadable", "model.path") as refusal:
        load_backbone(broken, CPU)
    assert told in str(refusal.value)
