"""Time the data path: our reader beside webdataset and a plain tar loop over the same files.

    python benchmarks/bench_data.py

writes shards of Stable Diffusion 1.5's latents (64 KiB a pair) to a temporary folder and measures

  - reading: processor time a pair, ours over the plain loop's, with the checksums of a first pass
    and without, and for several workers the wall time;
  - resuming: wall time from nothing to the first batch, at positions up to a billion steps on,
    over that at the start; and with shards of the default size, lanes and window on one rank, in
    seconds: the first batch then has some two GB of shards hashed;
  - writing: processor time a pair of a prepared shard over that of webdataset's writer;
  - importing: processor time a pair of a Parquet file of pictures with the small world's VAE, over
    that of a bare loop.

All alternatives take turns in one process. Files come from the page cache: what is compared is the
readers, not the disk. Rates are printed; the JSON and the plot hold ratios and the processor's
name, for the rates of another machine say nothing here. The seconds of resuming at default sizes,
which have a goal, are kept with them.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cdpo.engine.shards.contents import contents_of
from cdpo.engine.shards.manifest import Manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.writer import write_shard
from data_bench.importing import importers
from data_bench.plot import draw
from data_bench.readers import (
    BATCH,
    PIXELS,
    SHAPE,
    read_stream,
    read_tars,
    read_webdataset,
    samples,
    stream_of,
    write_alike,
    write_set,
    write_webdataset,
)
from measuring.provenance import provenance
from measuring.timing import CpuClock, Spread, StepClock, Times, take_turns
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
PLAIN = "plain tar loop"
POSITIONS = (0, 10, 1_000, 100_000, 10_000_000, 999_999_000)
FULL_LANES, FULL_SHARDS, FULL_PAIRS = 8, 64, 1000  # of data.lanes, their windows, pairs_per_shard
Row = dict[str, Any]


def run(options: argparse.Namespace) -> Row:
    """Everything that was measured, rates included."""
    num_shards, pairs_a_shard, budget_s = options.shards, options.pairs, options.seconds
    with tempfile.TemporaryDirectory() as name:
        full = write_alike(Path(name), FULL_SHARDS, options.full_pairs, FULL_LANES)
        resuming_in_full = resuming(Path(name), full, budget_s)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_set(folder, num_shards, pairs_a_shard)
        pairs = manifest.num_pairs // BATCH * BATCH
        return {
            **provenance(CPU),
            "processor": processor(),
            "set": {
                "pairs": manifest.num_pairs,
                "shards": num_shards,
                "bytes": sum(entry.bytes for entry in manifest.shards),
            },
            "reading": compare(
                reading_by_processor(folder, manifest), StepClock(CPU), budget_s, pairs
            ),
            "workers": compare(
                reading_by_wall(folder, manifest, options.workers), CpuClock(), budget_s, pairs
            ),
            "resuming": resuming(folder, manifest, budget_s),
            "resuming_default_sizes": resuming_in_full,
            "writing": writing(folder, pairs_a_shard, budget_s),
            "importing": importing(folder, options.import_pairs, budget_s),
        }


def reading_by_processor(folder: Path, manifest: Manifest) -> Row:
    """What reads the set once, by name; the reading thread is the only one."""
    pairs = manifest.num_pairs
    readers = ShardReaders(folder, manifest)
    again = stream_of(folder, manifest, 0, readers)
    return {
        PLAIN: partial(read_tars, folder, manifest),
        "webdataset": partial(read_webdataset, folder, manifest),
        "ours, first pass": lambda: read_stream(stream_of(folder, manifest, 0), pairs),
        "ours, later passes": lambda: read_stream(again, pairs),
    }


def reading_by_wall(folder: Path, manifest: Manifest, workers: int) -> Row:
    """The same for reading threads that share the work."""
    found: Row = {PLAIN: partial(read_tars, folder, manifest)}
    for count in (1, workers):
        stream = stream_of(folder, manifest, count, ShardReaders(folder, manifest))
        name = f"ours, {count} worker{'s' * (count > 1)}"
        found[name] = partial(read_stream, stream, manifest.num_pairs)
    return found


def compare(runs: Row, clock: Any, budget_s: float, pairs: int, plain: str = PLAIN) -> Row:
    """Rates, and times over ``plain``'s of the same round, inverted: 2 is twice as fast."""
    times = take_turns(
        {name: partial(identity, work) for name, work in runs.items()}, clock, budget_s
    )
    return {
        name: {
            "pairs_per_s": Spread.of([1e3 * pairs / ms for ms in taken.device])._asdict(),
            "speed": over(times[plain], taken),
        }
        for name, taken in times.items()
    }


