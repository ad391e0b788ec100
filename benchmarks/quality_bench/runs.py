"""Running the verbs of the quality benchmark: in order within a group, groups side by side.

Every verb resumes by itself, so a benchmark that was stopped goes on when it is started again.
Each is a forked child of a process that has imported the engine and computed nothing: a verb of a
minute should not spend ten seconds of it importing.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from quality_bench.plan import ROOT, Changes, Group, Scale, recipe_of


class VerbFailedError(RuntimeError):
    """A verb left with an exit code other than 0."""


def import_the_engine() -> None:
    """What all verbs import; libraries stay quiet, as under the entry scripts."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import cdpo.engine.comparing.comparison
    import cdpo.engine.preparing.preparation
    import cdpo.engine.training.trainer  # noqa: F401


def run_group(group: Group, work: Path, scale: Scale) -> Path:
    """Prepare, train every method, compare; returns the comparison's results.json."""
    folder = group.folder(work)
    shards = {"data.path": str(folder / "prepared" / "shards")}
    share(group.candidates(work, scale), folder / "prepared" / "candidates")
    verb("prepare", folder / "prepared", recipe_of(group, scale, {}))
    for method, changes in group.methods.items():
        run = folder / run_name(method)
        verb("train", run, recipe_of(group, scale, shards | changes))
    runs: Changes = {name: str(folder / run_name(name)) for name in group.methods}
    share(group.base_images(work), folder / "comparison" / "compare" / "base")
    verb("compare", folder / "comparison", recipe_of(group, scale, {"compare.runs": runs}))
    return results_path(group, work)


def results_path(group: Group, work: Path) -> Path:
    """Where a finished group's numbers lie."""
    return group.folder(work) / "comparison" / "compare" / "results.json"


def run_name(method: str) -> str:
    """A folder's name for a method."""
    return method.replace(" ", "_")


def share(common: Path, link: Path) -> None:
    """Images that several groups need are drawn once: every one of them knows what made it."""
    common.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(common.resolve(), target_is_directory=True)


def verb(verb: str, run_dir: Path, recipe: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    asked = run_dir / f"{verb}.yaml"
    asked.write_text(yaml.safe_dump(recipe | {"run_dir": str(run_dir)}, sort_keys=False))
    log = run_dir / f"{verb}.log"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_become(verb, asked, log))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise VerbFailedError(f"{verb} {run_dir} left with {code}: {last} (see {log})")
    seconds = time.monotonic() - start
    print(f"{seconds:6.0f} s  {verb:8} {run_dir.parent.name}/{run_dir.name}", flush=True)


def _become(verb: str, recipe: Path, log: Path) -> int:
    """Run an entry script in this process, which is a fork; returns its exit code."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    script = ROOT / "engine" / f"{verb}.py"
    sys.argv = [str(script), "--recipe", str(recipe.resolve())]
    code = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    return code
