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
from refusals import refused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, whole: not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in tiny.PIPELINES.items():
        make().save_pretrained(folder / name)
    return folder


def misfit(kind: str, key: str, backbone: str, path: Path, **changes: object) -> None:
    spec = Model(**{"backbone": backbone, "path": str(path), "resolution": (16, 16)} | changes)
    with refused(OutsideError, kind, key) as told:
        load_backbone(spec, CPU)
    assert "\n" not in str(told.value)


def unreadable(backbone: str, path: Path, **changes: object) -> str:
    spec = Model(**{"backbone": backbone, "path": str(path), "resolution": (16, 16)} | changes)
    with pytest.raises(OutsideError) as caught:
        load_backbone(spec, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        *(("sd", "sdxl"), ("sdxl", "sd"), ("sdxl", "sd3"), ("sd3", "sd"), ("lcm", "sd3")),
        *(("flux", "qwen_image"), ("qwen_image", "z_image"), ("z_image", "flux")),
        *(("qwen_image", "qwen_image21"), ("qwen_image21", "qwen_image")),
    ],
)
def test_a_folder_of_the_other_family_says_which_backbone_fits(folders, asked, given):
    message = unreadable(asked, folders / given)
    assert f"model.path={folders / given}" in message
    assert f"model.backbone={given} fits, not {asked}" in message


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_what_is_no_model_of_the_family_is_named(tmp_path, backbone):
    assert f"model.path={tmp_path} is no Stable Diffusion" in unreadable(backbone, tmp_path)


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"out_channels": 8}], ids=str)
def test_a_unet_that_does_not_fit_the_vae(tmp_path, folders, change):
    tiny.unet(**change).save_pretrained(tmp_path)
    misfit("mismatch", "model.unet", "sd", folders / "sd", unet=str(tmp_path))


def test_a_vae_that_does_not_fit_the_unet(tmp_path, folders):
    tiny.vae(latent_channels=8).save_pretrained(tmp_path)
    misfit("mismatch", "model.vae", "sd", folders / "sd", vae=str(tmp_path))


def test_a_vae_with_statistics_of_its_own(tmp_path, folders):
    tiny.vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(tmp_path)
    misfit("unsupported", "model.vae", "sdxl", folders / "sdxl", vae=str(tmp_path))


@pytest.mark.parametrize(("backbone", "other"), [("sd", "sdxl"), ("sdxl", "sd")])
def test_a_unet_that_does_not_fit_the_text_encoders(folders, backbone, other):
    unet = str(folders / other / "unet")
    misfit("mismatch", "model.unet", backbone, folders / backbone, unet=unet)


def test_an_sdxl_unet_without_its_sizes(tmp_path, folders):
    tiny.unet(cross_attention_dim=40).save_pretrained(tmp_path / "plain")
    unet = str(tmp_path / "plain")
    misfit("unsupported", "model.unet", "sdxl", folders / "sdxl", unet=unet)

    # Five time ids: the refiner's, whose fifth is an aesthetic score.
    tiny.unet(
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 5 * 8,
    ).save_pretrained(tmp_path / "refiner")
    unet = str(tmp_path / "refiner")
    misfit("mismatch", "model.unet", "sdxl", folders / "sdxl", unet=unet)


def test_the_refiner_is_not_supported(tmp_path):
    pipeline = tiny.xl_pipeline(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path)
    misfit("unsupported", "model.path", "sdxl", tmp_path)


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_a_latent_consistency_unet_wants_another_backbone(tmp_path, folders, backbone):
    config = dict(tiny.PIPELINES[backbone]().unet.config)
    tiny.unet(**config | {"time_cond_proj_dim": 8}).save_pretrained(tmp_path)
    misfit("unsupported", "model.unet", backbone, folders / backbone, unet=str(tmp_path))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_unet_folder_that_holds_something_else(folders, part):
    unet = str(folders / "sd" / part)
    assert f"model.unet={unet} is no UNet: " in unreadable("sd", folders / "sd", unet=unet)


def test_an_unknown_prediction_type_is_refused_with_its_folder(tmp_path):
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", prediction_type="flow_prediction")
    misfit("unknown", "model.path", "sd", with_scheduler(tmp_path, tiny.pipeline, scheduler))


def test_a_schedule_that_is_no_ddpm_is_refused(tmp_path):
    path = with_scheduler(tmp_path, tiny.xl_pipeline, EDMEulerScheduler())
    misfit("unsupported", "model.path", "sdxl", path)


def test_a_beta_schedule_that_ddim_does_not_know(tmp_path):
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.register_to_config(beta_schedule="sigmoid")
    path = with_scheduler(tmp_path, tiny.pipeline, DDIMScheduler())
    scheduler.save_pretrained(path / "scheduler")
    assert f"model.path={path} is no " in unreadable("sd", path)


def test_zero_terminal_snr_cannot_be_sampled_with_epsilon(tmp_path):
    """x0 = (x - sigma eps) / alpha, with alpha = 0 at the timestep that sampling starts from."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    path = with_scheduler(tmp_path, tiny.pipeline, scheduler)
    misfit("contradiction", "model.path", "sd", path)


@pytest.mark.parametrize("backbone", ["sd", "sdxl"])
def test_resolution_must_suit_vae_and_unet(folders, backbone):
    for resolution in ((18, 16), (16, 20)):
        misfit("mismatch", "model.resolution", backbone, folders / backbone, resolution=resolution)


def with_scheduler(folder: Path, make: Callable[[], DiffusionPipeline], scheduler: object) -> Path:
    pipeline = make()
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
