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
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ..basics.files import sync_path
from ..models import Backbone, family_of
from ..models.base_files import copy_base
from ..models.lcm import lcm_lora_layers
from ..models.pretrained import denoiser_in
from ..recipe import Model, Recipe
from .kohya_format import describe, save_for_kohya
from .lora import Lora, both
from .tensor_files import disk_errors, save_tensors

FOLDERS = {"diffusers": "lora", "kohya": "kohya", "merged": "merged"}
WITH_LCM = "lora_with_lcm"
KOHYA = "kohya.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
WEIGHTS = "diffusion_pytorch_model"  # as diffusers names the weights files of a network
CPU = torch.device("cpu")


def folders_of(recipe: Recipe) -> list[str]:
    """The folders that a recipe's exports have, by name."""
    formats = tuple(dict.fromkeys(recipe.export.formats))
    names = [FOLDERS[form] for form in formats]
    if _joins_lcm(recipe):
        names.insert(names.index(FOLDERS["diffusers"]) + 1, WITH_LCM)
    return names


def _joins_lcm(recipe: Recipe) -> bool:
    # DoRA changes what the other adapter has changed: the two are no sum.
    is_sum = recipe.adapter.type == "lora" and not recipe.adapter.dora
    return is_sum and recipe.model.lcm_lora is not None and "diffusers" in recipe.export.formats


def joined_lcm_lora(recipe: Recipe, pipeline: DiffusionPipeline) -> Lora | None:
    """The LCM-LoRA that goes into ``lora_with_lcm/``; None where there is no such folder."""
    return Lora(*lcm_lora_layers(recipe.model, pipeline)) if _joins_lcm(recipe) else None


def about_adapter(recipe: Recipe, backbone: Backbone) -> dict[str, str]:
    """What the kohya file of a recipe's adapter says of itself; nothing of a family that has no
    names there, whose layers ComfyUI reads in diffusers' file.
    """
    if not recipe.model.family.kohya:
        return {}
    return describe(
        denoiser_config(backbone.pipeline),
        backbone.noise.prediction_type,
        recipe.model.resolution,
        title=Path(recipe.run_dir).resolve().name,
    )


def save_adapter(
    lora: Lora,
    folder: Path,
    formats: Sequence[str],
    pipeline: DiffusionPipeline,
    about: dict[str, str],
    lcm_lora: Lora | None = None,
) -> None:
    """All folders of an adapter; diffusers' is there for merging even where nobody asks."""
    own = folder / FOLDERS["diffusers"]
    if "diffusers" in formats:
        save_for_all(lora, pipeline, about, own)
    else:
        save_for_diffusers(lora, pipeline, own)
    if "kohya" in formats:
        save_kohya_folder(lora, pipeline, about, folder)
    if lcm_lora is not None:
        save_for_all(both(lcm_lora, lora), pipeline, about, folder / WITH_LCM)


def save_kohya_folder(
    lora: Lora, pipeline: DiffusionPipeline, about: dict[str, str], folder: Path
) -> None:
    """The ``kohya/`` in a folder of exports."""
    path = folder / FOLDERS["kohya"] / "lora.safetensors"
    save_for_kohya(lora, denoiser_config(pipeline), about, path)


def save_for_diffusers(lora: Lora, pipeline: DiffusionPipeline, folder: Path) -> None:
    """The file of diffusers, by the pipeline of the adapter's family."""
    denoiser = denoiser_in(pipeline.components)
    # peft's own names, lora_A and lora_B: diffusers' older ones (`to_q.lora.down`) exist for
    # attention only, and a file that mixes both is loaded without its attention layers.
    with disk_errors(folder):
        type(pipeline).save_lora_weights(
            folder,
            **{
                f"{denoiser}_lora_layers": lora.values,
                f"{denoiser}_lora_adapter_metadata": lora.config,
            },
        )


def save_for_all(
    lora: Lora, pipeline: DiffusionPipeline, about: dict[str, str], folder: Path
) -> None:
    """All files of a ``lora/``; ``about`` is what the kohya file says of itself, empty where there
    is none.
    """
    save_for_diffusers(lora, pipeline, folder)
    values = {PEFT_PREFIX + name: value for name, value in lora.values.items()}
    save_tensors(values, folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps(lora.config, indent=2) + "\n")
    if about and not lora.is_dora:
        save_for_kohya(lora, denoiser_config(pipeline), about, folder / KOHYA)


def read_adapter(folder: Path) -> Lora:
    """The adapter in a ``lora/`` of ours. OSError if its files cannot be read."""
    with disk_errors(folder):
        found = load_file(folder / PEFT_WEIGHTS)
    values = {name.removeprefix(PEFT_PREFIX): value for name, value in found.items()}
    return Lora(values, json.loads((folder / PEFT_CONFIG).read_bytes())["r"])


def denoiser_config(pipeline: DiffusionPipeline) -> Mapping[str, Any]:
    """The config of a pipeline's denoiser."""
    config: Mapping[str, Any] = getattr(pipeline, denoiser_in(pipeline.components)).config
    return config


def save_merged(model: Model, lora: Path, folder: Path, shard_bytes: int) -> None:
    """A copy of the base, into whose denoiser the adapter in ``lora`` is merged, in float32: the
    weights are those of its files, whatever the adapter was trained on.

    Text encoders are copied without being read.
    """
    backbone = family_of(model).load(model.whole, CPU, torch.float32, reads_text=False)
    backbone.load_adapter(lora)
    backbone.pipeline.fuse_lora()
    backbone.pipeline.unload_lora_weights()
    inner = folder / backbone.denoiser_name
    with disk_errors(inner):
        backbone.denoiser.save_pretrained(inner, max_shard_size=shard_bytes)
    copy_base(model, folder, backbone.pipeline.scheduler)


def put_in_place(made: Path, folders: Sequence[Path]) -> None:
    """Move exports, which are whole in ``made``, to where they are looked for: beside it."""
    for target in folders:
        source = made / target.relative_to(made.parent)
        for path in (source, *source.rglob("*")):
            sync_path(path)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        sync_path(target.parent)
    shutil.rmtree(made)
