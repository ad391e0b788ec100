"""What a report is made of. `compare` fills this in; report.py and results.py only show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .stats import PairedSummary, paired_summary


@dataclass(frozen=True)
class ScorerResult:
    """One scorer on one prompt set; build it with :meth:`from_scores`."""

    scorer: str
    """`judge` (never seen by training) or `reward` (what ranked the training pairs)."""
    model: str
    """Folder or hub id of the scorer."""
    base_scores: NDArray[np.float64]
    """(prompts, images a prompt); NaN where the scorer failed."""
    tuned_scores: NDArray[np.float64]
    summary: PairedSummary

    @classmethod
    def from_scores(
        cls,
        scorer: str,
        model: str,
        base: ArrayLike,
        tuned: ArrayLike,
        resamples: int = 10_000,
        seed: int = 0,
    ) -> ScorerResult:
        """Estimate everything from two (prompts, images) tables of the same prompts and seeds."""
        summary = paired_summary(base, tuned, resamples, seed)
        base_pn, tuned_pn = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
        return cls(scorer, model, base_pn, tuned_pn, summary)


@dataclass(frozen=True)
class PromptSample:
    """A prompt shown with its images, base and tuned in the same order of seeds."""

    prompt: str
    base: Sequence[Image.Image]
    tuned: Sequence[Image.Image]
    base_scores: Sequence[float] = ()
    """Of `ReportData.shown_scorer`; empty or as many as images."""
    tuned_scores: Sequence[float] = ()


@dataclass(frozen=True)
class PromptSet:
    """Prompts with one origin: `training` or `held-out`."""

    name: str
    prompts: Sequence[str]
    """All prompts that were scored: the rows of the scorers' tables."""
    scorers: Sequence[ScorerResult]
    """The judge first, if there is one."""
    samples: Sequence[PromptSample] = ()
    """The `compare.report_prompts` prompts whose images are shown."""


@dataclass(frozen=True)
class WorstLoss:
    """An image pair that the tuned model lost; see `stats.worst_pairs`."""

    prompt: str
    prompt_set: str
    base: Image.Image
    tuned: Image.Image
    base_score: float
    tuned_score: float


@dataclass(frozen=True)
class ReportData:
    """A whole comparison."""

    title: str
    """E.g. the name of the recipe."""
    prompt_sets: Sequence[PromptSet]
    """Training prompts first."""
    worst: Sequence[WorstLoss] = ()
    """Shown worst first."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl; none if the run folder has none."""
    num_tiers: int | None = None
    progression: Image.Image | None = None
    """Samples during training, e.g. an `image_grid` with a column a step."""
    recipe: str = ""
    """The resolved recipe, as YAML."""
    facts: Sequence[tuple[str, str]] = field(default_factory=list)
    """What a reader needs to repeat it: versions, device, seed, sampler, time."""
    base_name: str = "base"
    tuned_name: str = "tuned"
    pixelated: bool | None = None
    """Show images with hard pixels; by default if they are smaller than 128 pixels."""

    @property
    def shown_scorer(self) -> str:
        """Whose scores stand beneath the images: the judge's if there is one."""
        return self.prompt_sets[0].scorers[0].scorer if self.prompt_sets else ""
