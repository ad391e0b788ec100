"""What alignment gains at which distance from the base, on prompts that nobody trained on.

    python benchmarks/bench_evidence.py

480 training and 240 held-out captions of the small world, the diffusion model and its LCM, three
seeds with candidates of their own. Every method is compared at several steps of its training, so
that it is a curve of gain against KL proxy; at equal distance from the base two methods are held
against one another by interpolating the scores of each image between the two steps nearest to that
distance. The judge is a CLIP model that ranked nothing and chose nothing.

It takes hours on two cores and goes on where it was stopped; `--report` makes JSON and figure of
what is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from measuring.provenance import provenance
from quality_bench.curves import collect_curves, draw_curves, show_curves
from quality_bench.evidence import ARMS, arms_of, run_arms
from quality_bench.runs import VerbFailedError, import_the_engine
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="these alone, by name")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder of runs")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--out", type=Path, help="JSON; by default results/evidence_DEVICE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a verb failed; what is finished is reported all the same."""
    options = parse(arguments)
    work, succeeded = options.work.resolve(), True
    if not options.report:
        import_the_engine()
        for seed in options.seeds:
            for model in options.models:
                try:
                    run_arms(model, seed, arms_of(model, seed, options.arms), work)
                except VerbFailedError as error:
                    print(error, file=sys.stderr, flush=True)
                    succeeded = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**provenance(device), **collect_curves(options.models, options.seeds, work)}
    out = options.out or RESULTS / f"evidence_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    show_curves(result, Console(width=None if sys.stdout.isatty() else 190))
    print("\n".join(str(path) for path in (out, draw_curves(result, out.with_suffix(".png")))))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
