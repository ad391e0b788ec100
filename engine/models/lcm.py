"""Latent consistency models of Stable Diffusion 1.x, 2.x and XL (Luo et al., arXiv 2310.04378).

An LCM is one of three things, and the teacher is the diffusion model that it was distilled from:

=====================  =============================================  ==========================
a whole pipeline       `path` alone, e.g. SimianLuo/LCM_Dreamshaper_v7  `teacher` must be given
a UNet for a pipeline  `path` and `unet`, e.g. SDXL and lcm-sdxl        `path`'s own by default
an LCM-LoRA            `path` and `lcm_lora`, e.g. lcm-lora-sdv1-5      `path`'s own by default
=====================  =============================================  ==========================

The first two are told the guidance weight as a sinusoidal embedding (`timestep_cond`); an LCM-LoRA
was distilled for a fixed one and is told nothing. Sampling runs the stock pipeline with the
LCMScheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..basics.errors import OutsideError, RecipeError
from ..recipe import Model
from . import sd, sdxl
from .adapters import padded
from .checks import Config, check_parts, check_unet, unet_key, unet_name
from .fingerprint_store import Kept, model_files
from .fingerprints import fingerprint, fingerprint_of_tensors, settings_of
from .latent_diffusion import GUIDANCE, LatentDiffusion, Teacher, ask_unet
from .pipelines import load_pipeline, pipeline_index, refuse_other_family
from .pretrained import read_network, reading
from .solver_grid import SolverGrid
from .text import Encoders, Told

XL = "StableDiffusionXLPipeline"
# What the folder may hold, and the class that samples it: that of diffusion models takes a
# guidance embedding too.
SAMPLED_BY = {
    "LatentConsistencyModelPipeline": StableDiffusionPipeline,
    "StableDiffusionPipeline": StableDiffusionPipeline,
    XL: StableDiffusionXLPipeline,
}


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folders."""
    with reading(f"model.path={spec.path}", spec.family.title, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
        found = index.get("_class_name")
        if found not in SAMPLED_BY:
            raise ValueError(f"it holds a {found}")
    options: dict[str, Any] = {}
    if found != XL:
        options = {"safety_checker": None, "requires_safety_checker": False}
    files = model_files(spec, dtype)
    pipeline = load_pipeline(
        spec,
        dtype,
        reads_text=reads_text,
        pipeline_class=SAMPLED_BY[found],
        scheduler_class=LCMScheduler,
        **options,
    )
    if found == XL:
        sdxl.check_xl(spec, pipeline)
        text: Any = sdxl.StableDiffusionXLText(pipeline)
    else:
        check_parts(spec, pipeline, pipeline.text_encoder.config.hidden_size)
        text = sd.StableDiffusionText(pipeline)
    own_parts = _become_consistent(spec, pipeline, files)
    noise = SolverGrid(
        pipeline.scheduler,
        device,
        solver_steps=spec.solver_steps,
        guidance=spec.guidance_range,
    )
    return LatentDiffusion(
        pipeline,
        text,
        noise,
        device,
        load_teacher=_teacher_loader(spec, dtype),
        own_parts=own_parts,
    )


check, ask = check_unet, ask_unet


def told(unet: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    is_xl = unet.get("addition_embed_type") == "text_time"
    return {**(sdxl if is_xl else sd).told(unet, encoders), GUIDANCE: ()}


def _become_consistent(spec: Model, pipeline: DiffusionPipeline, files: Kept) -> dict[str, str]:
    """Merge the LCM-LoRA, if the recipe names one; OutsideError if there is no LCM then.

    Returns the fingerprints of what is merged: the sum is rounded otherwise on another processor.
    """
    told_guidance = pipeline.unet.config["time_cond_proj_dim"] is not None
    if spec.lcm_lora is None:
        if not told_guidance:
            raise OutsideError(
                f"{unet_name(spec)} is no latent consistency model (it has no "
                "time_cond_proj_dim): name one as model.unet, or an LCM-LoRA as model.lcm_lora",
                unet_key(spec),
                "unsupported",
            )
        return {}
    if told_guidance:
        raise OutsideError(
            f"{unet_name(spec)} is a latent consistency model already: model.lcm_lora="
            f"{spec.lcm_lora} is for a diffusion model",
            "model.lcm_lora",
            "contradiction",
        )
    with reading(f"model.lcm_lora={spec.lcm_lora}", "LoRA of this model", spec.lcm_lora) as place:
        parts = files.read() or {"model": fingerprint(pipeline.unet)}
        pipeline.load_lora_weights(place)
        if not pipeline.get_list_adapters().get("unet"):
            raise ValueError("it adapts no layer of the UNet")
        if "lcm_lora" not in parts:
            parts["lcm_lora"] = _of_lora(pipeline.unet)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
    return parts


def lcm_lora_layers(spec: Model, pipeline: DiffusionPipeline) -> tuple[dict[str, Tensor], int]:
    """The LCM-LoRA of a recipe under peft's names, as diffusers scales it, and its rank.

    `<layer>.lora_A.weight` (r, in, ...) and `<layer>.lora_B.weight` (out, r, ...), the scale in B,
    float32. ``pipeline`` is of the recipe's model. Layers of a smaller rank get zeros.
    """
    place, config = str(spec.lcm_lora), pipeline.unet.config
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.to_empty(device="cpu")  # takes no memory while nobody writes there
    with reading(f"model.lcm_lora={place}", "LoRA of this model", place) as found:
        state, alphas, metadata = type(pipeline).lora_state_dict(
            found, unet_config=config, return_lora_metadata=True
        )
        type(pipeline).load_lora_into_unet(state, alphas, unet, metadata=metadata)
    parts = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.scaling
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            parts[name] = down.detach().float(), up.detach().float() * layer.scaling[adapter]
    rank = max(down.shape[0] for down, _ in parts.values())
    values = {}
    for name, (down, up) in parts.items():
        values[f"{name}.lora_A.weight"] = padded(down, 0, rank)
        values[f"{name}.lora_B.weight"] = padded(up, 1, rank)
    return values, rank


def _of_lora(unet: UNet2DConditionModel) -> str:
    """Fingerprint of the only adapter in a UNet: its tensors and scales."""
    tensors = {name: value for name, value in unet.state_dict().items() if "lora_" in name}
    [config] = unet.peft_config.values()
    scales = {key: getattr(config, key) for key in ("r", "lora_alpha", "alpha_pattern")}
    return fingerprint([fingerprint_of_tensors(tensors), scales])


def _teacher_loader(spec: Model, dtype: torch.dtype) -> Callable[[], Teacher]:
    """Reads the teacher when it is asked for: `prepare` and `compare` have no use for it."""
    own = spec.path if spec.unet or spec.lcm_lora else None
    path, key = (spec.teacher, "model.teacher") if spec.teacher else (own, "model.path")
    if path is None:
        return partial(_refuse_without_teacher, spec)
    return partial(_load_teacher, path, key, dtype, spec.variant)


def _refuse_without_teacher(spec: Model) -> Teacher:
    raise RecipeError(
        f"model.teacher is not given: training needs the diffusion model that "
        f"model.path={spec.path} was distilled from",
        "model.teacher",
        "missing",
    )


def _load_teacher(path: str, key: str, dtype: torch.dtype, variant: str | None) -> Teacher:
    """The UNet of a pipeline folder or hub id, or of one that holds a UNet alone."""
    files = Kept(["teacher", str(dtype)], [(path, None)])
    teacher = read_network(
        UNet2DConditionModel,
        path,
        dtype,
        key=key,
        kind="diffusion model to teach by",
        variant=variant,
    )
    if teacher.config["time_cond_proj_dim"] is not None:
        raise OutsideError(
            f"{key}={path} is itself a latent consistency model: the teacher is the diffusion "
            "model that it was distilled from",
            key,
            "unsupported",
        )
    parts = files.read()
    if parts is None:
        settings = fingerprint(settings_of(teacher))
        parts = {"teacher": fingerprint(teacher), "teacher_config": settings}
        files.keep(parts)
    return teacher.requires_grad_(False).eval(), parts
