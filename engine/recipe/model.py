"""Section of a recipe: the text-to-image model to align."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .family import FAMILIES, Family
from .section import NonNegativeFloat, PositiveInt, Section


class Model(Section):
    """The text-to-image model to align."""

    backbone: Literal[
        "sd",
        "sdxl",
        "lcm",
        "sd3",
        "flux",
        "flux2",
        "sana",
        "qwen_image",
        "qwen_image21",
        "z_image",
    ] = "sd"
    """Model family: decides text encoders, conditioning and noise process."""
    path: str
    """Folder in diffusers format, or hub id, e.g. `stable-diffusion-v1-5/stable-diffusion-v1-5`. A
    folder is looked up in the working folder, then among what is shipped (`assets/emoji/sd`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for a run others should repeat."""
    variant: str | None = None
    """Variant of the weights, in a folder or on the hub, e.g. `fp16` for files such as
    `model.fp16.safetensors`; parts that have none are read as they are."""
    vae: str | None = None
    """Another VAE (folder or hub id) in place of the model's own, e.g. an fp16-safe SDXL VAE."""
    unet: str | None = None
    """Another UNet (folder or hub id) in place of the model's own, e.g.
    `latent-consistency/lcm-sdxl`; of a flow model another transformer."""
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the weights of the denoiser's linear layers in fewer bits wherever it is loaded, so that
    it takes less memory and more time: `nf4` (4.5 bits a weight, by bitsandbytes), `int8` or `fp8`
    (8 bits, by torchao); `pip install 'cdpo[quantization]'`. For adapters, which train beside it in
    the run's precision; a merged export has the weights of the files."""
    lcm_lora: str | None = None
    """`backbone: lcm` only: an LCM-LoRA (folder, file or hub id) that makes `path` an LCM."""
    teacher: str | None = None
    """`backbone: lcm` only: the diffusion model the LCM was distilled from; where `unet` or
    `lcm_lora` turned `path` into an LCM, `path` as it was. `objective.target=image` reads none."""
    solver_steps: PositiveInt = 50
    """`backbone: lcm` only: steps of the teacher's DDIM solver the LCM was distilled with."""
    guidance_range: tuple[NonNegativeFloat, NonNegativeFloat] = (5.0, 15.0)
    """`backbone: lcm` only: range of the weight w that guides the teacher in training; a sampler's
    `guidance` is w + 1."""
    resolution: tuple[PositiveInt, PositiveInt] = (512, 512)
    """Height and width in pixels of what is sampled: multiples of 8 x the UNet's downsampling, of a
    flow model 16, of SANA and Qwen-Image 2.1 32."""
    embedded_guidance: NonNegativeFloat = 3.5
    """`backbone: flux` and `flux2` only: the guidance that FLUX.1 dev and FLUX.2 dev are told in
    training; schnell and klein are told none."""
    sigmas: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """Flow models only: where training draws noise levels on the scheduler's grid, under its shift.
    `logit_normal` and `mode` prefer the middle (both as published for Stable Diffusion 3)."""

    @model_validator(mode="after")
    def _keys_are_for_the_models_that_have_them(self) -> Model:
        if self.backbone != "lcm":
            given = [key for key in ("lcm_lora", "teacher") if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} belongs to backbone=lcm, not {self.backbone}"
                )
        if self.quantization is not None and self.backbone == "lcm":
            raise ValueError(
                f"quantization={self.quantization} is not for backbone=lcm, which merges an "
                "LCM-LoRA into its weights and has a teacher beside them: leave it out"
            )
        if self.sigmas != "logit_normal" and not self.is_flow:
            raise ValueError(
                f"sigmas={self.sigmas} is for flow models: backbone={self.backbone} draws its "
                "timesteps evenly"
            )
        if self.backbone not in ("flux", "flux2") and self.embedded_guidance != 3.5:
            raise ValueError(
                f"embedded_guidance={self.embedded_guidance:g} is for backbone=flux and flux2, not "
                f"{self.backbone}"
            )
        if self.unet is not None and self.lcm_lora is not None:
            raise ValueError("unet and lcm_lora both make an LCM of path: give one of them")
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range=[{low:g}, {high:g}] runs from high to low: swap them")
        return self

    @property
    def whole(self) -> Model:
        """The same with the weights that its files have."""
        return self.model_copy(update={"quantization": None})

    @property
    def family(self) -> Family:
        """What is known of `backbone`."""
        return FAMILIES[self.backbone]

    @property
    def is_flow(self) -> bool:
        """Whether it is a flow-matching transformer."""
        return self.family.is_flow
