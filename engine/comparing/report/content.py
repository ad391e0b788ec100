"""What a report is made of. `build.py` fills this in; the other files here only show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ...basics.estimates import (
    Estimate,
    PairedSummary,
    mean_estimate,
    paired_difference,
    paired_summary,
    win_matrix,
)

TUNED = "tuned"  # the name of a run that is compared alone


@dataclass(frozen=True)
class ScorerResult:
    """One scorer on one prompt set; build it with :meth:`from_scores`."""

    scorer: str
    """`judge` (never seen by training), `reward` (what ranked the training pairs), or another."""
    model: str
    """Folder or hub id of the scorer."""
    base_scores: NDArray[np.float64]
    """(prompts, images a prompt); NaN where the scorer failed."""
    base: Estimate
    """Mean of base; beside one run alone, of the image pairs that both have a score for."""
    scores: Mapping[str, NDArray[np.float64]]
    """Tables like base's of each run, by its name."""
    summaries: Mapping[str, PairedSummary]
    """Of each run against base."""
    win_rates: Sequence[Sequence[Estimate]]
    """Share of image pairs in which the row's model scores higher than the column's: base first,
    then the runs in their order."""

    @classmethod
    def from_scores(
        cls,
        scorer: str,
        model: str,
        base: ArrayLike,
        tuned: Mapping[str, ArrayLike],
        resamples: int = 10_000,
        seed: int = 0,
    ) -> ScorerResult:
        """Estimate everything from (prompts, images) tables of the same prompts and seeds, those of
        the runs by their names.
        """
        base_pn = np.asarray(base, np.float64)
        scores = {name: np.asarray(table, np.float64) for name, table in tuned.items()}
        summaries = {
            name: paired_summary(base_pn, table, resamples, seed) for name, table in scores.items()
        }
        alone = next(iter(summaries.values())) if len(summaries) == 1 else None
        return cls(
            scorer,
            model,
            base_pn,
            alone.base if alone else mean_estimate(base_pn, resamples, seed),
            scores,
            summaries,
            win_matrix([base_pn, *scores.values()], resamples, seed),
        )

    @property
    def tuned_scores(self) -> NDArray[np.float64]:
        """Of the first run, which is the only one unless several are compared."""
        return next(iter(self.scores.values()))

    @property
    def summary(self) -> PairedSummary:
        """Of the first run."""
        return next(iter(self.summaries.values()))


@dataclass(frozen=True)
class Diversity:
    """How different the images of one prompt are; build it with :meth:`from_distances`."""

    embedder: str
    """The scorer whose image embeddings were compared."""
    estimates: Mapping[str, Estimate]
    """Mean cosine distance of two images of a prompt: base first, then each run."""
    changes: Mapping[str, Estimate]
    """Of each run: its own minus base's, prompt by prompt."""

    @classmethod
    def from_distances(
        cls,
        embedder: str,
        distances: Mapping[str, ArrayLike],
        resamples: int = 10_000,
        seed: int = 0,
    ) -> Diversity:
        """From mean pairwise distances (prompts,) of base, which comes first, and of each run."""
        tables = {name: np.asarray(d, np.float64)[:, None] for name, d in distances.items()}
        base, *runs = tables
        return cls(
            embedder,
            {name: mean_estimate(table, resamples, seed) for name, table in tables.items()},
            {name: paired_difference(tables[base], tables[name], resamples, seed) for name in runs},
        )

    def share_lost(self, run: str) -> float:
        """How much of base's diversity a run has lost, e.g. 0.2; below 0 where it gained."""
        base = next(iter(self.estimates.values())).mean
        return -self.changes[run].mean / base if base > 0 else float("nan")


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
class SharedSeed:
    """A prompt drawn by each model from one and the same noise: base first, then each run."""

    prompt: str
    images: Mapping[str, Image.Image]
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of `ReportData.shown_scorer`."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with one origin: `training` or `held-out`."""

    name: str
    prompts: Sequence[str]
    """All prompts that were scored: the rows of the scorers' tables."""
    scorers: Sequence[ScorerResult]
    """The judge first, if there is one."""
    samples: Sequence[PromptSample] = ()
    """The `compare.report_prompts` prompts whose images are shown, where one run is compared."""
    rows: Sequence[SharedSeed] = ()
    """The same where several are."""
    diversity: Diversity | None = None
    """None where there is one image a prompt, or no scorer that embeds images."""
    divergence: Mapping[str, Estimate] = field(default_factory=dict)
    """The KL proxy of each run: mean square of policy minus reference prediction; none if it was
    not measured."""


@dataclass(frozen=True)
class WorstLoss:
    """An image pair that the tuned model lost; see `estimates.worst_pairs`."""

    prompt: str
    prompt_set: str
    base: Image.Image
    tuned: Image.Image
    base_score: float
    tuned_score: float
    run: str = TUNED


@dataclass(frozen=True)
class RunFacts:
    """A run that is compared, and what made it different from the others."""

    name: str
    run_dir: str
    method: Mapping[str, str | int | float | None]
    """What its recipe chose, by dotted keys such as `objective.beta`."""
    both_errors_rose: bool = False
    """Whether training ended with the errors of winners and of losers above the reference's."""
    changes: Sequence[str] = ()
    """What was changed in the middle of it: steps, keys, values."""
    rounds: Sequence[int] = ()
    """The rounds that it is the sum of, by their numbers; none of a run of one `train`."""


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
    evaluations: Sequence[Mapping[str, Any]] = ()
    """Rows of evaluations.jsonl; none if the run made none."""
    num_tiers: int | None = None
    progression: Image.Image | None = None
    """Samples during training, e.g. an `image_grid` with a column a step."""
    recipe: str = ""
    """The resolved recipe, as YAML."""
    facts: Sequence[tuple[str, str]] = field(default_factory=list)
    """What a reader needs to repeat it: versions, device, seed, sampler, time."""
    notes: Sequence[str] = ()
    """What was left out, and why, in whole sentences."""
    runs: Sequence[RunFacts] = ()
    """In the order of the tables."""
    base_name: str = "base"

    @property
    def run_names(self) -> list[str]:
        """Of all runs, in the order of the tables."""
        return [run.name for run in self.runs] or [TUNED]

    @property
    def tuned_name(self) -> str:
        """Of the first run."""
        return self.run_names[0]

    @property
    def is_of_several(self) -> bool:
        """Whether more than one run is compared with base."""
        return len(self.run_names) > 1

    @property
    def shown_scorer(self) -> str:
        """Whose scores stand beneath the images: the judge's if there is one."""
        return self.prompt_sets[0].scorers[0].scorer if self.prompt_sets else ""
