"""How near few steps of what was distilled come to many of what it was distilled from; prints the
README's tables.

    python assets/emoji/score_lcm.py

Four seeds a prompt. Reward and judge are mean cosines between picture and caption, deviation is
that of a pixel over the seeds of its prompt.
"""

from __future__ import annotations

import argparse

import torch
from data import read_prompts
from score_clip import Scorer
from show import (
    load_flow_pipeline,
    load_lcm_pipeline,
    load_pipeline,
    load_turbo_pipeline,
    sample,
)

SEEDS = 4


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=["train", "heldout"], help="which files")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[15])
    parser.add_argument("--flow-steps", type=int, nargs="*", default=[2, 3, 10, 30])
    parser.add_argument("--turbo-steps", type=int, nargs="*", default=[2, 3])
    args = parser.parse_args()
    prompts = read_prompts(*args.prompts)
    scorers = [Scorer(name) for name in ("reward", "judge")]
    texts = [scorer.texts(prompts) for scorer in scorers]
    rows = [("teacher", load_pipeline(), steps) for steps in args.teacher_steps]
    rows += [("LCM", load_lcm_pipeline(), steps) for steps in args.steps]
    rows += [("flow model", load_flow_pipeline(), steps) for steps in args.flow_steps]
    rows += [("turbo", load_turbo_pipeline(), steps) for steps in args.turbo_steps]
    print("| model | steps | guidance | reward | judge | deviation |\n|---|---|---|---|---|---|")
    for guidance in args.guidance:
        for name, pipeline, steps in rows:
            own = 1.0 if name == "turbo" else guidance  # it takes none
            images = [sample(pipeline, prompts, seed, steps, own) for seed in range(SEEDS)]
            reward, judge = (
                (scorer.images(torch.cat(images)) * text.repeat(SEEDS, 1)).sum(dim=1).mean()
                for scorer, text in zip(scorers, texts, strict=True)
            )
            deviation = torch.stack(images).std(dim=0).mean()
            print(
                f"| {name} | {steps} | {own:g} | {reward:.3f} | {judge:.3f} | {deviation:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
