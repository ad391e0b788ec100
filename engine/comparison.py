"""Base against tuned: the same prompts and the same seeds, scored by the reward and by the judge.

The judge is a model that training never saw; what only the reward likes better is reward hacking.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from .backbones import Backbone, load_backbone
from .candidates import CandidateSampler, CandidateSet
from .exports import load_tuned, tuned_hash
from .failpoints import failpoint
from .keyed import Stream
from .launch import Ranks
from .prompts import read_prompts
from .recipe import Recipe, Reward
from .recipe_file import save_resolved
from .reporting.console import Terminal
from .reporting.files import write_atomically
from .reporting.grids import image_grid
from .reporting.report import write_report
from .reporting.report_data import PromptSample, PromptSet, ReportData, ScorerResult, WorstLoss
from .reporting.results import save_results
from .reporting.stats import worst_pairs
from .reporting.wording import TABLE_COLUMNS, summary_rows, verdict
from .rewards import load_reward
from .speed import tune_for_sampling
from .step_metrics import MetricsFile
from .training_samples import progression

WORST_SHOWN = 8


class Comparison:
    """One report over one run's result, on all ranks together."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.run_dir = Path(recipe.run_dir)
        self.folder = self.run_dir / "compare"
        self.report_path = self.folder / "report.html"
        train, heldout = read_prompts(recipe.prompts)
        sets = {"training": train, "held-out": heldout}
        self.prompt_sets = {name: prompts for name, prompts in sets.items() if prompts}
        self.tuned = ranks.on_first(lambda: tuned_hash(recipe))
        self.inputs = self._inputs_hash()
        self.is_finished = ranks.on_first(self._already_done)

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        spec = self.recipe.compare
        sizes = " + ".join(f"{len(prompts)} {name}" for name, prompts in self.prompt_sets.items())
        scorers = ", ".join(f"{name} {reward.path}" for name, reward in self._scorers().items())
        return [
            (
                "sample",
                f"base and tuned: {sizes} prompts x {spec.images_per_prompt} images, "
                f"{spec.sampler.steps} steps, guidance {spec.sampler.guidance:g}",
            ),
            ("score by", scorers),
        ]

    def _inputs_hash(self) -> str:
        """Of everything the report is a function of."""
        inputs = {
            "adapter": self.tuned,
            "seed": self.recipe.seed,
            "model": self.recipe.model.model_dump(mode="json"),
            "prompts": self.prompt_sets,
            "reward": self.recipe.reward.model_dump(),
            "compare": self.recipe.compare.model_dump(mode="json", exclude={"batch_size"}),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _already_done(self) -> bool:
        stamp = self.folder / "inputs.sha256"
        return self.report_path.exists() and stamp.exists() and stamp.read_text() == self.inputs

    def _scorers(self) -> dict[str, Reward]:
        judge = self.recipe.compare.judge
        return ({"judge": judge} if judge else {}) | {"reward": self.recipe.reward}

    def run(self) -> None:
        """Sample, score, and write results.json and report.html."""
        images = self._sample_both()
        results = {
            name: self._score_set(name, prompts, images)
            for name, prompts in self.prompt_sets.items()
        }
        self.ranks.on_first(lambda: self._write(results, images))

    def _sample_both(self) -> dict[str, CandidateSet]:
        """Images of the base model, then, with the tuned weights loaded into it, of that."""
        backbone = load_backbone(self.recipe.model, self.ranks.device)
        fingerprint = backbone.fingerprints()["model"]
        tune_for_sampling(self.recipe.speed, backbone)
        prompts = [prompt for part in self.prompt_sets.values() for prompt in part]
        base = self._sampler(backbone, "base", {"model": fingerprint})
        base.run(prompts, self.ranks, self.terminal, "sample base")
        load_tuned(self.recipe, backbone)
        tuned = self._sampler(backbone, "tuned", {"model": fingerprint, "adapter": self.tuned})
        tuned.run(prompts, self.ranks, self.terminal, "sample tuned")
        return {"base": base.images, "tuned": tuned.images}

    def _sampler(self, backbone: Backbone, name: str, made_by: dict[str, str]) -> CandidateSampler:
        spec = self.recipe.compare
        return CandidateSampler(
            backbone,
            backbone.denoiser,
            self.folder / name,
            seed=self.recipe.seed,
            stream=Stream.COMPARE_NOISE,
            count=spec.images_per_prompt,
            sampler=spec.sampler,
            resolution=self.recipe.model.resolution,
            batch_size=spec.batch_size,
            made_by=made_by,
        )

    def _score_set(
        self, name: str, prompts: Sequence[str], images: dict[str, CandidateSet]
    ) -> list[ScorerResult]:
        results = []
        for scorer, spec in self._scorers().items():
            base, tuned = (self._score(spec, prompts, images[side]) for side in ("base", "tuned"))
            results.append(
                ScorerResult.from_scores(
                    scorer,
                    spec.path,
                    base,
                    tuned,
                    resamples=self.recipe.compare.bootstrap,
                    seed=self.recipe.seed,
                )
            )
        return results

    def _score(self, spec: Reward, prompts: Sequence[str], images: CandidateSet) -> np.ndarray:
        """(prompts, images) float32, scored a share on each rank."""
        reward = load_reward(spec, self.ranks.device)
        own = {}
        for prompt in self.ranks.until_stopped(self.ranks.share(prompts)):
            drawn = images.read(prompt)
            own[prompt] = reward.score(drawn, [prompt] * len(drawn))
            failpoint("compare.scored")
        self.ranks.meet()
        scores = {prompt: row for part in self.ranks.gather(own) for prompt, row in part.items()}
        return np.stack([scores[prompt] for prompt in prompts])

    def _write(
        self, results: dict[str, list[ScorerResult]], images: dict[str, CandidateSet]
    ) -> None:
        data = self._report_data(results, images)
        save_results(self.folder / "results.json", data)
        self._draw_side_by_side(data.prompt_sets[0].samples)
        write_report(self.report_path, data)
        save_resolved(self.recipe, self.folder / "recipe.yaml")
        (self.folder / "inputs.sha256").write_text(self.inputs)
        self.terminal.table("base against tuned", TABLE_COLUMNS, summary_rows(data))
        self.terminal.line(verdict(data))
        self.terminal.line(f"report: {self.report_path}")

    def _draw_side_by_side(self, samples: Sequence[PromptSample]) -> None:
        """The first image of each prompt, base above tuned: a picture to pass around."""
        rows = [[sample.base[0] for sample in samples], [sample.tuned[0] for sample in samples]]
        grid = image_grid(rows, ["base", "tuned"], [sample.prompt for sample in samples])
        path = self.folder / "side_by_side.png"
        write_atomically(path, lambda file: grid.save(file, format="PNG", optimize=True))

    def _report_data(
        self, results: dict[str, list[ScorerResult]], images: dict[str, CandidateSet]
    ) -> ReportData:
        sets = [
            PromptSet(
                name, prompts, results[name], self._samples(prompts, results[name][0], images)
            )
            for name, prompts in self.prompt_sets.items()
        ]
        recipe = self.recipe
        sampler = recipe.compare.sampler
        return ReportData(
            title=self.run_dir.name,
            prompt_sets=sets,
            worst=self._worst(results, images),
            metrics=MetricsFile(self.run_dir / "metrics.jsonl").read(),
            num_tiers=recipe.curriculum.tiers,
            progression=progression(self.run_dir / "samples", recipe.model.resolution),
            recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
            facts=[
                ("seed", str(recipe.seed)),
                ("sampler", f"DDIM, {sampler.steps} steps, guidance {sampler.guidance:g}"),
                ("device", _device_name(self.ranks.device)),
                *((name, version(name)) for name in ("torch", "diffusers", "deepspeed", "cdpo")),
            ],
        )

    def _samples(
        self, prompts: Sequence[str], scorer: ScorerResult, images: dict[str, CandidateSet]
    ) -> list[PromptSample]:
        shown = list(prompts[: self.recipe.compare.report_prompts])
        return [
            PromptSample(
                prompt,
                images["base"].read(prompt),
                images["tuned"].read(prompt),
                scorer.base_scores[row].tolist(),
                scorer.tuned_scores[row].tolist(),
            )
            for row, prompt in enumerate(shown)
        ]

    def _worst(
        self, results: dict[str, list[ScorerResult]], images: dict[str, CandidateSet]
    ) -> list[WorstLoss]:
        found = []
        for name in self.prompt_sets:
            base, tuned = results[name][0].base_scores, results[name][0].tuned_scores
            for row, image in worst_pairs(base, tuned, WORST_SHOWN):
                found.append((float(tuned[row, image] - base[row, image]), name, row, image))
        worst = []
        for _, name, row, image in sorted(found)[:WORST_SHOWN]:
            prompt, scorer = self.prompt_sets[name][row], results[name][0]
            worst.append(
                WorstLoss(
                    prompt,
                    name,
                    self._image(images["base"], prompt, image),
                    self._image(images["tuned"], prompt, image),
                    float(scorer.base_scores[row, image]),
                    float(scorer.tuned_scores[row, image]),
                )
            )
        return worst

    @staticmethod
    def _image(images: CandidateSet, prompt: str, index: int) -> Image.Image:
        return images.read(prompt)[index]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
