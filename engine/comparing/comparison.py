"""Base against tuned: the same prompts and the same seeds, scored by the reward and by the judge.

One run or several are held against one base, whose images are drawn once. The judge is a model that
training never saw; what only the reward likes better is reward hacking.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ModelMixin
from numpy.typing import NDArray

from ..basics.failpoints import failpoint
from ..basics.files import replacing
from ..basics.keyed import Stream
from ..display.terminal import Terminal
from ..models import Backbone, load_backbone
from ..models.adapters import twin_of
from ..models.divergence import Divergence
from ..models.few_steps import check_guidance
from ..models.fingerprints import changed_parts, named
from ..models.text import told_of_long
from ..models.tuning import tune_denoiser, tune_for_sampling
from ..preparing.candidates import CandidateSampler, CandidateSet, drawn_by
from ..ranks import Ranks
from ..recipe import Recipe, Reward
from ..recipe.identity import MODEL_FILES
from ..rewards import clip_of, known_identity, load_reward
from ..sources.left_out import NAME, KeptLeftOut, naming
from ..sources.prompts import OTHER_SPELLING, read_prompts
from .report.build import Measured, write_comparison
from .result_cache import KeptTables
from .runs import ComparedRun, load_tuned, parts_of, read_runs
from .scores import SideScoring

BASE = "base"
MADE_OF = "made_of.json"  # beside the report: what it is a function of
NO_INPUTS = {"batch_size", "judge", "rewards", "runs"}  # of `compare`; the last three stand beside


class Comparison:
    """One report over the results of one or several runs, on all ranks together."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.folder = Path(recipe.run_dir) / "compare"
        self.report_path = self.folder / "report.html"
        self.left_out = KeptLeftOut()
        train, heldout, _ = read_prompts(recipe.prompts, recipe.seed, self.left_out)
        if repeated := self.left_out.rows[OTHER_SPELLING]:
            terminal.warn(
                f"{repeated} prompts are other spellings of earlier ones: left out, and named in "
                f"{self.folder / NAME}"
            )
        sets = {"training": train, "held-out": heldout}
        self.prompt_sets = {name: prompts for name, prompts in sets.items() if prompts}
        self.prompts = [prompt for part in self.prompt_sets.values() for prompt in part]
        self.scorers = scorers_of(recipe)
        self.runs: list[ComparedRun] = ranks.on_first(lambda: read_runs(recipe, ranks.device))
        self.inputs = self._inputs_hash()
        self.made_by: dict[str, str] = {}  # fingerprints of what draws and what scores
        self.is_finished = ranks.on_first(self._already_done)

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        spec = self.recipe.compare
        sizes = " + ".join(f"{len(prompts)} {name}" for name, prompts in self.prompt_sets.items())
        names = [run.name for run in self.runs]
        return [
            (
                "sample",
                f"{', '.join([BASE, *names[:-1]])} and {names[-1]}: {sizes} prompts x "
                f"{spec.images_per_prompt} images, {spec.sampler.steps} steps, guidance "
                f"{spec.sampler.guidance:g}",
            ),
            ("score by", ", ".join(_described(name, s) for name, s in self.scorers.items())),
        ]

    def _inputs_hash(self) -> str:
        """Of everything the report is a function of."""
        inputs = {
            "runs": [(run.name, run.weights) for run in self.runs],
            "seed": self.recipe.seed,
            "model": self.recipe.model.model_dump(mode="json", exclude=set(MODEL_FILES)),
            "prompts": self.prompt_sets,
            "scorers": {name: scorer.knobs() for name, scorer in self.scorers.items()},
            "compare": self.recipe.compare.model_dump(mode="json", exclude=NO_INPUTS),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _already_done(self) -> bool:
        """Whether there is a report of these inputs, models and scorers. One that does not tell its
        parts is made anew, of what is kept of it.
        """
        try:
            made_of = json.loads((self.folder / MADE_OF).read_bytes())
            then, inputs = made_of["parts"], made_of["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not self.report_path.exists() or inputs != self.inputs:
            return False
        changed = changed_parts(then, self._parts())
        if changed:
            self.terminal.warn(f"the report is made again, with another {named(changed)}")
        return not changed

    def _parts(self) -> dict[str, str]:
        """What draws and what scores, by content; loaded only if that is not known."""
        device = self.ranks.device
        scorers = {}
        for name, spec in self.scorers.items():
            scorers[name] = (known_identity(spec) or load_reward(spec, device).identity)["whole"]
        return parts_of(self.recipe.model, device, "fp32") | scorers

    def run(self) -> None:
        """Sample, score, and write results.json and report.html."""
        measured = Measured(list(self.prompt_sets.items()), self.scorers)
        self._sample(measured)
        self._score(measured)

        def write() -> None:
            write_comparison(
                self.recipe, self.runs, measured, self.folder, self.ranks.device, self.terminal
            )
            if self.left_out.counts:
                with naming(self.folder / NAME) as names:
                    names.copy(self.left_out.lines())
            else:
                (self.folder / NAME).unlink(missing_ok=True)
            made_of = {"inputs": self.inputs, "parts": self.made_by}
            with replacing(self.folder / MADE_OF) as file:
                file.write(json.dumps(made_of, indent=1).encode())

        self.ranks.on_first(write)

    def _sample(self, measured: Measured) -> None:
        """Images of the base, then of each run, and how far each has gone from the base."""
        check_guidance(self.recipe)
        backbone = load_backbone(self.recipe.model, self.ranks.device)
        if self.ranks.is_first and (told := told_of_long(backbone, self.prompts)):
            self.terminal.warn(told)
        made_by = drawn_by(self.recipe.model, backbone)
        self.made_by |= backbone.fingerprints()
        tune_for_sampling(self.recipe.speed, backbone)
        reference = backbone.denoiser
        measured.images[BASE] = self._draw(backbone, BASE, made_by)
        for run in self.runs:
            with tuned(backbone, reference, run, self.recipe):
                made_with = made_by | {"adapter": run.weights}
                measured.images[run.name] = self._draw(backbone, run.name, made_with)
                if self.recipe.compare.divergence_draws:
                    base = measured.images[BASE]
                    found = self._diverge(backbone, reference, run, base)
                    measured.divergence[run.name] = found

    def _draw(self, backbone: Backbone, name: str, made_by: dict[str, Any]) -> CandidateSet:
        spec = self.recipe.compare
        sampler = CandidateSampler(
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
        sampler.run(self.prompts, self.ranks, self.terminal, f"sample {name}")
        return sampler.images

    def _diverge(
        self, backbone: Backbone, reference: ModelMixin, run: ComparedRun, base: CandidateSet
    ) -> NDArray[np.float64]:
        """(prompts, images) of the KL proxy."""
        spec, model, ranks = self.recipe.compare, self.recipe.model, self.ranks
        made_of = {
            "weights": run.weights,
            "images": base.fingerprint,
            "draws": str(spec.divergence_draws),
            "solver": f"{model.solver_steps} {model.guidance_range}",
            "prompts": json.dumps(self.prompts),
        }
        store = KeptTables(self.folder / "divergence")
        kept = ranks.on_first(lambda: store.read(run.name, made_of))
        if kept is not None:
            return kept["errors"]
        divergence = Divergence(
            backbone,
            reference,
            seed=self.recipe.seed,
            draws=spec.divergence_draws,
            resolution=model.resolution,
            batch_size=spec.batch_size,
        )
        with self.terminal.progress(
            f"measure {run.name}", len(self.prompts), unit="prompts"
        ) as progress:

            def measure(prompt: str) -> NDArray[np.float64]:
                latents = backbone.encode_images(base.read(prompt))
                found = divergence.of(backbone.denoiser, prompt, latents)
                failpoint("compare.diverged")
                progress.advance(min(ranks.world_size, progress.total - progress.done))
                return found

            errors = np.stack(ranks.divided(self.prompts, measure))
        ranks.on_first(lambda: store.write(run.name, made_of, {"errors": errors}))
        return errors

    def _score(self, measured: Measured) -> None:
        """Scores by everyone who scores, and diversity by the first who embeds images."""
        folder = self.folder / "scores"
        scoring = SideScoring(folder, self.ranks, measured.images, self.prompts)
        for name, spec in self.scorers.items():
            reward = load_reward(spec, self.ranks.device, folder)
            self.made_by[name] = reward.fingerprint
            measured.scores[name] = scoring.scores(spec, reward)
            clip = clip_of(reward)
            if measured.embedder is None and clip is not None:
                measured.embedder = name
                if self.recipe.compare.images_per_prompt > 1:
                    measured.distances = scoring.distances(
                        clip, spec.images_per_call, reward.fingerprint
                    )


def scorers_of(recipe: Recipe) -> dict[str, Reward]:
    """Who scores, by the names that tables give them: judge, reward, and the further ones by type,
    with the file or number that tells those of one type apart.
    """
    spec = recipe.compare
    found: dict[str, Reward] = ({"judge": spec.judge} if spec.judge else {}) | {
        "reward": recipe.reward
    }
    types = [reward.type for reward in spec.rewards]
    for reward in spec.rewards:
        name = str(reward.type)
        if types.count(reward.type) > 1 and hasattr(reward, "path"):
            name = f"{name} {Path(reward.path).name}"
        number = 2
        while name in found:
            name, number = f"{reward.type} {number}", number + 1
        found[name] = reward
    return found


@contextmanager
def tuned(
    backbone: Backbone, reference: ModelMixin, run: ComparedRun, recipe: Recipe
) -> Iterator[None]:
    """Within, the backbone draws what a run has learned; nothing of it is left afterwards.

    Adapters go into a twin of the reference, over the very same weights: the reference itself is
    never touched, so that no run can leave a trace in the next.
    """
    backbone.use_denoiser(twin_of(reference))
    try:
        load_tuned(run.recipe, backbone)
        tune_denoiser(recipe.speed, backbone)
        yield
    finally:
        backbone.use_denoiser(reference)


def _described(name: str, spec: Reward) -> str:
    return f"{name} {spec.label}" if name in ("judge", "reward") else spec.label
