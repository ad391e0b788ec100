"""The LoRA files of kohya's trainers, which ComfyUI reads as well; AUTOMATIC1111 those of Stable
Diffusion, Forge those of FLUX, too.

Tensors are called ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, a
layer's name with underscores for dots. Of Stable Diffusion 1 and 2 layers are called as diffusers
does; of XL as in the original code, the only names that all of these programs take (AUTOMATIC1111
looks for diffusers' name of XL's first upsampler where Stable Diffusion 1 has it).

So are those of FLUX.1 and FLUX.2, in whose original code one layer makes queries, keys and values,
and in FLUX.1's blocks of one stream the feed-forward's input as well. Their adapters side by side
are one of that layer, of the sum of their ranks: ``[B_q A_q; B_k A_k; B_v A_v]`` is the
block-diagonal of the B times ``[A_q; A_k; A_v]``. Names are those of sd-scripts
(networks/convert_flux_lora.py) and, for FLUX.2, of musubi-tuner; diffusers reads them of layers in
blocks, ComfyUI of all.

So are those of Z-Image, in ComfyUI's code (comfy/utils.py, z_image_to_diffusers), where queries,
keys and values are one layer as well. musubi-tuner calls layers as diffusers does, and ComfyUI
finds no attention under such names: its convert_z_image_lora_to_comfy.py makes the one of the
other, both ways. Of Qwen-Image all three have diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora import DOWN, UP, Lora
from .tensor_files import save_tensors

SIDES = {DOWN: "lora_down.weight", UP: "lora_up.weight"}
Sides = tuple[Tensor, Tensor]
"""A and B of a layer."""
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
LAST_NORM = "norm_out.linear"
Parts = tuple[tuple[str, tuple[str, ...]], ...]
"""Of the original code's layers in a block, diffusers' that they are made of, in their order."""


@dataclass(frozen=True)
class Original:
    """What the original code of a transformer calls the layers of diffusers'. A layer that is not
    here has one name.
    """

    blocks: Mapping[str, tuple[str, Parts]]
    """By diffusers' name of a list of blocks."""
    outside: Mapping[str, str]


