"""Everything there is to learn on a GPU, in parts of under ten minutes each.

    python benchmarks/bench_gpu.py                    the parts that are not done yet
    python benchmarks/bench_gpu.py --part step sdxl   those alone whose names begin so
    python benchmarks/bench_gpu.py --minutes 9        as many as fit into that
    python benchmarks/bench_gpu.py --rehearse         small shapes on a CPU, into another folder

Tests of the kernels, compute-sanitizer over each of them, their times, whole steps at real size
with each knob and their memory, and a profile. `gpu/parts.py` is the table of parts. A part that is
done is not repeated; each leaves its output in NAME.log and its conditions in NAME.done.json. Ends
with 0 if all parts are done, 1 if one failed, 2 where a package is missing, 3 without a GPU, 75
where time was up and parts are left.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build" / "gpu_links"
SHIPPED = ("engine", "kernels", "recipes", "ds_configs", "assets")
NEEDED = ("torch", "triton", "diffusers", "transformers", "deepspeed", "pydantic", "pytest")
NEEDED += ("pytest_timeout", "hypothesis")
CUDA_TOOLS = "/usr/local/cuda/bin"  # where CUDA's toolkit has compute-sanitizer
LONGEST_S = 600
DONE, FAILED, USAGE, NO_GPU, TIME_IS_UP = 0, 1, 2, 3, 75


def is_done(part: Part, out: Path, rehearse: bool) -> bool:
    """Whether this command has ended well, here or elsewhere, and what it wrote is there."""
    try:
        state = json.loads((out / f"{part.name}.done.json").read_text())
    except (OSError, ValueError):
        return False
    there = all((out / name).is_file() and (out / name).stat().st_size for name in part.writes)
    return there and state["command"] == words(part, rehearse)


def choose(names: list[str]) -> list[Part]:
    """The parts whose names begin with one of these; all without any. In the table's order."""
    return [part for part in PARTS if not names or any(part.name.startswith(n) for n in names)]


def words(part: Part, rehearse: bool) -> list[str]:
    """The command of a part as the table has it."""
    return list(part.rehearsal if rehearse else part.command)


def filled(part: Part, out: Path, rehearse: bool) -> list[str]:
    """The same for this interpreter and folder."""
    texts = [word.replace("{out}", str(out)) for word in words(part, rehearse)]
    return [sys.executable if text == "python" else text for text in texts]


def environment(part: Part, rehearse: bool) -> dict[str, str]:
    """Of a part: `cdpo` is this tree, whether it is installed or not."""
    LINKS.joinpath("cdpo").mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        link = LINKS / "cdpo" / name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / name)
    paths = [str(LINKS), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    added = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    added["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), CUDA_TOOLS])
    if rehearse:
        added |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        added |= {"TRITON_INTERPRET": "1"} if part.interpreted else {}
    elif part.command[0] == "compute-sanitizer":
        # Each tensor an allocation of its own, or reads beyond one would lie in the next.
        added |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {**os.environ, **added}


def run(part: Part, out: Path, rehearse: bool, limit_s: float = LONGEST_S) -> str | None:
    """Run a part; None if it ended well and wrote what it should, else why not."""
    command, started = filled(part, out, rehearse), time.monotonic()
    done = out / f"{part.name}.done.json"
    for name in (done, *(out / name for name in part.writes)):
        name.unlink(missing_ok=True)
    with (out / f"{part.name}.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(part, rehearse),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror}; see benchmarks/gpu/README.md"
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"it took more than {limit_s:.0f} s"
        finally:  # also where this process is interrupted: no part is to run on by itself
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        return f"it ended with {code}"
    if missing := [name for name in part.writes if not (out / name).is_file()]:
        return f"it did not write {', '.join(missing)}"
    seconds = round(time.monotonic() - started, 1)
    state = {"command": words(part, rehearse), "seconds": seconds, **conditions()}
    done.write_text(json.dumps(state, indent=1) + "\n")
    return None


def conditions() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    import torch
    from measuring.provenance import provenance

    return provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def run_all(parts: list[Part], out: Path, *, rehearse: bool, again: bool, minutes: float) -> int:
    """Run what is not done yet, a line a part; the exit code. One part is begun in any case."""
    ends, failed, left, begun = time.monotonic() + 60 * minutes, [], [], False
    for part in parts:
        name = part.name
        if not again and is_done(part, out, rehearse):
            print(f"{name}: done before")
            continue
        if begun and time.monotonic() + 60 * part.minutes > ends:
            left.append(name)
            continue
        begun = True
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        if problem := run(part, out, rehearse):
            failed.append(name)
            print(f"{name}: {problem}; see {out / name}.log")
        else:
            print(f"{name}: done in {time.monotonic() - started:.0f} s")
    if left:
        print(f"time is up, left are {', '.join(left)}: the same command goes on")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return FAILED if failed else TIME_IS_UP if left else DONE


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=[], help="beginnings of names; without: all")
    parser.add_argument("--force", action="store_true", help="again what is done")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--list", action="store_true", help="the parts, and run none")
    parser.add_argument("--out", type=Path, help="benchmarks/results/gpu_<device>")
    options = parser.parse_args(arguments)
    if not choose(options.part):
        parser.error(f"--part {' '.join(options.part)}: no part's name begins so: see --list")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    parts = choose(options.part)
    if options.list:
        print("\n".join(part.name for part in parts))
        return DONE
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"not installed: {', '.join(missing)}; see benchmarks/gpu/README.md")
        return USAGE
    import torch
    from measuring.provenance import slug

    if options.rehearse:
        out = options.out or ROOT / "runs" / "bench" / "gpu_rehearsal"
    elif not torch.cuda.is_available():
        print("no CUDA device here, nothing was run: --rehearse takes small shapes on the CPU")
        return NO_GPU
    else:
        name = slug(torch.cuda.get_device_name())
        out = options.out or ROOT / "benchmarks" / "results" / f"gpu_{name}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_all(
        parts, out, rehearse=options.rehearse, again=options.force, minutes=options.minutes
    )


if __name__ == "__main__":
    sys.exit(main())
