"""Stable Diffusion XL (Podell et al., arXiv 2307.01952): two text encoders, and size conditioning.

Besides the token embeddings of both encoders the UNet is told the pooled embedding of the second
and six numbers of each image: its original size, the corner it was cropped at, and the size it is
shown in. Takes the base model in diffusers' `StableDiffusionXLPipeline` layout; the refiner, which
has one text encoder and an aesthetic score in place of the target size, is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from ..basics.errors import OutsideError
from ..basics.transfer import send
from ..recipe import Model
from .checks import (
    Config,
    check_diffusion_unet,
    check_parts,
    check_unet,
    unet_key,
    unet_name,
)
from .ddpm import DiscreteDDPM
from .latent_diffusion import LatentDiffusion, ask_unet
from .pipelines import load_pipeline
from .protocol import Conditioning, Framing
from .text import Encoders, PooledText, Told

TIME_IDS = 6  # original height and width, crop top and left, target height and width


def load(
    spec: Model, device: torch.device, dtype: torch.dtype, *, reads_text: bool = True
) -> LatentDiffusion:
    """The model a recipe names; OutsideError tells what is wrong with its folder."""
    pipeline = load_pipeline(spec, dtype, reads_text=reads_text)
    check_diffusion_unet(spec, pipeline.unet)
    check_xl(spec, pipeline)
    noise = DiscreteDDPM(pipeline.scheduler, device)
    return LatentDiffusion(pipeline, StableDiffusionXLText(pipeline), noise, device)


check, ask = check_unet, ask_unet


def told(unet: Config, encoders: Encoders) -> Told:
    """Sizes of text and extras."""
    tokens = next(iter(encoders.values())).config.max_position_embeddings
    ids = TIME_IDS * unet["addition_time_embed_dim"]
    return {
        "text": (tokens, unet["cross_attention_dim"]),
        "text_embeds": (unet["projection_class_embeddings_input_dim"] - ids,),
        "time_ids": (TIME_IDS,),
    }


def check_xl(spec: Model, pipeline: StableDiffusionXLPipeline) -> None:
    """OutsideError unless the parts go together, two text encoders and size conditioning among
    them.
    """
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    if None in encoders:
        raise OutsideError(
            f"model.path={spec.path} has one text encoder, where Stable Diffusion XL has two: its "
            "refiner is not supported, give the base model",
            "model.path",
            "unsupported",
        )
    check_parts(spec, pipeline, sum(encoder.config.hidden_size for encoder in encoders))
    unet, pooled = pipeline.unet.config, pipeline.text_encoder_2.config.projection_dim
    if unet["addition_embed_type"] != "text_time":
        raise OutsideError(
            f"{unet_name(spec)} takes no sizes and pooled text "
            f"(addition_embed_type={unet['addition_embed_type']!r}): it is not of Stable "
            "Diffusion XL",
            unet_key(spec),
            "unsupported",
        )
    width = pooled + TIME_IDS * unet["addition_time_embed_dim"]
    if unet["projection_class_embeddings_input_dim"] != width:
        raise OutsideError(
            f"{unet_name(spec)} and text_encoder_2 of model.path={spec.path} do not fit: "
            f"projection_class_embeddings_input_dim="
            f"{unet['projection_class_embeddings_input_dim']}, where pooled text and {TIME_IDS} "
            f"time ids make {width}",
            unet_key(spec),
            "mismatch",
        )


class StableDiffusionXLText(PooledText):
    """Token embeddings (N, T, D), pooled ones (N, P) and time ids (N, 6).

    The empty prompt is what the pipeline's own unconditional input is: zeros if its config says
    `force_zeros_for_empty_prompt`, as the base model's does.
    """

    columns = ("text", "text_embeds")

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """Without framing the time ids are left out: the stock pipeline makes its own."""
        told = super().encode(prompts, framing)
        if framing is None:
            return told
        return told.with_extras(time_ids=send(time_ids(framing), told.text.device))

    def _embed_anew(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, _, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            device=self._pipeline.device,  # not the encoder's, which may wait in host memory
            do_classifier_free_guidance=False,
        )
        if self._pipeline.config["force_zeros_for_empty_prompt"]:
            # By rows: a mask on the device would be waited for.
            for row, prompt in enumerate(prompts):
                if prompt == "":
                    text[row], pooled[row] = 0, 0
        return text, pooled


def time_ids(framing: Framing) -> Tensor:
    """(N, 6) float32: original (height, width), crop (top, left), target (height, width)."""
    target = torch.tensor(framing.target_size).expand_as(framing.original_sizes)
    return torch.cat([framing.original_sizes, framing.crops, target], dim=1).float()
