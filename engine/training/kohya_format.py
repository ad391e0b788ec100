"""The LoRA files of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 read as well.

Tensors are called ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, a
layer's name with underscores for dots. Of Stable Diffusion 1 and 2 layers are called as diffusers
does; of XL as in the original code, the only names that all of these programs take (AUTOMATIC1111
looks for diffusers' name of XL's first upsampler where Stable Diffusion 1 has it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora import DOWN, UP, Lora
from .tensor_files import save_tensors

SIDES = {DOWN: "lora_down.weight", UP: "lora_up.weight"}
IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def save_for_kohya(lora: Lora, unet: Mapping[str, Any], about: dict[str, str], path: Path) -> None:
    """Write the file. ``unet`` is the denoiser's config, ``about`` what :func:`describe` says."""
    ranks = {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(float(lora.rank))}
    save_tensors(kohya_tensors(lora, unet), path, about | ranks)


def kohya_tensors(lora: Lora, unet: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the file holds of an adapter, by name."""
    renamed = {}
    for layer in lora.layers:
        name = original_name(layer, unet) if is_xl(unet) else layer
        key = "lora_unet_" + name.replace(".", "_")
        for part, side in SIDES.items():
            renamed[f"{key}.{side}"] = lora.values[f"{layer}.{part}"]
        renamed[f"{key}.alpha"] = torch.tensor(float(lora.rank))
    return renamed


def is_xl(unet: Mapping[str, Any]) -> bool:
    """Whether it is of Stable Diffusion XL."""
    return unet["addition_embed_type"] == "text_time"


def original_name(layer: str, unet: Mapping[str, Any]) -> str:
    """What the original code calls a layer of diffusers' UNet; its own name if it has none there.

    It numbers the steps of the way down, and of the way up: a resnet each, with its transformer,
    and the change of size after them, a step of its own on the way down and part of the last on the
    way up.
    """
    steps = unet["layers_per_block"] + 1
    if found := MIDDLE.fullmatch(layer):
        kind, index, inner = found.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_inner_name(kind, inner)}"
    found = BLOCK.fullmatch(layer)
    if found is None:
        return OUTSIDE_BLOCKS.get(layer, layer)
    way, block, kind, index, inner = found.groups()
    first = int(block) * steps
    if kind == "downsamplers":
        return f"input_blocks.{first + steps}.0.op"
    if kind == "upsamplers":
        attends = "Attn" in unet["up_block_types"][int(block)]
        return f"output_blocks.{first + steps - 1}.{1 + attends}.{inner}"
    step = first + int(index) + (way == "down")  # the first step down is conv_in
    blocks = "input_blocks" if way == "down" else "output_blocks"
    return f"{blocks}.{step}.{int(kind == 'attentions')}.{_inner_name(kind, inner)}"


def _inner_name(kind: str, inner: str) -> str:
    return IN_RESNETS[inner] if kind == "resnets" else inner


def describe(
    unet: Mapping[str, Any], prediction_type: str, resolution: tuple[int, int], title: str
) -> dict[str, str]:
    """What the file says of itself: kohya's keys, by which AUTOMATIC1111 tells what it fits, and
    those of Stability's ModelSpec 1.0.1.
    """
    in_v = prediction_type == "v_prediction"
    code = "diffusers"
    if is_xl(unet):
        version, family = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
        code = "https://github.com/Stability-AI/generative-models"
    elif unet["cross_attention_dim"] == 1024:
        version, family = "sd_v2", f"stable-diffusion-v2-{'768-v' if in_v else '512'}"
    else:
        version, family = "sd_v1", "stable-diffusion-v1"
    height, width = resolution
    return {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": code,
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if in_v else "epsilon",
    }
