"""The files of a base model, copied as they are: what is not trained need not be written anew.

Libraries write what they load in the layout of their own version, which older ones cannot read, and
with what was changed in memory, our scheduler among it. A copy is what its users know.
"""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from diffusers.schedulers import SchedulerMixin
from huggingface_hub import snapshot_download

from ..recipe import Model
from .pretrained import denoiser_in, reading

INDEX = "model_index.json"
# Weights as diffusers and transformers name them, the format that is preferred first.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")
# Those, and what other frameworks and tools leave in the same folders.
WEIGHTS = {*SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml", ".ckpt", ".pt"}


def copy_base(spec: Model, folder: Path, scheduler: SchedulerMixin) -> None:
    """Make ``folder`` the pipeline of a recipe, byte for byte, but for the weights of its denoiser.

    The recipe's own VAE and denoiser stand in place of the pipeline's. Weights of a variant get the
    names without one, since who loads the folder need not know. A part of which the disk has no
    weights is left out: of a hub's models, safety checkers are never fetched, and text encoders may
    not be there with stored prompts.

    Args:
        spec: the base, which has been loaded before.
        folder: may hold the denoiser's weights already.
        scheduler: how the model was sampled here. The copy keeps the base's own scheduler, unless
            this one is of a latent consistency model and the base's is not: a UNet or LoRA made a
            consistency model of a diffusion model then, which its own scheduler cannot sample.

    Raises:
        OutsideError: if the base is gone.
        OSError: if a file cannot be read or written.
    """
    index, parts, denoiser = _parts_of(spec)
    changed: dict[str, Any] = {}
    if type(scheduler).__name__ == "LCMScheduler" != index["scheduler"][1]:
        del parts["scheduler"]
        scheduler.save_pretrained(folder / "scheduler")
        changed["scheduler"] = ["diffusers", "LCMScheduler"]
    for name, source in parts.items():
        files = _plain_files(source) if name == denoiser else _files_of(source, spec.variant)
        if not files:
            changed[name] = [None, None]
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        for target, file in files.items():
            shutil.copyfile(file, folder / name / target)
    if changed.get("safety_checker") and "requires_safety_checker" in index:
        changed["requires_safety_checker"] = False
    if changed:
        text = json.dumps(index | changed, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(_root_of(spec) / INDEX, folder / INDEX)


def left_out(spec: Model) -> list[str]:
    """The parts of a base that :func:`copy_base` leaves out. OutsideError if the base is gone."""
    _, parts, denoiser = _parts_of(spec)
    others = ((name, source) for name, source in parts.items() if name != denoiser)
    return [name for name, source in others if not _files_of(source, spec.variant)]


def _root_of(spec: Model) -> Path:
    return _folder_of(spec.path, spec.revision, "model.path")


def _parts_of(spec: Model) -> tuple[dict[str, Any], dict[str, Path], str]:
    """A base's model_index.json, where its parts lie, and which of them is the denoiser."""
    root = _root_of(spec)
    index: dict[str, Any] = json.loads((root / INDEX).read_text(encoding="utf-8"))
    parts = {name: root / name for name in index if _is_part(index[name])}
    denoiser = denoiser_in(parts)
    if spec.vae is not None:
        parts["vae"] = _folder_of(spec.vae, None, "model.vae")
    if spec.unet is not None:
        own = _folder_of(spec.unet, None, "model.unet")
        parts[denoiser] = own / denoiser if (own / INDEX).exists() else own
    return index, parts, denoiser


def _folder_of(path: str, revision: str | None, key: str) -> Path:
    """Where a folder or hub id that has been loaded lies on the disk."""
    with reading(f"{key}={path}", "folder or hub id whose files are there", path) as place:
        if Path(place).is_dir():
            return Path(place)
        return Path(snapshot_download(place, revision=revision, local_files_only=True))


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and entry[0] is not None


def _plain_files(folder: Path) -> dict[str, Path]:
    """All files of a part, by name, but for its weights and their indices."""
    return {
        path.name: path
        for path in sorted(folder.glob("*"))
        if path.is_file() and path.suffix not in WEIGHTS and ".index." not in path.name
    }


def _files_of(folder: Path, variant: str | None) -> dict[str, Path]:
    """All files of a part; none of a network without weights."""
    files = _plain_files(folder)
    if "config.json" not in files:
        return files
    weights = weights_files(folder, variant)
    return files | weights if weights else {}


def weights_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """The files that hold a part's weights, by the names under which they are found without a
    variant; empty if there are none.
    """
    marks = [f".{variant}", ""] if variant else [""]
    for suffix, mark, stem in product(SUFFIXES, marks, STEMS):
        whole, index = folder / f"{stem}{mark}{suffix}", folder / f"{stem}{suffix}.index{mark}.json"
        if whole.exists():
            return {f"{stem}{suffix}": whole}
        if index.exists():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            found = {shard: folder / shard for shard in sorted(shards)}
            if all(path.exists() for path in found.values()):
                return {f"{stem}{suffix}.index.json": index, **found}
    return {}
