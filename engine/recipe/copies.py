"""Shipped recipes by name, and copies of them to start one's own from."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..basics.errors import RecipeError
from ..basics.files import replacing
from ..basics.shipped import shipped
from .yaml_subset import dump

FILE = re.compile(r"(?<=[ \[])(recipes|assets|ds_configs)(/[\w./-]+)")


def recipe_names() -> list[str]:
    """What :func:`copy_recipe` takes."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def copy_recipe(name: str, path: str | Path) -> None:
    """Write a shipped recipe to a new file ``path``, ready to run from the current folder.

    Its commands name the new file, its run folder is one of its own, editors find the schema, and
    files that come with cdpo are named where they lie if they are not below the current folder.

    Raises:
        RecipeError: when there is no such recipe, or already such a file.
    """
    path = Path(path)
    if name not in recipe_names():
        there = ", ".join(recipe_names())
        raise RecipeError(f"no recipe is called {name!r}; there are {there}", name, "unknown")
    if path.exists():
        raise RecipeError(f"{path} is already there: give another name", str(path), "in-use")
    text = (shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace("$schema=schema.json", f"$schema={_schema()}", 1)
    text = text.replace(f"recipes/{name}.yaml", shlex.quote(str(path)))
    run_dir = dump(_run_dir(path).as_posix())
    text = re.sub(r"^run_dir: .*$", lambda _: f"run_dir: {run_dir}", text, count=1, flags=re.M)
    text = re.sub(r"^[^#\n]*", lambda values: FILE.sub(_found, values[0]), text, flags=re.M)
    with replacing(path, error=RecipeError) as file:
        file.write(text.encode())


def _schema() -> str:
    return (shipped("recipes") / "schema.json").as_uri()


def _run_dir(path: Path) -> Path:
    """``runs/a/b`` for ``a/b.yaml``, so that no two copies share one."""
    whole = path.resolve().with_suffix("")
    here = Path.cwd().resolve()
    return Path("runs") / whole.relative_to(here if whole.is_relative_to(here) else whole.anchor)


def _found(named: re.Match[str]) -> str:
    file = shipped(named[1]) / named[2][1:]
    return dump(str(file)) if file.exists() and not Path(named[0]).exists() else named[0]
