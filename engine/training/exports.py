"""What users get of a run: the trained weights in formats that other programs load.

Which folders there are, and what lies in them, stands in :mod:`~.export_formats`; all of it again
under ``ema/`` where the recipe keeps a moving average. Adapters are a few megabytes and lie in
every checkpoint, too; a merged pipeline is written at the end of the run, gathered a file at a
time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from diffusers import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from peft import get_peft_model_state_dict
from torch import Tensor

from ..basics.errors import NumericsError, told_by
from ..basics.failpoints import failpoint
from ..basics.files import naming, replacing
from ..models import Backbone
from ..models.base_files import copy_base, left_out
from ..ranks import Ranks
from ..recipe import Recipe
from .checkpoint.files import MANIFEST, read_manifest
from .deepspeed_engine import TrainedWeights
from .export_formats import (
    FOLDERS,
    WEIGHTS,
    WITH_LCM,
    about_adapter,
    folders_of,
    joined_lcm_lora,
    put_in_place,
    save_adapter,
    save_for_diffusers,
    save_kohya_folder,
    save_merged,
)
from .finite import NotFiniteError, advice, check_finite
from .lora import Lora, trained_lora
from .tensor_files import save_tensors

AVERAGES = "ema"
STAMP = "exported.json"
LAYOUT = 2  # raised when folders hold something else than before: finished runs export again


def read_stamp(run_dir: Path) -> dict[str, Any]:
    """What a run folder tells of its exports; nothing if it cannot be read."""
    try:
        told = json.loads((run_dir / STAMP).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


class Exports:
    """The exports of one run, written by all ranks together."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        engine: deepspeed.DeepSpeedEngine,
        policy: ModelMixin,
        ranks: Ranks,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        """``parts`` are the fingerprints of what the run was trained from."""
        self.recipe = recipe
        self.backbone = backbone
        self.policy = policy
        self.weights = TrainedWeights(engine, policy)
        self.ranks = ranks
        self.parts = dict(parts or {})
        self.run_dir = Path(recipe.run_dir)
        self.formats = recipe.export.formats
        self._shard_bytes = int(recipe.export.shard_gib * 2**30)
        # Folder of each kind of weights inside the run folder or a checkpoint.
        self.kinds = {"": False} | ({AVERAGES: True} if recipe.adapter.ema else {})

    @property
    def folders(self) -> list[Path]:
        """Where the exports of the run lie when it is finished."""
        return [
            self.run_dir / kind / name for kind in self.kinds for name in folders_of(self.recipe)
        ]

    @property
    def note(self) -> str | None:
        """What users of the exports must know and cannot see."""
        lcm_lora = self.recipe.model.lcm_lora
        if lcm_lora is None or {*self.formats} == {"merged"}:
            return None
        text = f"the adapter belongs on {self.recipe.model.path} together with the LCM-LoRA "
        text += f"{lcm_lora}, each at weight 1"
        if self.run_dir / WITH_LCM in self.folders:
            text += f"; or load {self.run_dir / WITH_LCM} alone, which is both in one"
        return text

    def describe(self) -> list[tuple[str, str]]:
        """What a merged pipeline will lack, for the head of the terminal."""
        model = self.recipe.model
        absent = ", ".join(left_out(model)) if "merged" in self.formats else ""
        told = (
            f"without {absent}, whose weights are not in model.path={model.path}: to be given to "
        )
        return [("merged", f"{told}from_pretrained by those who load it")] if absent else []

    def write_adapters(self, folder: Path) -> None:
        """Put the adapters of this moment into a checkpoint: diffusers' always, kohya's if asked.

        Raises OSError on rank 0, when all ranks have met for the last time.
        """
        for kind, lora in self._adapters().items():
            save_for_diffusers(lora, self.backbone.pipeline, folder / kind / FOLDERS["diffusers"])
            if "kohya" in self.formats:
                save_kohya_folder(lora, self.backbone.pipeline, self._about, folder / kind)

    def publish(self, checkpoint: Path, chosen_by: str | None = None) -> None:
        """Write all formats of a checkpoint, whose state this is, into the run folder, and who
        chose it, if it is not simply the last.

        They appear there when they are whole. Raises OSError on every rank if rank 0 cannot write,
        NumericsError if what it wrote is not finite.
        """
        made = self.run_dir / "exported.tmp"
        self.ranks.on_first(lambda: shutil.rmtree(made, ignore_errors=True))
        adapters = self._adapters()
        with naming(made):
            self.ranks.on_first(lambda: self._save_adapters(adapters, made))
            if "merged" in self.formats:
                for kind, averaged in self.kinds.items():
                    self._save_merged(made / kind, averaged)
        self.ranks.on_first(lambda: self._refuse_non_finite(made, checkpoint))
        self.ranks.on_first(lambda: put_in_place(made, self.folders))
        failpoint("export.published")
        self.ranks.on_first(lambda: self._put_stamp(checkpoint, chosen_by))

    def _adapters(self) -> dict[str, Lora]:
        """The adapter of each kind of weights, on rank 0; none elsewhere."""
        if self.recipe.adapter.type == "full":
            return {}
        found = {kind: self._adapter(averaged) for kind, averaged in self.kinds.items()}
        return {kind: lora for kind, lora in found.items() if lora is not None}

    def _adapter(self, averaged: bool) -> Lora | None:
        state: dict[str, Tensor] = {}
        with self.weights.averaged(averaged):
            for name in self.weights.shapes:
                value = self.weights.gather(name)
                if self.ranks.is_first:
                    state[name] = value.cpu()
        if not self.ranks.is_first:
            return None
        values = get_peft_model_state_dict(self.policy, state_dict=state)
        return trained_lora(values, self.recipe.adapter)

    def _save_adapters(self, adapters: dict[str, Lora], made: Path) -> None:
        """All folders of adapters."""
        pipeline = self.backbone.pipeline
        lcm_lora = joined_lcm_lora(self.recipe, pipeline) if adapters else None
        for kind, lora in adapters.items():
            save_adapter(lora, made / kind, self.formats, pipeline, self._about, lcm_lora)

    @property
    def _about(self) -> dict[str, str]:
        return about_adapter(self.recipe, self.backbone)

    def _save_merged(self, folder: Path, averaged: bool) -> None:
        model, merged = self.recipe.model, folder / FOLDERS["merged"]
        if self.recipe.adapter.type == "full":
            scheduler = self.backbone.pipeline.scheduler
            self.ranks.on_first(lambda: copy_base(model, merged, scheduler))
            with self.weights.averaged(averaged):
                self._save_gathered(merged / self.backbone.denoiser_name)
        else:
            lora = folder / FOLDERS["diffusers"]
            self.ranks.on_first(lambda: save_merged(model, lora, merged, self._shard_bytes))

    def _save_gathered(self, folder: Path) -> None:
        """Write the trained denoiser as diffusers would, with no more than one file in memory."""
        saved = self.policy.state_dict()
        constant = {name: x for name, x in self.policy.named_buffers() if name in saved}
        shapes = self.weights.shapes | {name: x.shape for name, x in constant.items()}
        plan = split_torch_state_dict_into_shards(
            {
                name: torch.empty(shape, dtype=torch.float32, device="meta")
                for name, shape in shapes.items()
            },
            filename_pattern=WEIGHTS + "{suffix}.safetensors",
            max_shard_size=self._shard_bytes,
        )
        for filename, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                found = constant.get(name)
                value = self.weights.gather(name) if found is None else found.float()
                if self.ranks.is_first:
                    shard[name] = value.cpu()
                del value
            self.ranks.on_first(partial(save_tensors, shard, folder / filename))
            del shard
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            path = folder / f"{WEIGHTS}.safetensors.index.json"
            self.ranks.on_first(lambda: path.write_text(json.dumps(index, indent=2)))

    def _refuse_non_finite(self, made: Path, checkpoint: Path) -> None:
        """Finite weights may be none in another format: scaled, or added to those of the base."""
        for path in sorted(made.rglob("*.safetensors")):
            # Copies of the base's other parts are as they are there.
            parts = path.relative_to(made).parts
            if FOLDERS["merged"] in parts[:-2] and parts[-2] != self.backbone.denoiser_name:
                continue
            try:
                check_finite(path)
            except NotFiniteError as error:
                shutil.rmtree(made, ignore_errors=True)
                raise NumericsError(
                    f"nothing is exported: {path.relative_to(made).parent}: {told_by(error)}; to "
                    f"train the end again remove {checkpoint} and {advice(self.recipe)}",
                    str(path.relative_to(made)),
                    "non-finite",
                ) from None

    def _put_stamp(self, checkpoint: Path, chosen_by: str | None) -> None:
        manifest = read_manifest(checkpoint)
        made_from = {
            "parts": self.parts,
            "precision": self.recipe.train.precision,
            "changes": manifest.get("changes", []),
            "step": manifest["step"],
            "chosen_by": chosen_by,
        }
        stamp = json.dumps(self._stamp(checkpoint) | made_from).encode()
        with replacing(self.run_dir / STAMP, error=None) as file:
            file.write(stamp)

    def is_published(self, checkpoint: Path) -> bool:
        """Whether the run folder holds the exports of this checkpoint in all the formats."""

        def look() -> bool:
            known = read_stamp(self.run_dir)  # nothing of one that is torn: exported once more
            is_same = known.items() >= self._stamp(checkpoint).items()
            return is_same and all(f.is_dir() for f in self.folders)

        return bool(self.ranks.on_first(look))

    def _stamp(self, checkpoint: Path) -> dict[str, object]:
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        return {"checkpoint": manifest, "formats": sorted({*self.formats}), "layout": LAYOUT}