def resuming(folder: Path, manifest: Manifest, budget_s: float) -> Row:
    """From nothing open to the first batch in hand, by position in optimiser steps."""

    def resume(step: int) -> None:
        stream = stream_of(folder, manifest, 0)  # a worker would go on reading into the next turn
        stream.next(step, (0,))
        stream.close()

    runs = {str(step): partial(identity, partial(resume, step)) for step in POSITIONS}
    times = take_turns(runs, CpuClock(), budget_s)
    return {
        step: {
            "seconds": Spread.of([ms / 1e3 for ms in taken.device])._asdict(),
            "of_start": over(taken, times[str(POSITIONS[0])]),
        }
        for step, taken in times.items()
    }


def writing(folder: Path, pairs_a_shard: int, budget_s: float) -> Row:
    """One shard, of pairs that are in memory."""
    pairs = list(samples(0, pairs_a_shard))
    contents = contents_of("latents", SHAPE, PIXELS)
    runs = {
        "webdataset": partial(write_webdataset, folder, pairs),
        "ours": lambda: write_shard(folder / "ours.tar", pairs, contents),
    }
    return compare(runs, StepClock(CPU), budget_s, len(pairs), "webdataset")


def importing(folder: Path, rows: int, budget_s: float) -> Row:
    """A table of pictures, from nothing to shards."""
    with importers(folder, rows) as runs:
        return compare(runs, StepClock(CPU), budget_s, rows, "bare loop")


def identity(work: Any) -> Any:
    """There is nothing to prepare that is not timed."""
    return work


def over(numerator: Times, denominator: Times) -> Row:
    """Ratios of times of the same round."""
    found = zip(numerator.device, denominator.device, strict=True)
    return Spread.of([above / below for above, below in found])._asdict()


def processor() -> str:
    """As the machine calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, 'unknown')}, {os.cpu_count()} cores"


def without_rates(result: Row) -> Row:
    """What may be kept of a CPU's figures."""
    tables = {"reading", "workers", "resuming", "writing", "importing"}
    kept: Row = {
        table: {
            name: {key: value for key, value in row.items() if key in ("speed", "of_start")}
            for name, row in result[table].items()
        }
        for table in tables
    }
    return result | kept  # and the seconds of resuming at default sizes


def show(result: Row, console: Console) -> None:
    table = Table(title=f"Data path on {result['processor']}")
    for heading in ("", "median [20 %, 80 %]", "ratio"):
        table.add_column(heading)
    for part, unit, against in (
        ("reading", "pairs a second of processor time", f"over the {PLAIN}"),
        ("workers", "pairs a second of wall time", f"over the {PLAIN}"),
        ("writing", "pairs a second of processor time", "over webdataset"),
        ("importing", "pairs a second of processor time", "over a bare loop"),
    ):
        table.add_section()
        table.add_row(part, unit, against)
        for name, row in result[part].items():
            table.add_row(f"  {name}", text(row["pairs_per_s"], ".0f"), text(row["speed"]))
    table.add_section()
    table.add_row("resuming", "seconds", "over the start")
    for step, row in result["resuming"].items():
        table.add_row(f"  at step {int(step):,}", text(row["seconds"]), text(row["of_start"]))
    table.add_section()
    table.add_row("resuming, default sizes", "seconds", "over the start")
    for step, row in result["resuming_default_sizes"].items():
        table.add_row(f"  at step {int(step):,}", text(row["seconds"]), text(row["of_start"]))
    console.print(table)


def text(spread: Row, form: str = ".2f") -> str:
    return f"{spread['median']:{form}} [{spread['p20']:{form}}, {spread['p80']:{form}}]"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=500, help="in a shard")
    parser.add_argument("--seconds", type=float, default=15, help="for each of the six parts")
    parser.add_argument(
        "--full-pairs",
        type=int,
        default=FULL_PAIRS,
        help=f"in each of the {FULL_SHARDS} shards of default size: 64 KiB a pair, on a disk",
    )
    parser.add_argument("--import-pairs", type=int, default=64, help="in the table of pictures")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=RESULTS / "data_cpu.json")
    options = parser.parse_args(arguments)
    if options.shards % 2 or options.shards < 2 or options.pairs < BATCH:
        parser.error(f"--shards must be even, for the lanes, and --pairs at least {BATCH}")
    result = run(options)
    show(result, Console(width=None if sys.stdout.isatty() else 110))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = without_rates(result)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{options.out} and {draw(kept, options.out.with_suffix('.png'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
