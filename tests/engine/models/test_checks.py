"""Models whose parts, schedule or family do not fit: each is one line that names the cure."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import load_backbone
from cdpo.engine.recipe import Model
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd` and `sdxl`, whole: not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in tiny.PIPELINES.items():
        make().save_pretrained(folder / name)
    return folder


def refusal(backbone: str, path: Path, **changes: object) -> str:
    spec = Model(**{"backbone": backbone, "path": str(path), "resolution": (16, 16)} | changes)
    with pytest.raises(OutsideError) as caught:
        load_backbone(spec, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("asked", "given"), [("sd", "sdxl"), ("sdxl", "sd")])
def test_a_folder_of_the_other_family_says_which_backbone_fits(folders, asked, given):
    message = refusal(asked, folders / given)
    assert f"model.path={folders / given}" in message
    assert f"model.backbone={given} fits, not {asked}" in message


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_what_is_no_model_of_the_family_is_named(tmp_path, backbone):
    assert f"model.path={tmp_path} is no Stable Diffusion" in refusal(backbone, tmp_path)


def test_a_unet_that_does_not_fit_the_vae(tmp_path, folders):
    unets = {"wide": {"in_channels": 9}, "variance": {"out_channels": 8}}
    for name, change in unets.items():
        tiny.unet(**change).save_pretrained(tmp_path / name)
        message = refusal("sd", folders / "sd", unet=str(tmp_path / name))
        assert f"model.unet={tmp_path / name} and the VAE of model.path=" in message
        [(key, value)] = change.items()
        assert f"{key}={value}, latent_channels=4" in message


def test_a_vae_that_does_not_fit_the_unet(tmp_path, folders):
    tiny.vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    message = refusal("sd", folders / "sd", vae=str(tmp_path / "vae"))
    assert f"model.vae={tmp_path / 'vae'} do not fit: in_channels=4, latent_channels=8" in message


def test_a_vae_with_statistics_of_its_own(tmp_path, folders):
    tiny.vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(tmp_path / "vae")
    assert "latents_mean" in refusal("sdxl", folders / "sdxl", vae=str(tmp_path / "vae"))


def test_a_unet_that_does_not_fit_the_text_encoders(tmp_path, folders):
    for backbone, other, taken, given in [("sd", "sdxl", 40, 16), ("sdxl", "sd", 16, 40)]:
        unet = str(folders / other / "unet")
        message = refusal(backbone, folders / backbone, unet=unet)
        assert f"model.unet={unet} and the text encoder" in message
        assert f"cross_attention_dim={taken}, embeddings of width {given}" in message


def test_an_sdxl_unet_without_its_sizes(tmp_path, folders):
    tiny.unet(cross_attention_dim=40).save_pretrained(tmp_path / "plain")
    message = refusal("sdxl", folders / "sdxl", unet=str(tmp_path / "plain"))
    assert "takes no sizes and pooled text (addition_embed_type=None)" in message

    # Five time ids: the refiner's, whose fifth is an aesthetic score.
    tiny.unet(
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 5 * 8,
    ).save_pretrained(tmp_path / "refiner")
    message = refusal("sdxl", folders / "sdxl", unet=str(tmp_path / "refiner"))
    assert "projection_class_embeddings_input_dim=52" in message and "make 60" in message


def test_the_refiner_is_not_supported(tmp_path):
    pipeline = tiny.xl_pipeline(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path / "refiner")
    assert "its refiner is not supported" in refusal("sdxl", tmp_path / "refiner")


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_a_latent_consistency_unet_wants_another_backbone(tmp_path, folders, backbone):
    config = dict(tiny.PIPELINES[backbone]().unet.config)
    tiny.unet(**config | {"time_cond_proj_dim": 8}).save_pretrained(tmp_path / "lcm")
    message = refusal(backbone, folders / backbone, unet=str(tmp_path / "lcm"))
    assert f"model.unet={tmp_path / 'lcm'} is a latent consistency model" in message
    assert f"model.backbone=lcm fits, not {backbone}" in message


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_unet_folder_that_holds_something_else(folders, part):
    unet = str(folders / "sd" / part)
    assert f"model.unet={unet} is no UNet: " in refusal("sd", folders / "sd", unet=unet)


def test_an_unknown_prediction_type_is_named_with_its_folder(tmp_path):
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", prediction_type="flow_prediction")
    path = with_scheduler(tmp_path, tiny.pipeline, scheduler)
    message = refusal("sd", path)
    assert f"model.path={path}: its PNDMScheduler has prediction_type='flow_prediction'" in message
    assert "known are epsilon, v_prediction, sample" in message


def test_a_schedule_that_is_no_ddpm_is_refused(tmp_path):
    path = with_scheduler(tmp_path, tiny.xl_pipeline, EDMEulerScheduler())
    assert "its EDMEulerScheduler has no beta schedule" in refusal("sdxl", path)


def test_a_beta_schedule_that_ddim_does_not_know(tmp_path):
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.register_to_config(beta_schedule="sigmoid")
    path = with_scheduler(tmp_path, tiny.pipeline, DDIMScheduler())
    scheduler.save_pretrained(path / "scheduler")
    assert f"model.path={path} is no " in refusal("sd", path)


def test_zero_terminal_snr_cannot_be_sampled_with_epsilon(tmp_path):
    """x0 = (x - sigma eps) / alpha, with alpha = 0 at the timestep that sampling starts from."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    message = refusal("sd", with_scheduler(tmp_path, tiny.pipeline, scheduler))
    assert "rescale_betas_zero_snr with prediction_type='epsilon'" in message


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_resolution_must_suit_vae_and_unet(folders, backbone):
    for resolution in ((18, 16), (16, 20)):
        message = refusal(backbone, folders / backbone, resolution=resolution)
        assert "does not fit this model: both must be multiples of 8" in message


def with_scheduler(folder: Path, make: Callable[[], DiffusionPipeline], scheduler: object) -> Path:
    pipeline = make()
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
