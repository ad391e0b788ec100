"""From what a comparison measured to what it leaves: results.json, pictures and report.html."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml

from ...basics.estimates import mean_estimate, worst_pairs
from ...display.drawing import write_png
from ...display.grids import image_grid
from ...display.terminal import Terminal
from ...preparing.candidates import CandidateSet
from ...recipe import Recipe, Reward
from ...recipe.identity import save_resolved
from ...training.evaluation import FILE as EVALUATIONS
from ...training.log import MetricsFile
from ...training.samples import progression
from ..result_cache import Tables
from ..runs import ComparedRun
from . import wording
from .content import (
    Diversity,
    PromptSample,
    PromptSet,
    ReportData,
    RunFacts,
    ScorerResult,
    SharedSeed,
    WorstLoss,
)
from .findings import findings
from .page import write_report
from .results import save_results

WORST_SHOWN = 8
SHOWN_SEED = 0  # the image of each prompt that grids show of every model


@dataclass
class Measured:
    """Everything that was measured, in tables over all prompts; a side is base or a run."""

    prompt_sets: Sequence[tuple[str, Sequence[str]]]
    """Name and prompts of each set: their rows follow each other in the tables."""
    scorers: Mapping[str, Reward]
    images: dict[str, CandidateSet] = field(default_factory=dict)
    """Of each side, base first."""
    scores: dict[str, Tables] = field(default_factory=dict)
    """By scorer, (prompts, images) of each side."""
    distances: Tables = field(default_factory=dict)
    """(prompts,) of each side; none if nobody embeds images."""
    embedder: str | None = None
    """The scorer whose embeddings ``distances`` are of."""
    divergence: Tables = field(default_factory=dict)
    """(prompts, images) of each run; none if it was not asked for."""


def write_comparison(
    recipe: Recipe,
    runs: Sequence[ComparedRun],
    measured: Measured,
    folder: Path,
    device: torch.device,
    terminal: Terminal,
) -> None:
    """Write everything into ``folder`` and say on the terminal what was found."""
    data = ComparisonReport(recipe, runs, measured).data(device)
    save_results(folder / "results.json", data)
    _draw_side_by_side(measured, recipe.compare.report_prompts, folder / "side_by_side.png")
    report = folder / "report.html"
    write_report(report, data)
    save_resolved(recipe, folder / "recipe.yaml")
    title = f"{data.base_name} against {', '.join(data.run_names)}"
    terminal.table(title, wording.table_columns(data), wording.summary_rows(data))
    for finding in findings(data):
        terminal.warn(finding.text)
    terminal.line(wording.verdict(data))
    terminal.line(f"report: {report}")


class ComparisonReport:
    """Estimates and pictures of a comparison, as the report takes them."""

    def __init__(self, recipe: Recipe, runs: Sequence[ComparedRun], measured: Measured) -> None:
        self.recipe = recipe
        self.runs = runs
        self.measured = measured
        self._base, *self._tuned = measured.images
        spec = recipe.compare
        self._options = {"resamples": spec.bootstrap, "seed": recipe.seed}

    def data(self, device: torch.device) -> ReportData:
        """The whole report."""
        recipe, alone = self.recipe, self.runs[0] if len(self.runs) == 1 else None
        sampler = recipe.compare.sampler
        ends = np.cumsum([len(prompts) for _, prompts in self.measured.prompt_sets])
        sets = [
            self._prompt_set(name, prompts, slice(end - len(prompts), end))
            for (name, prompts), end in zip(self.measured.prompt_sets, ends, strict=True)
        ]
        trained = alone.recipe if alone else recipe
        trained_in = Path(trained.run_dir)
        runs = [run.facts() for run in self.runs]
        drawn_by = recipe.model.family.sampler
        return ReportData(
            title=Path(recipe.run_dir).name,
            prompt_sets=sets,
            worst=self._worst(sets),
            metrics=MetricsFile(trained_in / "metrics.jsonl").read() if alone else (),
            evaluations=MetricsFile(trained_in / EVALUATIONS).read() if alone else (),
            num_tiers=trained.curriculum.tiers,
            progression=progression(trained_in / "samples", trained.model.resolution)
            if alone
            else None,
            recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
            facts=[
                ("seed", str(recipe.seed)),
                ("sampler", f"{drawn_by}, {sampler.steps} steps, guidance {sampler.guidance:g}"),
                ("device", _device_name(device)),
                *((name, version(name)) for name in ("torch", "diffusers", "deepspeed", "cdpo")),
            ],
            notes=self._notes(runs),
            runs=runs,
            base_name=self._base,
        )

    def _notes(self, runs: Sequence[RunFacts]) -> list[str]:
        notes = [note for run in self.runs if (note := self._who_chose(run))]
        notes += [
            f"{run.name} was not trained by one recipe: {'; '.join(run.changes)}."
            for run in runs
            if run.changes
        ]
        if self.measured.embedder is None:
            notes.append(
                "Diversity was left out: neither judge nor reward embeds images; a CLIP model "
                "among compare.rewards would."
            )
        elif not self.measured.distances:
            notes.append("Diversity was left out: it needs two images a prompt or more.")
        return notes

    def _who_chose(self, run: ComparedRun) -> str | None:
        """What chose the weights that are compared, if they are not simply the last."""
        chosen_by, step = run.chosen
        if chosen_by is None:
            return None
        own, rounds = run.recipe.evaluate, run.facts().rounds
        text = f"The weights of {run.name} are those of step {step} of {run.recipe.train.steps}, "
        text += "chosen"
        if rounds:
            all_of = f"the sum of rounds {', '.join(map(str, rounds))}, each"
            text = f"{run.name} is {all_of if len(rounds) > 1 else f'round {rounds[0]}'} kept"
        text += f" by {chosen_by} on validation prompts, which are not among these."
        judge = self.recipe.compare.judge
        if judge is not None and judge in (own.scorers[:1] or (run.recipe.reward,)):
            text += " It is the judge, too, so this is no independent judgement."
        return text

    def _prompt_set(self, name: str, prompts: Sequence[str], rows: slice) -> PromptSet:
        measured = self.measured
        scorers = [
            ScorerResult.from_scores(
                scorer,
                measured.scorers[scorer].label,
                tables[self._base][rows],
                {run: tables[run][rows] for run in self._tuned},
                **self._options,
            )
            for scorer, tables in measured.scores.items()
        ]
        distances = {side: table[rows] for side, table in measured.distances.items()}
        shown = list(enumerate(prompts[: self.recipe.compare.report_prompts]))
        alone = len(self._tuned) == 1
        return PromptSet(
            name,
            prompts,
            scorers,
            samples=[self._sample(prompt, row, scorers[0]) for row, prompt in shown if alone],
            rows=[self._row(prompt, row, scorers[0]) for row, prompt in shown if not alone],
            diversity=Diversity.from_distances(measured.embedder or "", distances, **self._options)
            if distances
            else None,
            divergence={
                run: mean_estimate(table[rows], **self._options)
                for run, table in measured.divergence.items()
            },
        )

    def _sample(self, prompt: str, row: int, scorer: ScorerResult) -> PromptSample:
        images = self.measured.images
        return PromptSample(
            prompt,
            images[self._base].read(prompt),
            images[self._tuned[0]].read(prompt),
            scorer.base_scores[row].tolist(),
            scorer.tuned_scores[row].tolist(),
        )

    def _row(self, prompt: str, row: int, scorer: ScorerResult) -> SharedSeed:
        tables = {self._base: scorer.base_scores, **scorer.scores}
        return SharedSeed(
            prompt,
            {side: s.read(prompt)[SHOWN_SEED] for side, s in self.measured.images.items()},
            {side: float(table[row, SHOWN_SEED]) for side, table in tables.items()},
        )

    def _worst(self, sets: Sequence[PromptSet]) -> list[WorstLoss]:
        """The image pairs that were lost by most, in the eyes of the first scorer, by the run that
        it puts first: those of a run that has collapsed would fill the page.
        """
        found = []
        for prompt_set in sets:
            scorer, run = prompt_set.scorers[0], wording.best_run(prompt_set)
            base, scores = scorer.base_scores, scorer.scores[run]
            found += [
                self._loss(prompt_set, run, row, image)
                for row, image in worst_pairs(base, scores, WORST_SHOWN)
            ]
        return sorted(found, key=lambda loss: loss.tuned_score - loss.base_score)[:WORST_SHOWN]

    def _loss(self, prompt_set: PromptSet, run: str, row: int, image: int) -> WorstLoss:
        prompt, scorer = prompt_set.prompts[row], prompt_set.scorers[0]
        images = self.measured.images
        return WorstLoss(
            prompt,
            prompt_set.name,
            images[self._base].read(prompt)[image],
            images[run].read(prompt)[image],
            float(scorer.base_scores[row, image]),
            float(scorer.scores[run][row, image]),
            run,
        )


def _draw_side_by_side(measured: Measured, num_prompts: int, path: Path) -> None:
    """The first image of each prompt, base above tuned: a picture to pass around."""
    prompts = measured.prompt_sets[0][1][:num_prompts]
    rows = [[side.read(prompt)[0] for prompt in prompts] for side in measured.images.values()]
    grid = image_grid(rows, list(measured.images), list(prompts))
    write_png(grid, path)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
