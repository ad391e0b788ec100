"""The families of models: what is known of each before its code or its weights are read.

A family is an entry here, a file `engine/models/NAME.py`, and its name in `Model.backbone`.
"""

from __future__ import annotations

from dataclasses import dataclass

UNET = "UNet2DConditionModel"


@dataclass(frozen=True)
class Family:
    """Names of classes are those of diffusers."""

    title: str
    """What a folder of it holds, as messages say it."""
    pipelines: tuple[str, ...]
    """What its folders may say they hold. The first reads one that says nothing we know."""
    denoiser: str = UNET
    """What is trained."""
    vae: str = "AutoencoderKL"
    sampler: str = "DDIM"
    """What draws its images, as reports say it."""
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """Of a flow model: what its folder's may be."""
    guided_twice: bool = True
    """Whether guidance takes a second pass, without the prompt, unless its denoiser embeds it."""
    chats: bool = False
    """Whether its tokenizer's chat template decides what its text encoder reads, and padding what
    its denoiser is told.
    """
    kohya: bool = True
    """Whether its LoRAs have names in kohya's files that ComfyUI and diffusers both read."""

    @property
    def is_flow(self) -> bool:
        """Whether it is a flow-matching transformer."""
        return self.denoiser != UNET


SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
FAMILIES = {
    "sd": Family("Stable Diffusion model", (SD,)),
    "sdxl": Family("Stable Diffusion XL model", (SDXL,)),
    "lcm": Family(
        "latent consistency model, nor a pipeline to put one in",
        ("LatentConsistencyModelPipeline", SD, SDXL),
        sampler="LCM",
        guided_twice=False,
    ),
    "sd3": Family(
        "Stable Diffusion 3 model",
        ("StableDiffusion3Pipeline",),
        "SD3Transformer2DModel",
        sampler="Euler",
        kohya=False,
    ),
    "flux": Family(
        "FLUX.1 model",
        ("FluxPipeline",),
        "FluxTransformer2DModel",
        sampler="Euler",
    ),
    "flux2": Family(
        "FLUX.2 model",
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
        sampler="Euler",
        chats=True,
    ),
    "sana": Family(
        "SANA model",
        ("SanaPipeline",),
        "SanaTransformer2DModel",
        "AutoencoderDC",
        sampler="DPM-Solver++",
        schedulers=("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
        kohya=False,
    ),
    "qwen_image": Family(
        "Qwen-Image model",
        ("QwenImagePipeline",),
        "QwenImageTransformer2DModel",
        "AutoencoderKLQwenImage",
        sampler="Euler",
    ),
    "qwen_image21": Family(
        "Qwen-Image 2.1 model",
        ("QwenImage21Pipeline",),
        "QwenImage21Transformer2DModel",
        "AutoencoderKLQwenImage21",
        sampler="Euler",
        chats=True,
        kohya=False,
    ),
    "z_image": Family(
        "Z-Image model",
        ("ZImagePipeline",),
        "ZImageTransformer2DModel",
        sampler="Euler",
        chats=True,
    ),
}


def family_that_reads(pipeline: object) -> str | None:
    """The name of the first family whose folders may say that they hold this; None of no other."""
    return next((name for name, family in FAMILIES.items() if pipeline in family.pipelines), None)
