"""What users get of a run: the trained weights in formats that other programs load.

========== =========================================== ===========================================
diffusers  ``lora/pytorch_lora_weights.safetensors``   ``pipeline.load_lora_weights("…/lora")``
kohya      ``kohya/lora.safetensors``                  ComfyUI, AUTOMATIC1111, ``load_lora_weights``
merged     ``merged/``, a whole pipeline, float32      ``from_pretrained("…/merged")``
========== =========================================== ===========================================

All of it again under ``ema/`` where the recipe keeps a moving average. Adapters are a few megabytes
and lie in every checkpoint, too; a merged pipeline is written at the end of the run, gathered a
file at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import deepspeed
import torch
from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from peft import get_peft_model_state_dict
from torch import Tensor

from ..basics.failpoints import failpoint
from ..basics.files import replacing, sync_path
from ..models import Backbone
from ..ranks import Ranks
from ..recipe import Recipe
from .checkpoint.files import MANIFEST
from .deepspeed_engine import TrainedWeights
from .export_formats import (
    FOLDERS,
    WEIGHTS,
    save_all_but_the_denoiser,
    save_for_diffusers,
    save_for_kohya,
    save_merged,
    save_tensors,
)

AVERAGES = "ema"
STAMP = "exported.json"


class Exports:
    """The exports of one run, written by all ranks together."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        engine: deepspeed.DeepSpeedEngine,
        policy: ModelMixin,
        ranks: Ranks,
    ) -> None:
        self.recipe = recipe
        self.backbone = backbone
        self.policy = policy
        self.weights = TrainedWeights(engine, policy)
        self.ranks = ranks
        self.run_dir = Path(recipe.run_dir)
        self.formats = tuple(dict.fromkeys(recipe.export.formats))
        self._shard_bytes = int(recipe.export.shard_gib * 2**30)
        # Folder of each kind of weights inside the run folder or a checkpoint.
        self.kinds = {"": False} | ({AVERAGES: True} if recipe.adapter.ema else {})

    @property
    def folders(self) -> list[Path]:
        """Where the exports of the run lie when it is finished."""
        return [self.run_dir / kind / FOLDERS[form] for kind in self.kinds for form in self.formats]

    def write_adapters(self, folder: Path) -> None:
        """Put the adapters of this moment into a checkpoint: diffusers' always, kohya's if asked.

        Raises OSError on rank 0, when all ranks have met for the last time.
        """
        states = self._adapter_states()
        if self.ranks.is_first:
            self._save_adapters(states, folder)

    def publish(self, checkpoint: Path) -> None:
        """Write all formats of the last checkpoint, whose state this is, into the run folder.

        They appear there when they are whole. Raises OSError on every rank if rank 0 cannot write.
        """
        made = self.run_dir / "exported.tmp"
        self.ranks.on_first(lambda: shutil.rmtree(made, ignore_errors=True))
        states = self._adapter_states()
        self.ranks.on_first(lambda: self._save_adapters(states, made))
        if "merged" in self.formats:
            for kind, averaged in self.kinds.items():
                self._save_merged(made / kind, averaged)
        self.ranks.on_first(lambda: self._put_in_place(made))
        failpoint("export.published")
        self.ranks.on_first(lambda: self._put_stamp(checkpoint))

    def _adapter_states(self) -> dict[str, dict[str, Tensor]]:
        """For each kind, whole values under peft's names; on rank 0, elsewhere no values."""
        return {
            kind: self._adapter_state(averaged)
            for kind, averaged in self.kinds.items()
            if self.recipe.adapter.type != "full"
        }

    def _adapter_state(self, averaged: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        with self.weights.averaged(averaged):
            for name in self.weights.shapes:
                value = self.weights.gather(name)
                if self.ranks.is_first:
                    state[name] = value.cpu()
        return get_peft_model_state_dict(self.policy, state_dict=state) if state else {}

    def _save_adapters(self, states: dict[str, dict[str, Tensor]], folder: Path) -> None:
        for kind, state in states.items():
            save_for_diffusers(state, self.policy, self.backbone.pipeline, folder / kind)
            if "kohya" in self.formats:
                save_for_kohya(state, self.recipe.adapter, folder / kind)

    def _save_merged(self, folder: Path, averaged: bool) -> None:
        model, merged = self.recipe.model, folder / FOLDERS["merged"]
        if self.recipe.adapter.type == "full":
            denoiser = self.ranks.on_first(lambda: save_all_but_the_denoiser(model, merged))
            with self.weights.averaged(averaged):
                self._save_gathered(merged / denoiser)
        else:
            lora = folder / FOLDERS["diffusers"]
            self.ranks.on_first(lambda: save_merged(model, lora, merged, self._shard_bytes))

    def _save_gathered(self, folder: Path) -> None:
        """Write the trained denoiser as diffusers would, with no more than one file in memory."""
        plan = split_torch_state_dict_into_shards(
            {
                name: torch.empty(shape, dtype=torch.float32, device="meta")
                for name, shape in self.weights.shapes.items()
            },
            filename_pattern=WEIGHTS + "{suffix}.safetensors",
            max_shard_size=self._shard_bytes,
        )
        for filename, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                value = self.weights.gather(name)
                if self.ranks.is_first:
                    shard[name] = value.cpu()
                del value
            self.ranks.on_first(partial(save_tensors, shard, folder / filename))
            del shard
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            path = folder / f"{WEIGHTS}.safetensors.index.json"
            self.ranks.on_first(lambda: path.write_text(json.dumps(index, indent=2)))

    def _put_in_place(self, made: Path) -> None:
        for target in self.folders:
            source = made / target.relative_to(self.run_dir)
            for path in (source, *source.rglob("*")):
                sync_path(path)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
            sync_path(target.parent)
        shutil.rmtree(made)

    def _put_stamp(self, checkpoint: Path) -> None:
        stamp = json.dumps(self._stamp(checkpoint)).encode()
        with replacing(self.run_dir / STAMP, error=None) as file:
            file.write(stamp)

    def is_published(self, checkpoint: Path) -> bool:
        """Whether the run folder holds the exports of this checkpoint in all the formats."""

        def look() -> bool:
            path = self.run_dir / STAMP
            known = json.loads(path.read_text()) if path.exists() else None
            return known == self._stamp(checkpoint) and all(f.is_dir() for f in self.folders)

        return bool(self.ranks.on_first(look))

    def _stamp(self, checkpoint: Path) -> dict[str, object]:
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        return {"checkpoint": manifest, "formats": sorted(self.formats)}
