"""The papers' table in miniature: what the curriculum is worth, on the small world.

    python benchmarks/bench_quality.py

Base, SFT, DPO (the same pairs in no order), hard to easy, Curriculum-DPO and Curriculum-DPO++, from
the diffusion model and from its LCM, with two rewards: text alignment by CLIP, and colorfulness,
which needs no weights. All methods of a group train on the same pairs for equally many steps. Every
result is judged by the reward and by a CLIP model that trained nothing and ranked nothing. Then B,
K, M and beta are varied one at a time.

It takes hours on two cores, a verb at a time, and goes on where it was stopped; `--report` makes
JSON, table and plots of what is finished. Each verb's recipe and log lie in its run folder under
`runs/quality`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

import torch
from measuring.provenance import provenance
from quality_bench.plan import REWARDS, Group, Scale, ablation_groups, main_groups
from quality_bench.plot import draw
from quality_bench.results import collect
from quality_bench.runs import VerbFailedError, import_the_engine, run_group
from quality_bench.tables import show
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
Chain = list[Group]


def chains_of(groups: list[Group]) -> list[Chain]:
    """Groups that share images, in a row: no two processes draw the same ones."""
    chains: dict[tuple[str, int], Chain] = {}
    for group in groups:
        chains.setdefault((group.model, group.seed), []).append(group)
    return list(chains.values())


def run_all(chains: list[Chain], work: Path, scale: Scale, jobs: int) -> bool:
    """Every group, ``jobs`` chains at a time; whether all of them succeeded."""
    import_the_engine()
    forks = multiprocessing.get_context("fork")
    taken, failed = forks.Value("i", 0), forks.Value("i", 0)
    arguments = (chains, work, scale, taken, failed)
    workers = [forks.Process(target=_work, args=arguments) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failed.value == 0 and all(worker.exitcode == 0 for worker in workers)


def _work(chains: list[Chain], work: Path, scale: Scale, taken, failed) -> None:  # type: ignore[no-untyped-def]
    """Take one chain after another until none is left; a group that fails ends its chain."""
    while True:
        with taken.get_lock():
            index = taken.value
            taken.value += 1
        if index >= len(chains):
            return
        try:
            for group in chains[index]:
                run_group(group, work, scale)
        except VerbFailedError as error:
            print(error, file=sys.stderr, flush=True)
            with failed.get_lock():
                failed.value += 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("sd", "lcm"), default=["sd", "lcm"])
    parser.add_argument("--rewards", nargs="+", choices=tuple(REWARDS), default=list(REWARDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--ablation-seeds", nargs="*", type=int, default=[0], help="none: no ablations"
    )
    parser.add_argument("--steps", type=int, default=Scale.steps, help="of every training")
    parser.add_argument("--steps-per-tier", type=int, default=Scale.steps_per_tier, help="K")
    parser.add_argument("--candidates", type=int, default=Scale.candidates, help="M")
    parser.add_argument("--images", type=int, default=Scale.images_per_prompt, help="compared")
    parser.add_argument("--prompts", type=int, help="the first so many of each file alone")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality"), help="folder of all runs"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--out", type=Path, help="JSON; by default results/quality_DEVICE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a verb failed; what is finished is reported all the same."""
    options = parse(arguments)
    work = options.work.resolve()
    scale = Scale(
        steps=options.steps,
        steps_per_tier=options.steps_per_tier,
        candidates=options.candidates,
        images_per_prompt=options.images,
        prompts=options.prompts,
    )
    table = list(main_groups(options.models, options.rewards, options.seeds))
    ablations = list(ablation_groups(options.ablation_seeds, scale))
    succeeded = options.report or run_all(
        chains_of(table + ablations), work, scale, max(1, options.jobs)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        **provenance(device),
        "scale": {key: value for key, value in scale.changes().items() if value is not None},
        **collect(table, ablations, scale.defaults(), work),
    }
    out = options.out or RESULTS / f"quality_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, Console(width=None if sys.stdout.isatty() else 190))
    print("\n".join(str(path) for path in (out, *draw(result, out))))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
