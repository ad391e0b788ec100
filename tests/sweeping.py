"""A place of a run folder made wrong in each way, and a verb that meets it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from launching import Outcome, World

REFUSING = Path(__file__).parent / "workers" / "refusing.py"


def swap(path: Path) -> None:
    """A file where a folder is, a folder with something in it where a file is."""
    if path.is_dir():
        absent(path)
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
        (path / "in it").touch()


def absent(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    absent(path)
    path.mkdir() if not path.suffix else path.touch()


def torn(path: Path) -> None:
    """The first half of a file, or of the files in a folder."""
    inside = sorted(path.iterdir())[::2] if path.is_dir() else []
    for half in inside:
        absent(half)
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (swap, absent, empty, torn)
}
FAULTS = (*DAMAGES, "EROFS", "EACCES", "ENOSPC")


def like(name: str) -> str:
    """A place by what it is, whatever its number or hash."""
    return re.sub(r"(?<=[-/_])([0-9a-f]{32}|[0-9a-f]{16}|\d+)(?=[-/_.]|$)", "#", name)


def paths(run: Path) -> dict[str, Path]:
    """The places of a run folder; of those that are alike the last, which is the newest."""
    found = {like(str(path.relative_to(run))): path for path in sorted(run.rglob("*"))}
    found = {name: path for name, path in found.items() if not name.startswith("csv/")}
    return {".": run, "csv/train_loss.csv": run / "csv/train_loss.csv", **found}


def sweep(
    world: World,
    finished: Path,
    run: Path,
    place: str,
    fault: str,
    verb: str,
    results: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Outcome:
    """A verb in a copy of a finished run in which one place is wrong.

    Its ``results`` are taken away before, so that it has work to do; none: it finds all done.
    """
    shutil.copytree(finished, run)
    path = paths(run)[place]
    for name in results:
        if os.path.lexists(run / name):
            absent(run / name)
    if results and not os.path.lexists(path):  # it is a result: what is to be written is refused
        path.parent.mkdir(parents=True, exist_ok=True)
    damage = DAMAGES.get(fault)
    if damage and os.path.lexists(path):
        damage(path)
    script, env = verb, {}
    if damage is None:
        script = REFUSING
        env = {"CDPO_VERB": verb, "CDPO_PLACE": str(path), "CDPO_REFUSE": fault}
    asked = [f"run_dir={run}", *options]
    outcome = world.server.run(script, world.recipe, asked, env=env, seconds=400)
    shutil.rmtree(run, ignore_errors=True)
    run.unlink(missing_ok=True)
    return outcome
