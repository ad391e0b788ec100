"""Loading the stock diffusers pipeline of a recipe, with the parts that it replaces."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.schedulers import SchedulerMixin

from ..recipe import Model
from ..recipe.model import FLOW
from .checks import Config, check_flow_schedule, check_schedule, check_transformer
from .pretrained import (
    config_of,
    denoiser_name,
    read_network,
    read_text_encoder,
    reading,
    refuse_missing_weights,
    with_defaults,
)

# What model_index.json may say, and the backbone that reads it.
BACKBONES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "LatentConsistencyModelPipeline": "lcm",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
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
# The same of a flow model, and how many timesteps there are.
FLOW_KEYS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
)


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    spec: Model,
    dtype: torch.dtype,
    *,
    kind: str,
    denoiser: type[ModelMixin] = UNet2DConditionModel,
    scheduler_class: type[SchedulerMixin] = DDIMScheduler,
    **options: Any,
) -> Any:
    """The pipeline of a folder or hub id, with the recipe's own denoiser and VAE if it names them.

    Args:
        pipeline_class: what the folder must hold, e.g. `StableDiffusionPipeline`.
        spec: path, revision, variant and replacements.
        dtype: of every network but the VAE, which is float32.
        kind: what the folder should have been, for messages.
        denoiser: the class of what is trained.
        scheduler_class: how a UNet's pipeline samples, on the schedule that its folder describes;
            that of a flow model stays.
        options: further arguments of `pipeline_class.from_pretrained`.

    Raises:
        OutsideError: names the folder and what it lacks, or the backbone that fits it.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
    if spec.is_flow:
        check_transformer(spec, *_configs(spec, denoiser))
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        encoders = _text_encoders(place, index, spec, dtype)
    replaced = _replacements(spec, denoiser, dtype)
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
        own = denoiser_name(denoiser)
        for name, part in ((_told(own), getattr(pipeline, own)), ("VAE", pipeline.vae)):
            refuse_missing_weights(part, name)
    if spec.is_flow:
        check_flow_schedule(spec, pipeline.scheduler)
    else:
        check_schedule(spec, pipeline.scheduler)
        can = f"model that {scheduler_class.__name__} can sample"
        with reading(f"model.path={spec.path}", can):
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


def classes_of(backbone: str) -> set[str]:
    """Names of the pipelines that a backbone reads; an LCM is made of any with a UNet."""
    return {
        name
        for name, fitting in BACKBONES.items()
        if fitting == backbone or (backbone == "lcm" and fitting not in FLOW)
    }


def refuse_other_family(index: dict[str, Any], spec: Model) -> None:
    """ValueError with the backbone that fits, where that is another one than the recipe's."""
    found = index.get("_class_name")
    if found in BACKBONES and found not in classes_of(spec.backbone):
        raise ValueError(
            f"it holds a {found}: model.backbone={BACKBONES[found]} fits, not {spec.backbone}"
        )


def _text_encoders(
    place: str, index: dict[str, Any], spec: Model, dtype: torch.dtype
) -> dict[str, Any]:
    """Those of transformers, by their names in the pipeline, and what text part it lacks."""
    classes = {name: index.get(name, (None, None)) for name in TEXT_ENCODERS}
    found = {
        name: read_text_encoder(getattr(transformers, class_name), place, spec, name, dtype)
        for name, (library, class_name) in classes.items()
        if library == "transformers"
    }
    # What is null there, as the T5 of Stable Diffusion 3 may be, is null if it is said once more.
    absent = [name for name, entry in index.items() if entry == [None, None]]
    return found | {name: None for name in absent if name.startswith(("text_enc", "tokenizer"))}


def _configs(spec: Model, denoiser: type[ModelMixin]) -> tuple[Config, Config]:
    """Those of the denoiser and the VAE that a recipe names. OutsideError if there are none."""
    found = []
    for network, key, own, name in (
        (denoiser, "model.unet", spec.unet, denoiser_name(denoiser)),
        (AutoencoderKL, "model.vae", spec.vae, "vae"),
    ):
        path, chosen = (own, key) if own else (spec.path, "model.path")
        with reading(f"{chosen}={path}", f"{_told(name)} or model with one", path) as place:
            if own:
                found.append(config_of(network, place))
            else:
                options = {"subfolder": name, "revision": spec.revision}
                found.append(with_defaults(network, network.load_config(place, **options)))
    return found[0], found[1]


def _told(part: str) -> str:
    """A part's name as messages say it."""
    return {"unet": "UNet", "vae": "VAE"}.get(part, part)


def _replacements(spec: Model, denoiser: type[ModelMixin], dtype: torch.dtype) -> dict[str, Any]:
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
        name = denoiser_name(denoiser)
        replaced[name] = read_network(
            denoiser,
            spec.unet,
            dtype,
            key="model.unet",
            kind=_told(name),
            variant=spec.variant,
        )
    return replaced
