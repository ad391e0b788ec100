"""What lies in the folders of exports, each written by one rank from whole tensors on the host.

============ ================================ =====================================================
format       folder and file                  read by
============ ================================ =====================================================
`diffusers`  `lora/`
..           `pytorch_lora_weights.safetensors` `pipeline.load_lora_weights("…/lora")`
..           `kohya.safetensors`              ComfyUI, AUTOMATIC1111, sd-scripts (not of a DoRA)
..           `adapter_*`                      `PeftModel.from_pretrained(unet, "…/lora")`
..           `lora_with_lcm/`                 the same, the base's LCM-LoRA included
`kohya`      `kohya/lora.safetensors`         as `kohya.safetensors`
`merged`     `merged/`                        `from_pretrained("…/merged")`
============ ================================ =====================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..models import load_backbone
from ..models.base_files import DENOISER, copy_base
from ..recipe import Model
from .kohya_format import save_for_kohya
from .lora import Lora
from .tensor_files import disk_errors, save_tensors

FOLDERS = {"diffusers": "lora", "kohya": "kohya", "merged": "merged"}
WITH_LCM = "lora_with_lcm"
KOHYA = "kohya.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names the weights files of a network
CPU = torch.device("cpu")


def save_for_diffusers(lora: Lora, pipeline: DiffusionPipeline, folder: Path) -> None:
    """The file of diffusers, by the pipeline of the adapter's family."""
    # peft's own names, lora_A and lora_B: diffusers' older ones (`to_q.lora.down`) exist for
    # attention only, and a file that mixes both is loaded without its attention layers.
    with disk_errors(folder):
        type(pipeline).save_lora_weights(
            folder, unet_lora_layers=lora.values, unet_lora_adapter_metadata=lora.config
        )


def save_for_all(
    lora: Lora, pipeline: DiffusionPipeline, about: dict[str, str], folder: Path
) -> None:
    """All files of a ``lora/``; ``about`` is what the kohya file says of itself."""
    save_for_diffusers(lora, pipeline, folder)
    values = {f"base_model.model.{name}": value for name, value in lora.values.items()}
    save_tensors(values, folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps(lora.config, indent=2) + "\n")
    if not lora.is_dora:
        save_for_kohya(lora, unet_config(pipeline), about, folder / KOHYA)


def unet_config(pipeline: DiffusionPipeline) -> Mapping[str, Any]:
    """The config of a pipeline's denoiser."""
    config: Mapping[str, Any] = pipeline.unet.config
    return config


def save_merged(model: Model, lora: Path, folder: Path, shard_bytes: int) -> None:
    """A copy of the base, into whose denoiser the adapter in ``lora`` is merged, in float32."""
    backbone = load_backbone(model, CPU)
    backbone.load_adapter(lora)
    backbone.pipeline.fuse_lora()
    backbone.pipeline.unload_lora_weights()
    with disk_errors(folder / DENOISER):
        backbone.denoiser.save_pretrained(folder / DENOISER, max_shard_size=shard_bytes)
    copy_base(model, folder, backbone.pipeline.scheduler)
