"""The command line of the verbs: `--recipe`, overrides, and a help text made from the schema."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..basics.errors import RecipeError
from .identity import refuse_unchangeable
from .of_rounds import check_rounds
from .reading import load_recipe
from .reference import for_terminal
from .schema import Recipe


@dataclass(frozen=True)
class CommandLine:
    """What a verb was asked for."""

    recipe: Recipe
    dry_run: bool
    """Print what the recipe will take, and do nothing."""
    world_size: int | None
    """Ranks of a dry run; None stands for those the launcher started."""
    allow_change: tuple[str, ...] = ()
    """Keys in which the recipe may differ from that of the checkpoint it goes on from."""


def parse_command_line(verb: str, arguments: Sequence[str]) -> CommandLine:
    """The recipe a verb's command line asks for; ``--help`` prints every key and exits.

    Raises:
        RecipeError: for usage errors as well, so that they leave by the verbs' one way out.
    """
    parser = _Parser(prog=f"deepspeed engine/{verb}.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    # Launchers give it, and LOCAL_RANK in the environment, which is what is read.
    parser.add_argument("--local_rank", "--local-rank")
    if verb == "train":
        parser.add_argument("--dry-run", action="store_true")
        parser.add_argument("--world-size", type=int)
        parser.add_argument("--allow-change", action="append", metavar="KEY", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(list(arguments))
    usage = f"deepspeed engine/{verb}.py --recipe RECIPE.yaml [dotted.key=value ...]"
    dry_run, world_size = getattr(options, "dry_run", False), getattr(options, "world_size", None)
    if verb == "train":
        usage += " [--allow-change KEY]... | --dry-run [--world-size RANKS]"
    if options.help:
        print(f"usage: {usage}\n\n{for_terminal()}")
        raise SystemExit(0)
    if options.recipe is None:
        raise RecipeError(f"no recipe given: {usage}", "--recipe", "missing")
    if world_size is not None and (world_size < 1 or not dry_run):
        raise RecipeError(
            f"--world-size {world_size}: it is a number of ranks, 1 or more, for --dry-run; a real "
            "run has the ranks its launcher starts",
            "--world-size",
            "out-of-range" if dry_run else "contradiction",
        )
    allow_change = tuple(dict.fromkeys(getattr(options, "allow_change", ())))
    for key in allow_change:
        refuse_unchangeable(key)
    if dry_run and allow_change:
        raise RecipeError(
            f"--allow-change {allow_change[0]} has no effect on --dry-run, which reads no "
            "checkpoint: leave it away, the new value is planned with as it is",
            "--allow-change",
            "no-effect",
        )
    recipe = load_recipe(options.recipe, options.overrides)
    if verb == "rounds":
        check_rounds(recipe)
    return CommandLine(recipe, dry_run, world_size, allow_change)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        remedy = f"`{self.prog} --help` lists the options and all keys"
        raise RecipeError(f"{message}; {remedy}", kind="unsupported")
