"""Whether the parts of a model fit together, and the recipe fits them: each misfit is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin

from ..basics.errors import OutsideError
from ..recipe import Model
from .autoencoder import is_of_videos, vae_sizes
from .ddpm import PREDICTION_TYPES

SOLVER = "DPMSolverMultistepScheduler"
# Of the schedulers of flow models: noise nobody seeds, and levels that are no flow's or that the
# stock pipeline does not shift.
NOT_OF_FLOWS = (
    *("invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)
Config = Mapping[str, Any]
"""Of a network of diffusers."""
PIPELINE_MULTIPLE = 8  # diffusers refuses other sizes, also where VAE and UNet would take them


def check_parts(spec: Model, pipeline: DiffusionPipeline, text_width: int) -> None:
    """OutsideError unless UNet, VAE, text encoders and the resolution go together.

    Args:
        spec: names the parts in messages.
        pipeline: with `unet` and `vae`.
        text_width: of the token embeddings, all text encoders side by side.
    """
    check_unet(spec, pipeline.unet.config, pipeline.vae.config)
    _check_text(spec, pipeline.unet.config, text_width)


def check_unet(spec: Model, unet: Config, vae: Config) -> None:
    """OutsideError unless a UNet can halve latents of the resolution often enough, and has a VAE of
    its latents.
    """
    _check_latents(spec, {end: unet[end] for end in ("in_channels", "out_channels")}, vae)
    height, width = spec.resolution
    halvings = len(unet["down_block_types"]) - 1
    factor = math.lcm(vae_sizes(vae)[1] * 2**halvings, PIPELINE_MULTIPLE)
    if height % factor or width % factor:
        raise _other_resolution(spec, factor)


def check_diffusion_unet(spec: Model, unet: UNet2DConditionModel) -> None:
    """OutsideError for a latent consistency model, which is trained and sampled another way."""
    guidance_width = unet.config["time_cond_proj_dim"]
    if guidance_width is not None:
        raise OutsideError(
            f"{unet_name(spec)} is a latent consistency model "
            f"(time_cond_proj_dim={guidance_width}): model.backbone=lcm fits, "
            f"not {spec.backbone}",
            unet_key(spec),
            "unsupported",
        )


def check_schedule(spec: Model, scheduler: SchedulerMixin) -> None:
    """OutsideError for a noise schedule that is not a discrete DDPM, or that DDIM cannot sample."""
    config, name = scheduler.config, f"model.path={spec.path}: its {type(scheduler).__name__}"
    if "beta_schedule" not in config:
        raise OutsideError(
            f"{name} has no beta schedule: model.backbone={spec.backbone} needs one",
            "model.path",
            "unsupported",
        )
    if config["prediction_type"] not in PREDICTION_TYPES:
        raise OutsideError(
            f"{name} has prediction_type={config['prediction_type']!r}; known are "
            f"{', '.join(PREDICTION_TYPES)}",
            "model.path",
            "unknown",
        )
    from_pure_noise = config.get("timestep_spacing", "leading") != "leading"
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if zero_snr and from_pure_noise and config["prediction_type"] == "epsilon":
        raise OutsideError(
            f"{name} has rescale_betas_zero_snr with prediction_type='epsilon' and "
            f"timestep_spacing={config['timestep_spacing']!r}: from pure noise the noise says "
            "nothing of the image; such models predict v",
            "model.path",
            "contradiction",
        )


def check_flow_schedule(spec: Model, scheduler: SchedulerMixin) -> None:
    """OutsideError for a scheduler that is not that of a flow model, or adds noise nobody seeds."""
    found, config = type(scheduler).__name__, scheduler.config
    name = f"model.path={spec.path}: its {found}"
    if found not in spec.family.schedulers:
        raise OutsideError(
            f"{name} is no {' or '.join(spec.family.schedulers)}, which model.backbone="
            f"{spec.backbone} needs",
            "model.path",
            "unsupported",
        )
    if found == SOLVER and not (
        config["use_flow_sigmas"] and config["prediction_type"] == "flow_prediction"
    ):
        raise OutsideError(
            f"{name} is not on a flow (use_flow_sigmas, prediction_type=flow_prediction)",
            "model.path",
            "unsupported",
        )
    for option in NOT_OF_FLOWS:
        if config.get(option):
            raise OutsideError(
                f"{name} has {option}, which is not supported: set it to false in its config",
                "model.path",
                "unsupported",
            )


def check_transformer(
    spec: Model, vae: Config, *, channels: Mapping[str, int], patch: int, most: int | None = None
) -> None:
    """OutsideError unless a transformer that cuts latents into patches, a VAE and the resolution go
    together; to be asked before weights are read.

    Args:
        spec: names the parts in messages.
        vae: its config.
        channels: of latents, by what the transformer's config calls them.
        patch: latents along a side of what is one token.
        most: patches along a side that it has places for, if there is a limit.
    """
    _check_latents(spec, channels, vae)
    height, width = spec.resolution
    factor = vae_sizes(vae)[1] * patch
    if height % factor or width % factor:
        raise _other_resolution(spec, factor)
    if most is not None and max(height, width) > most * factor:
        raise OutsideError(
            f"model.resolution={height}x{width} is too large for {unet_name(spec)}, which has "
            f"places for {most} x {most} patches: at most {most * factor} each way",
            "model.resolution",
            "mismatch",
        )


def check_text_widths(spec: Model, transformer: Config, **widths: int) -> None:
    """OutsideError unless embeddings of these widths, by the names that the transformer's config
    has for them, are what it takes.
    """
    for name, width in widths.items():
        if transformer[name] != width:
            raise OutsideError(
                f"{unet_name(spec)} and the text encoders of model.path={spec.path} do not fit: "
                f"{name}={transformer[name]}, embeddings of width {width}",
                unet_key(spec),
                "mismatch",
            )


def unet_key(spec: Model) -> str:
    """The key of the recipe that chose the UNet."""
    return "model.unet" if spec.unet else "model.path"


def unet_name(spec: Model) -> str:
    """How messages call the denoiser: by the key that chose it."""
    kind = "transformer" if spec.is_flow else "UNet"
    return f"model.unet={spec.unet}" if spec.unet else f"the {kind} of model.path={spec.path}"


def _vae_key(spec: Model) -> str:
    return "model.vae" if spec.vae else "model.path"


def _check_latents(spec: Model, channels: Mapping[str, int], vae: Config) -> None:
    vae_name = f"model.vae={spec.vae}" if spec.vae else f"the VAE of model.path={spec.path}"
    if is_of_videos(vae):
        _check_statistics(vae, vae_name, _vae_key(spec))
    elif vae.get("latents_mean") is not None:
        raise OutsideError(
            f"{vae_name} normalises each channel (latents_mean), which this backbone does not",
            _vae_key(spec),
            "unsupported",
        )
    of_vae, _ = vae_sizes(vae)
    for end, count in channels.items():
        if count != of_vae:
            raise OutsideError(
                f"{unet_name(spec)} and {vae_name} do not fit: {end}={count}, "
                f"latent_channels={of_vae}",
                "model.unet" if spec.unet else _vae_key(spec),
                "mismatch",
            )


def _check_statistics(vae: Config, name: str, key: str) -> None:
    for statistic in ("latents_mean", "latents_std"):
        found = vae.get(statistic) or ()
        if len(found) != vae["z_dim"]:
            raise OutsideError(
                f"{name} has {len(found)} numbers of {statistic}, where its z_dim={vae['z_dim']} "
                "channels have one each: its config is incomplete",
                key,
                "mismatch",
            )


def _check_text(spec: Model, unet: Config, text_width: int) -> None:
    taken = unet["cross_attention_dim"]
    widths = {taken} if isinstance(taken, int) else set(taken)
    if widths != {text_width}:
        raise OutsideError(
            f"{unet_name(spec)} and the text encoder of model.path={spec.path} do not fit: "
            f"cross_attention_dim={taken}, embeddings of width {text_width}",
            unet_key(spec),
            "mismatch",
        )


def _other_resolution(spec: Model, factor: int) -> OutsideError:
    height, width = spec.resolution
    return OutsideError(
        f"model.resolution={height}x{width} does not fit this model: both must be "
        f"multiples of {factor}",
        "model.resolution",
        "mismatch",
    )
