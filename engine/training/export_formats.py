"""The file formats of exports, each written by one rank from whole tensors in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..basics.errors import told_by
from ..models import load_backbone
from ..recipe import Adapter, Model

FOLDERS = {"diffusers": "lora", "kohya": "kohya", "merged": "merged"}
FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names the weights files of a network
CPU = torch.device("cpu")
# Layers of SDXL that diffusers knows in kohya files only by the name they had in the original code.
KOHYA_NAMES = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def save_for_diffusers(
    state: dict[str, Tensor], policy: ModelMixin, pipeline: DiffusionPipeline, folder: Path
) -> None:
    """``folder/lora``, for ``load_lora_weights``; the scales and kind of adapter lie in the file.

    Args:
        state: values under the names of ``peft.get_peft_model_state_dict``.
        policy: the adapted network.
        pipeline: of the network's family.
        folder: of the run, or of a checkpoint.
    """
    # peft's own names, lora_A and lora_B: diffusers' older ones (`to_q.lora.down`) exist for
    # attention only, and a file that mixes both is loaded without its attention layers.
    with _disk_errors():
        type(pipeline).save_lora_weights(
            folder / FOLDERS["diffusers"],
            unet_lora_layers=state,
            # Dropout is of training: who loads an adapter gets its layers in training mode.
            unet_lora_adapter_metadata=policy.peft_config["default"].to_dict()
            | {"lora_dropout": 0.0},
        )


def save_for_kohya(state: dict[str, Tensor], spec: Adapter, folder: Path) -> None:
    """``folder/kohya``: ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

    Dots in a layer's name become underscores. Readers scale by alpha / rank, so the rsLoRA scale of
    alpha / sqrt(rank) is written as an alpha of alpha * sqrt(rank); diffusers' own converter writes
    the rank for any alpha. ``state`` is that of :func:`save_for_diffusers`.
    """
    alpha = spec.alpha * (math.sqrt(spec.rank) if spec.rslora else 1)
    sides = {"A.weight": "down", "B.weight": "up"}
    renamed = {}
    for name, value in state.items():
        layer, _, side = name.rpartition(".lora_")
        key = "lora_unet_" + KOHYA_NAMES.get(layer, layer).replace(".", "_")
        renamed[f"{key}.lora_{sides[side]}.weight"] = value
        renamed[f"{key}.alpha"] = torch.tensor(alpha)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": str(alpha),
    }
    save_tensors(renamed, folder / FOLDERS["kohya"] / FILES["kohya"], metadata)


def save_merged(model: Model, lora: Path, folder: Path, shard_bytes: int) -> None:
    """The pipeline of ``model``, read again in float32, with the adapter in ``lora`` merged."""
    backbone = load_backbone(model, CPU)
    backbone.load_adapter(lora)
    backbone.pipeline.fuse_lora()
    backbone.pipeline.unload_lora_weights()
    with _disk_errors():
        backbone.pipeline.save_pretrained(folder, max_shard_size=shard_bytes)


def save_all_but_the_denoiser(model: Model, folder: Path) -> str:
    """The rest of that pipeline, read again in float32; returns the folder of the denoiser."""
    backbone = load_backbone(model, CPU)
    denoiser = ""
    with _disk_errors():
        for name, part in backbone.pipeline.components.items():
            if part is backbone.denoiser:
                denoiser = name
                part.save_config(folder / name)
            elif part is not None:
                part.save_pretrained(folder / name)
        backbone.pipeline.save_config(folder)
    return denoiser


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, in a folder made for it; OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors():
        save_file(tensors, path, {"format": "pt"} | (metadata or {}))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """OSError for what safetensors makes of a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(told_by(error)) from None
