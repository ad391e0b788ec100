"""A trace of our training step at real size, with random weights: needs no shards and no hub.

    PYTHONPATH=benchmarks python -m gpu.profile_real_step --out DIR [--model SD1.5@512] [--tiny]

Leaves `trace.json.gz` for https://ui.perfetto.dev and `profile.txt`: phases, the costliest
operators, and on a GPU its kernels, how busy it is, and how often the host waits for it.
"""

import argparse
import sys
from pathlib import Path

import torch
from cdpo.engine.display.terminal import Terminal
from profile_step import WARM_UP, new_profiler, show_device, show_operators, show_phases
from step_bench.models import REAL, TINY
from step_bench.ours import Knobs, OurStep
from step_bench.setup import make_pairs
from step_bench.trace import read_trace

STEPS = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=REAL, default="SD1.5@512")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trace")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (TINY if options.tiny else REAL)[options.model]
    pairs = make_pairs(model, 1 if options.tiny else model.pairs, device)
    step = OurStep(model, pairs, device, Knobs.for_device(device, model))
    profiler = new_profiler(STEPS, device)
    with profiler:
        for _ in range(WARM_UP + STEPS):
            step()
            profiler.step()
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "trace.json.gz"))
    trace = read_trace(options.out / "trace.json.gz")
    on_gpu = device.type == "cuda"
    with (options.out / "profile.txt").open("w") as file:
        terminal = Terminal(stdout=file)
        show_phases(terminal, trace, on_gpu)
        show_operators(terminal, profiler, trace, on_gpu)
        if on_gpu:
            show_device(terminal, trace)
    print((options.out / "profile.txt").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
