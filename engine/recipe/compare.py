"""Section of a recipe: what is compared with the base, and how."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .reward import Reward
from .section import NonNegativeInt, PositiveInt, Sampler, Section

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _+-]{0,39}")
TAKEN = ("base", "scores", "divergence")  # other folders in `compare`, where each run gets one


def _run_names(runs: dict[str, str]) -> dict[str, str]:
    """Names become folders and stand in tables: short, plain, and told apart by any disk."""
    for name in runs:
        if not RUN_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name for a run: 1 to 40 letters, digits, spaces and any of _+- "
                "are taken, a letter or digit first"
            )
        if name.lower() in TAKEN:
            raise ValueError(f"a run cannot be called {name!r}: give it another name")
    folded = [name.lower() for name in runs]
    twice = sorted({name for name in runs if folded.count(name.lower()) > 1})
    if twice:
        raise ValueError(f"{' and '.join(twice)} differ in case alone: give one another name")
    return runs


class Compare(Section):
    """Base against tuned, on the same prompts and the same seeds."""

    runs: Annotated[dict[str, str], AfterValidator(_run_names)] = Field(default={})
    """Finished runs by the names that tables give them, e.g. {DPO: runs/dpo, SFT: runs/sft}:
    exactly these are compared, with one base, by the prompts, reward and settings of this recipe,
    whose `run_dir` takes the report. Empty: the run of this recipe alone, as `tuned`."""
    weights: Literal["last", "ema"] = "last"
    """What is compared with the base: the weights of the last step, or their moving average."""
    images_per_prompt: PositiveInt = 4
    """Images a prompt from each model."""
    sampler: Sampler = Sampler()
    """Sampling of the images compared."""
    batch_size: PositiveInt = 16
    """Images in one denoiser call; bounds memory."""
    judge: Reward | None = None
    """A reward that training never saw; without one only the training reward is reported."""
    rewards: tuple[Reward, ...] = ()
    """Further scorers beside judge and reward, for the tables only; each has all keys of `reward`.
    """
    divergence_draws: NonNegativeInt = 4
    """Draws of timestep and noise an image of the base, on which each run's prediction is held
    against the base's: the KL proxy. Each costs two denoiser rows a run; 0 leaves it out."""
    bootstrap: PositiveInt = 10_000
    """Resamples behind each 95 % interval (prompts are resampled, not images)."""
    report_prompts: PositiveInt = 12
    """Prompts shown in the report's grids, besides the worst losses."""
