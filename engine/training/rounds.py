"""Rounds of one recipe: from what each begins, which are kept, and what the kept ones are together.

A round is a run folder of its own. It is kept if what it exports has a mean gain above zero on the
validation prompts, by the first scorer of `evaluate`; of one that is not kept nothing is used, and
the next begins where it began, with other noise. Both follow from what lies in its folder, so that
rounds which are started again come to the same.

The next round gets the denoiser that the kept ones have left in place of the model's. Each of their
adapters changes what the one before has left, so together they are one adapter of the base. With
`rounds.reference=base` it gets that denoiser for its candidates alone: it trains on the base, and
goes on with the adapter of the last that was kept, which holds all that those before have learnt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from ..basics.errors import DataError, RecipeError, told_by
from ..basics.failpoints import failpoint
from ..basics.files import naming, replacing
from ..models import Backbone, family_of
from ..models.pretrained import denoiser_in
from ..ranks import Ranks
from ..recipe import Model, Prompts, Recipe
from ..recipe.identity import save_resolved
from ..recipe.of_rounds import folder_of_round, recipe_of_round
from ..sources.prompts import read_prompts
from .evaluation import FILE as EVALUATIONS
from .export_formats import (
    CPU,
    FOLDERS,
    WITH_LCM,
    about_adapter,
    folders_of,
    joined_lcm_lora,
    put_in_place,
    read_adapter,
    save_adapter,
)
from .exports import LAYOUT, STAMP, read_stamp
from .log import MetricsFile
from .lora import Lora, both

ROUNDS = "rounds.json"  # what became of each, for people and scripts
TRAINED = ("metrics.jsonl", EVALUATIONS)  # of the last round: what a report tells of training


@dataclass(frozen=True)
class Round:
    """What became of a finished round."""

    number: int
    folder: str
    kept: bool
    step: int
    """Whose weights it has exported."""
    scorer: str
    gain: float | None
    """Of those over the model that the round began from, on the validation prompts; None if their
    images could not be drawn or scored."""
    low: float | None = None
    high: float | None = None
    """Of the 95 % interval."""


def read_round(recipe: Recipe, number: int) -> Round:
    """What became of a round that is finished. DataError if its folder does not tell."""
    folder = folder_of_round(recipe, number)
    scorer = (recipe.evaluate.scorers or (recipe.reward,))[0].label
    step = int(_exported(folder)["step"])
    rows = [row for row in MetricsFile(folder / EVALUATIONS).read() if row["step"] == step]
    gain, low, high = (rows[-1][name] if rows else None for name in ("gain", "low", "high"))
    kept = gain is not None and gain > 0
    return Round(number, str(folder), kept, step, scorer, gain, low, high)


def _exported(folder: Path) -> dict[str, Any]:
    path = folder / STAMP
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return found


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read: {told_by(error)}; remove it, and the round is exported once more",
        str(path),
        "unreadable",
    )


def refuse_other_run(recipe: Recipe) -> None:
    """RecipeError if `train` has the run folder: both would put their exports there."""
    checkpoints = Path(recipe.run_dir) / "checkpoints"
    if checkpoints.exists():
        raise RecipeError(
            f"run_dir={recipe.run_dir} holds a run of train ({checkpoints}): give rounds another",
            "run_dir",
            "in-use",
        )


def divided_prompts(recipe: Recipe) -> Prompts:
    """The recipe's prompts as they have been divided, a file a set in the run folder: what a seed
    splits off is the same in all rounds, whose seeds differ.
    """
    files = {}
    for side, prompts in read_prompts(recipe.prompts, recipe.seed)._asdict().items():
        if prompts:
            path = Path(recipe.run_dir) / "prompts" / f"{side}.json"
            with replacing(path) as file:
                file.write(json.dumps(prompts, indent=1, ensure_ascii=False).encode())
            files[side] = str(path)
    return Prompts(**files)


class Series:
    """The rounds of one recipe, as far as they are finished; the same on all ranks."""

    def __init__(self, ranks: Ranks, recipe: Recipe) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.run_dir = Path(recipe.run_dir)
        self.rounds: list[Round] = []
        self.prompts: Prompts = ranks.on_first(lambda: divided_prompts(recipe))

    @property
    def kept(self) -> list[Round]:
        """Those whose adapters are used."""
        return [each for each in self.rounds if each.kept]

    @property
    def folders(self) -> list[Path]:
        """Where the sum of the kept rounds lies."""
        return [self.run_dir / name for name in folders_of(self.recipe)]

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        scorer = (self.recipe.evaluate.scorers or (self.recipe.reward,))[0].label
        return [
            (
                "rounds",
                f"{self.recipe.rounds.count}, each from the model that those before it left"
                f"{', against the base' * (self.recipe.rounds.reference == 'base')}",
            ),
            ("kept", f"if {scorer} finds a gain on the validation prompts"),
        ]

    def told(self, judged: Round) -> str:
        """What became of a round, in a line."""
        name = f"round {judged.number}"
        if judged.gain is None:
            return f"{name} is not kept: it could not be evaluated on the validation prompts"
        gain = f"{judged.scorer} {judged.gain:+.2g}"
        if judged.low is not None:
            gain += f" [{judged.low:+.2g}, {judged.high:+.2g}]"
        verdict = "kept" if judged.kept else "not kept, and the next begins where it began"
        return f"{name} is {verdict}: {gain} on the validation prompts"

    def next_recipe(self) -> Recipe:
        """Of the round that follows."""
        return recipe_of_round(self.recipe, len(self.rounds) + 1, self.prompts, self._model())

    def training_of(self, own: Recipe) -> Recipe:
        """The recipe that a round is trained by, of the one that its candidates are drawn by."""
        if self.recipe.rounds.reference == "previous" or not self.kept:
            return own
        start = str(Path(self.kept[-1].folder) / FOLDERS["diffusers"])
        adapter = own.adapter.model_copy(update={"start": start})
        return own.model_copy(update={"model": self.recipe.model, "adapter": adapter})

    def _model(self) -> Model:
        """What the kept rounds have left."""
        model = self.recipe.model
        if not self.kept:
            return model
        latest = Path(self.kept[-1].folder)
        if model.lcm_lora is not None:
            return model.model_copy(update={"lcm_lora": str(latest / WITH_LCM)})
        merged = latest / FOLDERS["merged"]
        own = denoiser_in(path.name for path in merged.glob("*"))
        return model.model_copy(update={"unet": str(merged / own)})

    def judge(self) -> Round:
        """Whether the round that has followed is kept; written down in the run folder."""

        def read() -> Round:
            found = read_round(self.recipe, len(self.rounds) + 1)
            so_far = [asdict(each) for each in (*self.rounds, found)]
            with replacing(self.run_dir / ROUNDS) as file:
                file.write((json.dumps(so_far, indent=1) + "\n").encode())
            return found

        judged: Round = self.ranks.on_first(read)
        failpoint("rounds.judged")
        self.rounds.append(judged)
        return judged

    def export(self) -> dict[str, str]:
        """Write what the kept rounds are together into the run folder, and what they were after
        each of them below `after/`: as runs of the base, by the names that a comparison gives them.
        """
        return dict(self.ranks.on_first(Sums(self.recipe, self.kept).write))


class Sums:
    """What some rounds are together, written as exports of one run of the base."""

    def __init__(self, recipe: Recipe, kept: Sequence[Round]) -> None:
        self.recipe = recipe
        self.kept = kept
        self.run_dir = Path(recipe.run_dir)

    def write(self) -> dict[str, str]:
        """All of them; returns the folders of those after each round."""
        smallest = "merged" if self.recipe.adapter.type == "full" else "diffusers"
        of_each = self.recipe.export.model_copy(update={"formats": (smallest,)})
        found = {}
        for at, last in enumerate(self.kept, start=1):
            folder = self.run_dir / "after" / f"round-{last.number}"
            changes = {"run_dir": str(folder), "export": of_each}
            self._write(self._made_of(at), self.recipe.model_copy(update=changes))
            found[f"after round {last.number}"] = str(folder)
        if self.kept:
            self._write(self._made_of(len(self.kept)), self.recipe)
        else:
            self._withdraw()
        return found

    def _made_of(self, count: int) -> Sequence[Round]:
        """The rounds whose adapters are, together, what there is after so many that were kept."""
        return self.kept[count - 1 : count] if self._is_one else self.kept[:count]

    @property
    def _is_one(self) -> bool:
        """Whether each round goes on with the adapter of the one before."""
        return self.recipe.rounds.reference == "base"

    def _write(self, rounds: Sequence[Round], recipe: Recipe) -> None:
        """The sum of some rounds into the run folder of a recipe, unless it is there."""
        folder, stamp = Path(recipe.run_dir), self._stamp(rounds, recipe)
        targets = [folder / name for name in folders_of(recipe)]
        if read_stamp(folder) == stamp and all(target.is_dir() for target in targets):
            return
        made = folder / "exported.tmp"
        shutil.rmtree(made, ignore_errors=True)
        formats, last = recipe.export.formats, Path(rounds[-1].folder)
        with naming(made):
            if {*formats} != {"merged"}:
                pipeline, about = self._base.pipeline, about_adapter(recipe, self._base)
                lora = reduce(both, [_adapter_of(each) for each in rounds])
                save_adapter(
                    lora, made, formats, pipeline, about, joined_lcm_lora(recipe, pipeline)
                )
            if "merged" in formats:
                merged = FOLDERS["merged"]
                shutil.copytree(last / merged, made / merged, copy_function=_link)
        put_in_place(made, targets)
        for name in TRAINED:
            with replacing(folder / name) as file:
                file.write((last / name).read_bytes())
        save_resolved(recipe, folder / "recipe.yaml")
        failpoint("rounds.exported")
        with replacing(folder / STAMP) as file:
            file.write(json.dumps(stamp).encode())

    @cached_property
    def _base(self) -> Backbone:
        model = self.recipe.model.whole  # of which no prompt is asked
        backbone: Backbone = family_of(model).load(model, CPU, torch.float32, reads_text=False)
        return backbone

    def _stamp(self, rounds: Sequence[Round], recipe: Recipe) -> dict[str, Any]:
        """What `compare` asks of a run, and what made this one."""
        stamps = [_exported(Path(each.folder)) for each in rounds]
        made_of = json.dumps(stamps, sort_keys=True).encode()
        return {
            "rounds": [each.number for each in rounds],
            "made_of": hashlib.sha256(made_of).hexdigest(),
            "formats": sorted({*recipe.export.formats}),
            "layout": LAYOUT,
            "parts": stamps[0]["parts"],  # the first began from the base
            "precision": stamps[0]["precision"],
            "changes": [change for stamp in stamps for change in stamp["changes"]],
            "step": rounds[-1].step,
            "chosen_by": rounds[-1].scorer,
        }

    def _withdraw(self) -> None:
        """What was exported of rounds that are kept no more."""
        if "rounds" in read_stamp(self.run_dir):
            (self.run_dir / STAMP).unlink()
            for name in folders_of(self.recipe):
                shutil.rmtree(self.run_dir / name, ignore_errors=True)


def _adapter_of(each: Round) -> Lora:
    folder = Path(each.folder) / FOLDERS["diffusers"]
    try:
        return read_adapter(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from None


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