FLUX = Original(
    {
        "transformer_blocks": (
            "double_blocks",
            (
                ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
                ("img_attn.proj", ("attn.to_out.0",)),
                ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
                ("txt_attn.proj", ("attn.to_add_out",)),
                ("img_mlp.0", ("ff.net.0.proj",)),
                ("img_mlp.2", ("ff.net.2",)),
                ("txt_mlp.0", ("ff_context.net.0.proj",)),
                ("txt_mlp.2", ("ff_context.net.2",)),
                ("img_mod.lin", ("norm1.linear",)),
                ("txt_mod.lin", ("norm1_context.linear",)),
                # FLUX.2
                ("img_mlp.0", ("ff.linear_in",)),
                ("img_mlp.2", ("ff.linear_out",)),
                ("txt_mlp.0", ("ff_context.linear_in",)),
                ("txt_mlp.2", ("ff_context.linear_out",)),
            ),
        ),
        "single_transformer_blocks": (
            "single_blocks",
            (
                ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
                ("linear2", ("proj_out",)),
                ("modulation.lin", ("norm.linear",)),
                # FLUX.2
                ("linear1", ("attn.to_qkv_mlp_proj",)),
                ("linear2", ("attn.to_out",)),
            ),
        ),
    },
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        LAST_NORM: "final_layer.adaLN_modulation.1",
        **{
            f"{of}.{kind}_embedder.linear_{number}": f"{original}_in.{side}_layer"
            for of in ("time_text_embed", "time_guidance_embed")
            for kind, original in (("timestep", "time"), ("text", "vector"), ("guidance",) * 2)
            for number, side in ((1, "in"), (2, "out"))
        },
        **{
            f"{of}_modulation{stream}.linear": f"{of}_modulation{stream}.lin"
            for of, stream in (
                ("double_stream", "_img"),
                ("double_stream", "_txt"),
                ("single_stream", ""),
            )
        },
    },
)
Z_IMAGE_BLOCK: Parts = (
    ("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    ("attention.out", ("attention.to_out.0",)),
)
Z_IMAGE = Original(
    {blocks: (blocks, Z_IMAGE_BLOCK) for blocks in ("layers", "noise_refiner", "context_refiner")},
    {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
)
IN_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def save_for_kohya(lora: Lora, unet: Mapping[str, Any], about: dict[str, str], path: Path) -> None:
    """Write the file. ``unet`` is the denoiser's config, ``about`` what :func:`describe` says."""
    ranks = {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(float(lora.rank))}
    save_tensors(kohya_tensors(lora, unet), path, about | ranks)


def kohya_tensors(lora: Lora, unet: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the file holds of an adapter, by name."""
    original = original_of(unet)
    layers = _unet_layers(lora, unet) if original is None else _merged(lora, unet, original)
    renamed: dict[str, Tensor] = {}
    for name, (down, up) in layers:
        key = "lora_unet_" + name.replace(".", "_")
        renamed |= {f"{key}.{SIDES[DOWN]}": down, f"{key}.{SIDES[UP]}": up}
        renamed[f"{key}.alpha"] = torch.tensor(float(len(down)))
    return renamed


def _unet_layers(lora: Lora, unet: Mapping[str, Any]) -> Iterator[tuple[str, Sides]]:
    for layer in lora.layers:
        yield (original_name(layer, unet) if is_xl(unet) else layer), _sides(lora, layer)


def _sides(lora: Lora, layer: str) -> Sides:
    return lora.values[f"{layer}.{DOWN}"], lora.values[f"{layer}.{UP}"]


def _merged(
    lora: Lora, transformer: Mapping[str, Any], original: Original
) -> Iterator[tuple[str, Sides]]:
    """Layers of the original code, and their adapters."""
    for name, parts in sorted({_original_layer(layer, original) for layer in lora.layers}):
        if parts == (LAST_NORM,):
            down, up = _sides(lora, LAST_NORM)
            yield name, (down, torch.cat(up.chunk(2)[::-1]))  # the shift first, where ours scales
            continue
        given = {part: _sides(lora, part) for part in parts if f"{part}.{UP}" in lora.values}
        down, up = next(iter(given.values()))
        # Zeros for parts that are not adapted: readers divide the rank evenly among all of them.
        both = [
            given.get(part)
            or (torch.zeros_like(down), up.new_zeros(_width(part, transformer), lora.rank))
            for part in parts
        ]
        downs, ups = zip(*both, strict=True)
        yield name, (torch.cat(downs), torch.block_diag(*ups))


def _original_layer(layer: str, original: Original) -> tuple[str, tuple[str, ...]]:
    """The original code's layer that one of diffusers' is in, and all of diffusers' in that."""
    found = IN_BLOCK.fullmatch(layer)
    if found is None or found[1] not in original.blocks:
        return original.outside.get(layer, layer), (layer,)
    blocks, index, inner = found.groups()
    name, rows = original.blocks[blocks]
    own, parts = next((row for row in rows if inner in row[1]), (inner, (inner,)))
    return f"{name}.{index}.{own}", tuple(f"{blocks}.{index}.{part}" for part in parts)


def _width(part: str, transformer: Mapping[str, Any]) -> int:
    """How wide the output is of a layer that others are merged with."""
    width: int = transformer.get("dim") or (
        transformer["num_attention_heads"] * transformer["attention_head_dim"]
    )
    return width * (4 if part.endswith("proj_mlp") else 1)


def original_of(denoiser: Mapping[str, Any]) -> Original | None:
    """By a denoiser's config; None of UNets, and of Qwen-Image, whose layers have one name."""
    if "num_single_layers" in denoiser:
        return FLUX
    return Z_IMAGE if "cap_feat_dim" in denoiser else None


def is_xl(unet: Mapping[str, Any]) -> bool:
    """Whether it is of Stable Diffusion XL."""
    return unet.get("addition_embed_type") == "text_time"


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
    if is_unet := "cross_attention_dim" in unet:
        module, version, family, code = _unet_version(unet, in_v)
    else:
        module, version, family, code = _transformer_version(unet)
    height, width = resolution
    return {
        "ss_network_module": module,
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": code,
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        **({"modelspec.prediction_type": "v" if in_v else "epsilon"} if is_unet else {}),
    }


def _unet_version(unet: Mapping[str, Any], in_v: bool) -> tuple[str, str, str, str]:
    """Module and model as sd-scripts calls them, its architecture and its code."""
    code, module = "diffusers", "networks.lora"
    if is_xl(unet):
        code = "https://github.com/Stability-AI/generative-models"
        return module, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", code
    if unet["cross_attention_dim"] == 1024:
        return module, "sd_v2", f"stable-diffusion-v2-{'768-v' if in_v else '512'}", code
    return module, "sd_v1", "stable-diffusion-v1", code


def _transformer_version(transformer: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """As sd-scripts says it of FLUX.1, musubi-tuner of others."""
    original = original_of(transformer)
    if original is None:
        code = "https://github.com/QwenLM/Qwen-Image"
        return "networks.lora_qwen_image", "qwen_image", "Qwen-Image", code
    if original is Z_IMAGE:
        return "networks.lora_zimage", "z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"
    code = "https://github.com/black-forest-labs/flux"
    if "pooled_projection_dim" in transformer:
        size = "dev" if transformer["guidance_embeds"] else "schnell"
        return "networks.lora_flux", "flux1", f"flux-1-{size}", code
    sizes = {15360: "dev", 7680: "klein-4b", 12288: "klein-9b"}  # by the width of their text
    size = sizes.get(transformer["joint_attention_dim"], "dev")
    version = f"flux_2_{size.replace('-', '_')}"
    return "networks.lora_flux_2", version, f"Flux.2-{size}", f"{code}2"
