"""The GroupNorm and GEGLU layers of real UNets: which shapes run in one forward, and how often.

A UNet is built from its published configuration on the meta device, fused as the engine fuses it,
and run once; nothing is computed and no weights are needed.
"""

from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from cdpo.kernels import fuse
from cdpo.kernels.fused_modules import FusedGEGLU, FusedGroupNorm, FusedGroupNormSiLU
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TEXT_TOKENS = 77

# What differs from diffusers' defaults, which are Stable Diffusion 1's but for these.
SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}


class Network(NamedTuple):
    """A denoiser at one resolution."""

    latents: tuple[int, int, int]  # (C, h, w) of one image
    unet: dict[str, Any]  # configuration; diffusers' default where it says nothing


class GroupNormCall(NamedTuple):
    """One GroupNorm of one image; `silu` if the kernel applies the activation that follows."""

    channels: int
    height: int
    width: int
    num_groups: int
    eps: float
    silu: bool


class GegluCall(NamedTuple):
    """One GEGLU of one image: `tokens` rows of a projection twice as wide as `width`."""

    tokens: int
    width: int


NETWORKS = {
    "SD1.5@512": Network((4, 64, 64), SD15),
    "LCM@768": Network((4, 96, 96), SD15 | {"time_cond_proj_dim": 256}),
    "SDXL@1024": Network((4, 128, 128), SDXL),
    "tiny@64": Network((4, 8, 8), TINY),
}


@cache
def layer_calls(model: str) -> Counter[GroupNormCall | GegluCall]:
    """How often each shape of each layer runs when the UNet denoises one image."""
    (channels, height, width), config = NETWORKS[model]
    calls: Counter[GroupNormCall | GegluCall] = Counter()
    with torch.device("meta"), torch.no_grad():
        unet = fuse(UNet2DConditionModel.from_config({**config, "sample_size": height}))
        for module in unet.modules():
            if isinstance(module, FusedGroupNorm | FusedGroupNormSiLU | FusedGEGLU):
                module.register_forward_hook(lambda *call: calls.update([_describe(*call)]))
        unet(torch.empty(1, channels, height, width), torch.empty(1), **_conditioning(unet.config))
    return calls


def _conditioning(config: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, config.cross_attention_dim)
    }
    if config.time_cond_proj_dim:
        arguments["timestep_cond"] = torch.empty(1, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        # the pooled text embedding beside the embeddings of six sizes and crop offsets
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        arguments["added_cond_kwargs"] = added
    return arguments


def _describe(
    module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> GroupNormCall | GegluCall:
    if isinstance(module, FusedGEGLU):
        return GegluCall(*output.shape[1:])
    silu = isinstance(module, FusedGroupNormSiLU)
    return GroupNormCall(*output.shape[1:], module.num_groups, module.eps, silu)
