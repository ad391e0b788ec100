"""Loading the stock diffusers pipeline of a recipe, with the parts that it replaces."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin

from ..recipe import Model
from .checks import check_schedule
from .pretrained import read_network, read_text_encoder, reading, refuse_missing_weights

# What model_index.json may say, and the backbone that reads it.
BACKBONES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "LatentConsistencyModelPipeline": "lcm",
}
# What a scheduler's config says of the model's noise; the rest of it says how to sample.
NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    spec: Model,
    dtype: torch.dtype,
    *,
    kind: str,
    scheduler_class: type[SchedulerMixin] = DDIMScheduler,
    holding: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """The pipeline of a folder or hub id, with the recipe's own UNet and VAE where it names them.

    Args:
        pipeline_class: what the folder must hold, e.g. `StableDiffusionPipeline`.
        spec: path, revision, variant and replacements.
        dtype: of every network but the VAE, which is float32.
        kind: what the folder should have been, for messages.
        scheduler_class: how the pipeline samples, on the schedule that its folder describes.
        holding: names of other classes whose folders `pipeline_class` can read.
        options: further arguments of `pipeline_class.from_pretrained`.

    Raises:
        OutsideError: names the folder and what it lacks, or the backbone that fits it.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        index = pipeline_index(place, spec)
        _refuse_other_family({pipeline_class.__name__, *holding}, index, spec)
        encoders = _text_encoders(place, index, spec, dtype)
    replaced = _replacements(spec, dtype)
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        pipeline = pipeline_class.from_pretrained(
            place,
            dtype={"vae": torch.float32, "default": dtype},
            revision=spec.revision,
            variant=spec.variant,
            **encoders,
            **replaced,
            **options,
        )
        for name, part in (("UNet", pipeline.unet), ("VAE", pipeline.vae)):
            refuse_missing_weights(part, name)
    check_schedule(spec, pipeline.scheduler)
    with reading(f"model.path={spec.path}", f"model that {scheduler_class.__name__} can sample"):
        pipeline.scheduler = sampling_with(scheduler_class, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling_with(scheduler_class: type[SchedulerMixin], own: SchedulerMixin) -> Any:
    """Another scheduler on the noise schedule of a model's own, ``own``.

    What a folder's config leaves out has the defaults of the scheduler that it names. Given that
    scheduler's config, diffusers fills the same gaps with the defaults of ``scheduler_class``:
    right for how to sample, but betas are the model's (0.0001 to 0.02 for DDIM, 0.00085 to 0.012
    for LCM).
    """
    config = dict(own.config)
    gaps = set(config.pop("_use_default_values", ())) - set(NOISE_KEYS)
    given = {key: value for key, value in config.items() if key not in gaps}
    # Latents are not pixels in [-1, 1], to which some folders would have them clipped.
    return scheduler_class.from_config({**given, "clip_sample": False})


def pipeline_index(place: str, spec: Model) -> dict[str, Any]:
    """What model_index.json says: the class of the pipeline (`_class_name`), and of its parts."""
    index: dict[str, Any] = DiffusionPipeline.load_config(place, revision=spec.revision)
    return index


def _refuse_other_family(fitting: set[str], index: dict[str, Any], spec: Model) -> None:
    found = index.get("_class_name")
    if found in BACKBONES and found not in fitting:
        raise ValueError(
            f"it holds a {found}: model.backbone={BACKBONES[found]} fits, not {spec.backbone}"
        )


def _text_encoders(
    place: str, index: dict[str, Any], spec: Model, dtype: torch.dtype
) -> dict[str, Any]:
    """Those of transformers, by their names in the pipeline."""
    classes = {name: index.get(name, (None, None)) for name in ("text_encoder", "text_encoder_2")}
    return {
        name: read_text_encoder(getattr(transformers, class_name), place, spec, name, dtype)
        for name, (library, class_name) in classes.items()
        if library == "transformers"
    }


def _replacements(spec: Model, dtype: torch.dtype) -> dict[str, Any]:
    replaced: dict[str, Any] = {}
    if spec.vae is not None:
        replaced["vae"] = read_network(
            AutoencoderKL,
            spec.vae,
            torch.float32,
            key="model.vae",
            kind="VAE",
            variant=spec.variant,
        )
    if spec.unet is not None:
        replaced["unet"] = read_network(
            UNet2DConditionModel,
            spec.unet,
            dtype,
            key="model.unet",
            kind="UNet",
            variant=spec.variant,
        )
    return replaced
