"""Validation while training: which step is best on prompts that nobody trains on.

Every N steps the policy draws the validation prompts from fixed noise, and the scorers hold its
images against the base's from the same noise: a gain for each image, as in a comparison, with a
95 % interval over prompts and the KL proxy (:mod:`..models.divergence`). Each evaluation is a row
of ``evaluations.jsonl``. What is best, and whether the run has to end, is a function of those rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ..basics import keyed
from ..basics.errors import NumericsError
from ..basics.estimates import Estimate, mean_estimate, or_null, paired_difference
from ..basics.failpoints import failpoint
from ..basics.keyed import Stream, content_id
from ..display.terminal import Terminal
from ..models import Backbone
from ..models.divergence import Divergence
from ..ranks import Ranks
from ..recipe import Recipe
from ..rewards import RewardModel, known_identity, load_reward, score_together
from ..sources.prompts import evaluation_prompts
from .log import MetricsFile

FILE = "evaluations.jsonl"
DRAWS = 4  # of timestep and noise an image, as compare's default
Row = dict[str, Any]
Images = dict[str, list[Image.Image]]
"""Of each prompt of a rank."""


class Evaluation:
    """The evaluations of one run, made by all ranks together."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        reference: nn.Module,
        ranks: Ranks,
        terminal: Terminal,
    ) -> None:
        self.spec = recipe.evaluate
        self.recipe = recipe
        self.backbone = backbone
        self.reference = reference
        self.ranks = ranks
        self.terminal = terminal
        self.sampler = self.spec.sampler or recipe.compare.sampler
        self.scorers = {spec.label: spec for spec in self.spec.scorers or (recipe.reward,)}
        self.chooses = next(iter(self.scorers))
        self.rows: list[Row] = []
        """Those made so far, by step; the same on every rank."""
        self.is_over = False
        """Whether the score has been clearly below the best for `evaluate.stop` evaluations."""
        self.prompts = evaluation_prompts(recipe)
        self._file = MetricsFile(Path(recipe.run_dir) / FILE)

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        spec = self.spec
        if not spec.every:
            return []
        text = f"every {spec.every} steps: {len(self.prompts)} prompts x {spec.images} images, "
        return [("evaluate", f"{text}{self.sampler.steps} steps, by {', '.join(self.scorers)}")]

    @property
    def chooses_weights(self) -> bool:
        """Whether the best step is exported, or may be."""
        return bool(self.spec.stop) or self.recipe.export.of == "best"

    def start_after(self, step: int) -> None:
        """Go on after ``step``: what was evaluated beyond it, or in another way, counts no more."""
        if not self.spec.every:
            return
        found = [row for row in self.ranks.on_first(self._file.read) if row["step"] <= step]
        self.rows = [row for row in found if row["made_of"] == self._made_of]
        if others := len(found) - len(self.rows):
            self.terminal.warn(
                f"{others} evaluations were made of other prompts, scorers or settings: they count "
                "no more"
            )
        self.ranks.on_first(lambda: self._file.rewind(step, lambda row: row in self.rows))
        self._judge()

    def is_due(self, step: int) -> bool:
        """At the start, every N steps and at the end, once."""
        every = self.spec.every
        if not every or (step % every and step != self.recipe.train.steps):
            return False
        return all(row["step"] != step for row in self.rows)

    @property
    def best(self) -> int:
        """The step with the highest score; the first of several."""
        return int(self._best_of(self.rows)["step"])

    def _judge(self) -> None:
        stop = self.spec.stop
        if stop and self.rows:
            last = [row for row in self.rows if row["step"] > self.best][-stop:]
            best = self._best_of(self.rows)
            self.is_over = len(last) == stop and all(self._is_below(row, best) for row in last)

    @property
    def shown(self) -> dict[str, float]:
        """What the progress line shows of the last one."""
        return {"val": self.rows[-1]["gain"]} if self.rows else {}

    def run(self, policy: nn.Module, step: int) -> Row | None:
        """Evaluate the policy as it is after ``step``; None if asked to stop meanwhile.

        All ranks call together. Raises NumericsError for images that are not finite, and what
        scorers raise.
        """
        started = time.monotonic()
        nothing = np.zeros((len(self.prompts), self.spec.images))
        measured: dict[str, NDArray[np.float64]] | None
        if step == 0:  # the policy is the base
            measured = dict.fromkeys([*self.scorers, "divergence"], nothing)
        else:
            measured = self._measure(policy)
        if measured is None:
            return None
        row: Row = self.ranks.from_first(self._row(step, measured, time.monotonic() - started))
        failpoint("evaluate.measured")
        self.ranks.on_first(lambda: self._file.append([row]))
        self.rows.append(row)
        self._judge()
        return row

    def _row(self, step: int, measured: dict[str, NDArray[np.float64]], seconds: float) -> Row:
        gains = measured[self.chooses]
        options = {"resamples": self.recipe.compare.bootstrap, "seed": self.recipe.seed}
        estimates = {
            label: _finite(mean_estimate(measured[label], **options)) for label in self.scorers
        }
        gain, low, high = estimates.pop(self.chooses)
        return {
            "step": step,
            "made_of": self._made_of,
            "scorer": self.chooses,
            "gain": gain,
            "low": low,
            "high": high,
            "divergence": float(measured["divergence"].mean()),
            "others": estimates,
            "seconds": round(seconds, 3),
            "gains": [[or_null(value) for value in own] for own in gains.tolist()],
        }

    def _measure(self, policy: nn.Module) -> dict[str, NDArray[np.float64]] | None:
        """(prompts, images) of each scorer's gain, and of the KL proxy."""
        base, drawn = self._base_images(), self._draw(policy)
        if base is None or drawn is None:
            return None
        own = self.ranks.together(lambda: self._gains(base, drawn))
        own["divergence"] = self._divergence(policy, base)
        parts = self.ranks.gather(own)
        order = [(at % len(parts), at // len(parts)) for at in range(len(self.prompts))]
        return {name: np.stack([parts[rank][name][at] for rank, at in order]) for name in own}

    def _gains(self, base: Images, drawn: Images) -> dict[str, NDArray[np.float64]]:
        """(prompts of this rank, images) by each scorer."""
        found = {}
        for label, scorer in self._loaded.items():
            scores = [
                score_together(scorer, [base[prompt], drawn[prompt]], prompt)
                for prompt in self._share
            ]
            found[label] = np.array([after - before for before, after in scores], np.float64)
        return found

    def _divergence(self, policy: nn.Module, base: Images) -> NDArray[np.float64]:
        model = self.recipe.model
        divergence = Divergence(
            self.backbone,
            self.reference,
            seed=self.recipe.seed,
            draws=DRAWS,
            resolution=model.resolution,
            batch_size=self.recipe.compare.batch_size,
        )
        return np.stack(
            [
                divergence.of(policy, prompt, self.backbone.encode_images(base[prompt]))
                for prompt in self._share
            ]
        )

    def _base_images(self) -> Images | None:
        """The base's, drawn once a process."""
        if "base" not in vars(self):
            drawn = self._draw(self.reference)
            if drawn is None:
                return None
            self.base = drawn
        return self.base

    def _draw(self, net: nn.Module) -> Images | None:
        """Of each prompt of this rank; None if asked to stop before the end."""
        count, batch = self.spec.images, self.recipe.compare.batch_size
        prompts = [prompt for prompt in self._share for _ in range(count)]
        items = [
            content_id("validation", prompt, str(image))
            for prompt in self._share
            for image in range(count)
        ]
        keys = keyed.make_keys(self.recipe.seed, Stream.VALIDATION_NOISE, items)
        shape = self.backbone.latent_shape(self.recipe.model.resolution)
        noise = keyed.normal(keys.to(self.ranks.device), shape)
        images: list[Image.Image] = []
        failure: NumericsError | None = None
        for start in range(0, len(prompts), batch):
            failpoint("evaluate.draw")
            if self.ranks.asked_to_stop():
                return None
            try:
                images += self.backbone.sample(
                    net,
                    prompts[start : start + batch],
                    noise[start : start + batch],
                    steps=self.sampler.steps,
                    guidance=self.sampler.guidance,
                )
            except NumericsError as error:  # told when no rank calls the network any more
                failure = error
        self.ranks.agree(failure)
        return {
            prompt: images[at * count : (at + 1) * count] for at, prompt in enumerate(self._share)
        }

    @cached_property
    def _share(self) -> list[str]:
        """The prompts of this rank: as many on each, for under ZeRO-3 all call networks alike.
        What comes up twice for that is left out by who reads the parts.
        """
        prompts, world = self.prompts, self.ranks.world_size
        padded = [*prompts, *prompts[:1] * (-len(prompts) % world)]
        return list(self.ranks.share(padded))

    @cached_property
    def _loaded(self) -> dict[str, RewardModel]:
        """The scorers, which stay where they are until the run ends. What an image was given counts
        after a restart, too: which others it is scored with enters the rounding.
        """
        device, kept = self.ranks.device, self._file.path.with_suffix("")
        return {label: load_reward(spec, device, kept) for label, spec in self.scorers.items()}

    @cached_property
    def _made_of(self) -> str:
        """A hash of all that a row is a function of, beside the policy."""
        scorers = [
            [spec.knobs(), (known_identity(spec) or self._loaded[label].identity)["whole"]]
            for label, spec in self.scorers.items()
        ]
        sampler, resolution = self.sampler.model_dump(), self.recipe.model.resolution
        made_of = [self.prompts, self.spec.images, sampler, resolution, scorers]
        text = json.dumps(self.ranks.from_first(made_of), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @staticmethod
    def _best_of(rows: list[Row]) -> Row:
        return max(rows, key=lambda row: -np.inf if row["gain"] is None else row["gain"])

    def _is_below(self, row: Row, best: Row) -> bool:
        then, now = (np.array(side["gains"], np.float64) for side in (best, row))
        resamples, seed = self.recipe.compare.bootstrap, self.recipe.seed
        return paired_difference(then, now, resamples, seed).high < 0


def _finite(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    return or_null(estimate.mean), or_null(estimate.low), or_null(estimate.high)
