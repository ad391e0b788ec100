"""The command line ``cdpo shards``.

    cdpo shards check runs/mine/shards
    cdpo shards show runs/mine/shards --sheet sheet.png
    cdpo shards merge runs/a/shards runs/b/shards --into sets/both

It leaves with 0, or with the exit code of what is wrong: 2 usage, 3 data, 6 a model folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ...basics.errors import EXIT_DATA, EXIT_OK, CdpoError
from ...display.terminal import Terminal
from ...shards.manifest import load_manifest
from .check import PROBLEMS_PER_SHARD, WORKERS, check_set
from .merge import merge_sets, partial_folder
from .show import PAIRS_PER_TIER, show, survey


def main(arguments: Sequence[str]) -> int:
    """Run one sub-command and return its exit code. Usage errors leave by argparse, with 2."""
    parser = argparse.ArgumentParser(
        prog="cdpo shards", description="Look after a set of shards.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_check(commands)
    _add_show(commands)
    _add_merge(commands)
    options = parser.parse_args(list(arguments))
    terminal = Terminal()
    try:
        return int(options.run(options, terminal))
    except CdpoError as error:
        terminal.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "check",
        help="read every sample: checksums, members, shapes, NaN",
        description="Read every sample of a set as training would, and list all that is wrong. "
        "Leaves with 3 if anything is.",
        allow_abbrev=False,
    )
    command.add_argument("path", help="the folder with manifest.json")
    command.add_argument(
        "--workers", type=_positive, default=WORKERS, help="shards read at a time (%(default)s)"
    )
    command.set_defaults(run=_check)


def _check(options: argparse.Namespace, terminal: Terminal) -> int:
    manifest = load_manifest(options.path)
    with terminal.progress("check", manifest.num_pairs, unit="pairs") as progress:
        report = check_set(
            options.path, manifest, workers=options.workers, on_shard=progress.advance
        )
    for name in report.strays:
        terminal.warn(
            f"{os.path.join(options.path, name)} is not in the manifest; nothing reads it"
        )
    for problem in report.problems:
        terminal.error(problem)
    hidden = report.num_problems - len(report.problems)
    if hidden:
        terminal.error(f"and {hidden} more (at most {PROBLEMS_PER_SHARD} of a shard are shown)")
    of = f"{manifest.num_pairs} pairs in {len(manifest.shards)} shards"
    if report.is_sound:
        terminal.line(f"sound: {of}, {manifest.tiers} tiers, {manifest.lanes} lanes")
        return EXIT_OK
    terminal.error(f"{report.num_problems} problems; {report.num_pairs} of {of} can be read")
    return EXIT_DATA


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "show",
        help="counts by tier, histograms of scores and gaps, pictures",
        description="Show what a set holds.",
        allow_abbrev=False,
    )
    command.add_argument("path", help="the folder with manifest.json")
    command.add_argument(
        "--pairs",
        type=_positive,
        default=PAIRS_PER_TIER,
        help="pairs of each tier that are read for the histograms (%(default)s)",
    )
    command.add_argument(
        "--sheet", metavar="PNG", help="draw pairs of each tier; needs the VAE of the set"
    )
    command.add_argument(
        "--prompts", type=_positive, default=8, help="prompts on the sheet (%(default)s)"
    )
    command.set_defaults(run=_show)


def _show(options: argparse.Namespace, terminal: Terminal) -> int:
    manifest = load_manifest(options.path)
    tiers = survey(options.path, manifest, options.pairs)
    unicode = (sys.stdout.encoding or "ascii").lower().startswith("utf")
    show(options.path, manifest, tiers, terminal, unicode=unicode)
    if options.sheet:
        for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(library, "error")  # read when they are imported
        from .sheet import draw_sheet  # a VAE is needed for pictures only, and takes seconds

        draw_sheet(options.path, manifest, options.sheet, options.prompts)
        terminal.line(f"look at: {options.sheet}")
    return EXIT_OK


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "merge",
        help="one set out of several",
        description="Make one set out of several that were prepared with the same model, VAE, "
        "reward, tiers and lanes, of different prompts or data.",
        allow_abbrev=False,
    )
    command.add_argument("paths", nargs="+", metavar="path", help="folders with manifest.json")
    command.add_argument(
        "--into", required=True, metavar="FOLDER", help="a new folder; it appears when it is whole"
    )
    command.add_argument(
        "--pairs-per-shard",
        type=_positive,
        metavar="N",
        help="at most so many (as many as the largest shard that goes in)",
    )
    command.set_defaults(run=_merge)


def _merge(options: argparse.Namespace, terminal: Terminal) -> int:
    total = sum(load_manifest(path).num_pairs for path in options.paths)
    if (partial := partial_folder(options.into)).exists():
        terminal.warn(f"{partial} was left by a merge that was killed: it is begun anew there")
    with terminal.progress("merge", total, unit="pairs") as progress:
        manifest, is_new = merge_sets(
            options.paths,
            options.into,
            pairs_per_shard=options.pairs_per_shard,
            on_pairs=progress.advance,
        )
        progress.advance(total - progress.done)
    if not is_new:
        terminal.line(f"nothing to do: {options.into} is this merge")
        return EXIT_OK
    left_out = total - manifest.num_pairs
    more = f", {left_out} left out so that all of a tier hold equally many" if left_out else ""
    terminal.line(f"{manifest.num_pairs} pairs in {len(manifest.shards)} shards{more}")
    terminal.line(f"shards: {options.into}")
    return EXIT_OK


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
