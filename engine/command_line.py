"""The console script ``cdpo``: the verbs on one process, and the tools.

cdpo prepare|train|compare --recipe R   as `python engine/train.py --recipe R`
cdpo rounds --recipe R                  the three again and again, on what the tuned model draws
cdpo new NAME MINE.yaml                 a copy of a shipped recipe, to start from
cdpo demo [dotted.key=value ...]        the three in turn on the small world that comes along
cdpo shards check|show|merge ...        looking after sets of shards
cdpo cache fill --recipe R              what frozen networks say of a run's pairs, ahead of it

Several ranks are started by a launcher: `deepspeed engine/train.py --recipe R`.
"""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from contextlib import suppress

from .basics.errors import EXIT_OK, EXIT_OUTSIDE, EXIT_USAGE, CdpoError
from .basics.shipped import shipped

VERBS, ROUNDS = ("prepare", "train", "compare"), "rounds"


def main() -> None:
    """What ``cdpo`` on a command line runs; leaves with the exit code that errors.py lists."""
    command, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "shards":
        from .preparing.shard_tools.command import main as shards

        sys.exit(shards(rest))
    if command == "new":
        sys.exit(_new(rest))
    if command == "cache" and rest[:1] == ["fill"]:
        command, rest = "cache fill", rest[1:]
    if command in (*VERBS, ROUNDS, "cache fill"):
        from .ranks import run_verb

        name = command.partition(" ")[0]
        verb = importlib.import_module(f"{__package__}.{name}")
        sys.argv = [f"cdpo {command}", *rest]
        run_verb(name, verb.main, getattr(verb, "dry_run", None))
        return
    if command == "demo":
        sys.exit(demo(rest))
    asked = command in ("-h", "--help")
    print((__doc__ or "").strip(), file=sys.stdout if asked else sys.stderr)
    sys.exit(EXIT_OK if asked else EXIT_USAGE)


def _new(arguments: list[str]) -> int:
    from .display.terminal import Terminal
    from .recipe.copies import copy_recipe, recipe_names

    terminal = Terminal()
    if len(arguments) != 2 or arguments[0].startswith("-"):
        terminal.line(f"usage: cdpo new NAME MINE.yaml, where NAME is {', '.join(recipe_names())}")
        return EXIT_OK if arguments[:1] in (["-h"], ["--help"]) else EXIT_USAGE
    try:
        copy_recipe(*arguments)
    except CdpoError as error:
        terminal.error(str(error))
        return error.exit_code
    terminal.line(f"{arguments[1]} is yours: its first lines are the commands that run it")
    return EXIT_OK


def demo(overrides: list[str]) -> int:
    """Prepare, train and compare the small world below ./runs, each verb a process of its own; the
    exit code of the first that fails.
    """
    recipe = shipped("recipes") / "emoji_cdpo.yaml"
    for needed in (recipe, shipped("ds_configs"), shipped("assets/emoji")):
        if not needed.exists():
            print(f"error: the demo lacks {needed}: install cdpo anew", file=sys.stderr)
            return EXIT_OUTSIDE
    for verb in VERBS:
        command = [sys.executable, "-m", f"{__package__}.{verb}", "--recipe", str(recipe)]
        running = subprocess.Popen([*command, *overrides])
        # A cluster's wish to stop may reach this process alone; the verb saves and gives the code.
        signal.signal(signal.SIGTERM, lambda *_, verb=running: verb.terminate())
        while running.poll() is None:
            with suppress(KeyboardInterrupt):  # which the verb has too, and answers in its own way
                running.wait()
        if running.returncode:
            return running.returncode
    return EXIT_OK
