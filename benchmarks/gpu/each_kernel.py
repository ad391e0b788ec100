"""Runs each kernel once, forward and backward, at small shapes: what compute-sanitizer looks at.

    PYTHONPATH=benchmarks python -m gpu.each_kernel --out ran.json

Untimed, and with odd numbers of pairs, so that tiles are not filled.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from cdpo.kernels import use
from kernel_bench.cases import cases
from measuring.agreement import as_list, leaves, weights_like

MODEL, PAIRS = "tiny@64", [1, 3]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, required=True, help="JSON: the kernels and shapes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ran: dict[str, list[str]] = {}
    with use("torch"):  # shapes are found with tensors that hold nothing
        chosen = cases([MODEL], PAIRS, options.kernels)
    for case in chosen:
        inputs = case.make_inputs(device)
        outputs = [out for out in as_list(case.ours(**inputs)) if out.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves(inputs), [weights_like(out) for out in outputs])
        ran.setdefault(case.kernel, []).append(case.shape)
    if device.type == "cuda":
        torch.cuda.synchronize()
    options.out.write_text(json.dumps(ran, indent=1) + "\n")
    print(f"{sum(map(len, ran.values()))} cases of {len(ran)} kernels on {device.type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
