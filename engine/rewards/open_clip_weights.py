"""Weights in open_clip's names as transformers' `CLIPModel`.

open_clip is not imported: it needs torchvision. Its ViT has the same layers under other names, with
queries, keys and values in one matrix and both projections transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from .tensor_files import count_blocks, filled, take

Tensors = Mapping[str, torch.Tensor]

PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
TOWERS = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_of_open_clip(tensors: Tensors, heads: int, eos_token_id: int) -> CLIPModel:
    """A `CLIPModel` in float32; its sizes are those of the tensors, ``heads`` those of attention in
    both towers. ValueError for tensors that are missing, left over or of another shape.
    """
    config = _config(tensors, heads, eos_token_id)
    model: CLIPModel = filled(CLIPModel, config, dict(_renamed(tensors)))
    return model


def _config(tensors: Tensors, heads: int, eos_token_id: int) -> CLIPConfig:
    text_tower, vision_tower = TOWERS
    vocabulary, text_width = take(tensors, "token_embedding.weight").shape
    vision_width, _, patch, _ = take(tensors, "visual.conv1.weight").shape
    patches = take(tensors, "visual.positional_embedding").shape[0] - 1
    projection = take(tensors, "text_projection").shape[1]
    common: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "projection_dim": projection,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": take(tensors, f"{text_tower}0.mlp.c_fc.weight").shape[0],
        "num_hidden_layers": count_blocks(tensors, text_tower),
        "vocab_size": vocabulary,
        "max_position_embeddings": take(tensors, "positional_embedding").shape[0],
        "eos_token_id": eos_token_id,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": take(tensors, f"{vision_tower}0.mlp.c_fc.weight").shape[0],
        "num_hidden_layers": count_blocks(tensors, vision_tower),
        "patch_size": patch,
        "image_size": patch * math.isqrt(patches),
    }
    return CLIPConfig(
        text_config=common | text, vision_config=common | vision, projection_dim=projection
    )


def _renamed(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        tower = next((tower for tower in TOWERS if name.startswith(tower)), None)
        if tower is not None:
            number, _, inner = name.removeprefix(tower).partition(".")
            yield from _of_block(f"{TOWERS[tower]}{number}.", inner, value)
        elif name in TRANSPOSED:
            yield TRANSPOSED[name], value.T.contiguous()
        else:
            yield PLAIN.get(name, name), value


def _of_block(block: str, inner: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    layer, _, kind = inner.rpartition(".")
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        for projection, part in zip("qkv", value.chunk(3), strict=True):
            yield f"{block}self_attn.{projection}_proj.{inner.rpartition('_')[2]}", part.clone()
    else:
        yield f"{block}{IN_BLOCK.get(layer, layer)}.{kind}", value
