"""Recipe files: reading, overriding, saving and comparing them, and the command line of the verbs.

The schema is :mod:`cdpo.engine.recipe`. Whatever is wrong with a file and its overrides is said
at once, one line each, in a single :class:`RecipeError`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from .basics.errors import RecipeError
from .recipe import Recipe
from .recipe_schema import KNOBS, SCHEMA, anywhere, dotted, is_knob, nearest_key, types_of
from .recipe_yaml import Source, dump, shown

MAX_BYTES = 1 << 18  # a recipe is some 10 KB; PyYAML takes seconds for a megabyte

# What a checkpoint may be resumed under: the keys that decide what a run computes. Left out are
# those that only move, watch or speed it up, and train.steps, so that a run can be extended.
IDENTITY = re.compile(
    r"seed|data\.(lanes|shuffle_shards|posterior)|(model|curriculum|objective|adapter|train\.optimizer)\..+"
    r"|train\.(global_batch|warmup_steps|gradient_clip|precision|caption_dropout)"
)


RESOLVED_HEADER = """\
# The recipe of this run as it was resolved: file, overrides and defaults in one. It is a record; to
# repeat the run elsewhere give it to --recipe with another run_dir.
"""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``dotted.key=value`` overrides and check the whole.

    Raises:
        RecipeError: with all problems, each naming its place, dotted key, value and remedy.
    """
    source = Source(str(path))
    values = _apply_overrides(_read_file(Path(path), source), overrides, source)
    recipe = _validate(values, source)
    if recipe is None or source.problems:
        raise RecipeError("\n".join(source.problems))
    return recipe


def save_resolved(recipe: Recipe, path: str | Path) -> None:
    """Write every knob of ``recipe`` as YAML, atomically; read back, it is the same recipe."""
    path = Path(path)
    text = RESOLVED_HEADER + dump(recipe.model_dump(mode="json"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.name + ".", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from None


def training_identity(recipe: Recipe) -> dict[str, object]:
    """The dotted keys, and their values, that a resumed run must share with its checkpoint."""
    found: dict[str, object] = {}
    for key in filter(IDENTITY.fullmatch, KNOBS):
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over :func:`training_identity`; equal recipes have equal hashes."""
    identity = training_identity(recipe)
    for key, value in identity.items():  # 8 and 8.0 are equal, but not in JSON
        if isinstance(value, float) and value.is_integer():
            identity[key] = int(value)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def diff_identity(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """What differs, as lines like ``objective.beta: checkpoint 5000.0, recipe 2000.0``.

    A knob that is younger than the checkpoint counts as its default there: defaults of new knobs
    are what was done before.
    """
    absent = object()

    def value_of(identity: Mapping[str, object], key: str) -> object:
        default = SCHEMA[key].get_default() if key in SCHEMA else PydanticUndefined
        return identity.get(key, absent if default is PydanticUndefined else default)

    def show(value: object) -> str:
        return "not set" if value is absent else shown(value)

    pairs = {key: (value_of(old, key), value_of(new, key)) for key in (*new, *old)}
    return [
        f"{key}: checkpoint {show(before)}, recipe {show(now)}"
        for key, (before, now) in pairs.items()
        if before != now
    ]


@dataclass(frozen=True)
class CommandLine:
    """What a verb was asked for."""

    recipe: Recipe
    dry_run: bool
    """Print what the recipe will take, and do nothing."""
    world_size: int | None
    """Ranks of a dry run; None stands for those the launcher started."""


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
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(list(arguments))
    usage = f"deepspeed engine/{verb}.py --recipe RECIPE.yaml [dotted.key=value ...]"
    dry_run, world_size = getattr(options, "dry_run", False), getattr(options, "world_size", None)
    if verb == "train":
        usage += " [--dry-run [--world-size RANKS]]"
    if options.help:
        print(f"usage: {usage}\n\n{describe_schema()}")
        raise SystemExit(0)
    if options.recipe is None:
        raise RecipeError(f"no recipe given: {usage}")
    if world_size is not None and (world_size < 1 or not dry_run):
        raise RecipeError(
            f"--world-size {world_size}: it is a number of ranks, 1 or more, for --dry-run; a real "
            "run has the ranks its launcher starts"
        )
    return CommandLine(load_recipe(options.recipe, options.overrides), dry_run, world_size)


def describe_schema() -> str:
    """Every knob with its default and what it does, as text for a terminal."""
    lines = ["Keys of a recipe, with their defaults:"]
    for key in (key for key, info in SCHEMA.items() if is_knob(info) and "[]" not in key):
        default = SCHEMA[key].get_default()
        text = "(required)" if default is PydanticUndefined else shown(default)
        lines.append(f"\n  {key} = {text}")
        lines += textwrap.wrap(
            SCHEMA[key].description or "", 88, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; `{self.prog} --help` lists the options and all keys")


# --------------------------------------------------------------------------------------------------
# From file and overrides to a recipe


def _read_file(path: Path, source: Source) -> dict[str, Any]:
    name = f"recipe {str(path)!r}"
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            folders = (path.parent, Path("recipes"))
            others = sorted({str(p) for f in folders for p in f.glob("[!.]*.yaml")})[:8]
            hint = f"; there are {', '.join(others)}" if others else ""
            raise RecipeError(f"{name} {what}{hint}")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{name} is larger than {MAX_BYTES >> 10} KiB: not a recipe")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name or text is not UTF-8"
        raise RecipeError(f"{name} cannot be read: {reason}") from None
    values = source.read(text)
    if source.problems and values is None:  # not YAML: nothing further could be said
        raise RecipeError("\n".join(source.problems))
    if not isinstance(values, dict):
        kind = {type(None): "is empty", list: "is a list"}.get(type(values), "is one value")
        raise RecipeError(f"{name} {kind}; it should be keys and values: run_dir: runs/mine")
    return values


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], source: Source
) -> dict[str, Any]:
    config = OmegaConf.create(values)
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            source.problems.append(
                f"override {text!r}: write it as dotted.key=value, e.g. train.steps=200"
            )
        elif "[]" in key:
            source.problems.append(
                f"override {text!r}: what is inside a list is written in the file"
            )
        elif key not in SCHEMA:
            source.problems.append(f"override {text!r}: unknown key; {nearest_key(key)}")
        else:
            source.overrides[key] = text
            value = source.read(raw, key)
            if isinstance(value, dict) and not is_knob(SCHEMA[key]):
                source.fail(key, "set the keys of a section one by one, e.g. train.steps=200")
                continue
            try:
                OmegaConf.update(config, key, value, merge=False)
            except OmegaConfBaseException as error:
                source.fail(key, str(error).splitlines()[0])
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _validate(values: dict[str, Any], source: Source) -> Recipe | None:
    try:
        # Strict: true is not 1 and "200" is not 200, so that a slip in a file is not guessed away.
        return Recipe.model_validate(_with_tuples(values), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = dotted(detail["loc"])
            if detail["type"].startswith("union_tag"):
                key += ".type"
            source.fail(key, _wording(key, detail))
        return None


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _wording(key: str, detail: ErrorDetails) -> str:
    """One problem in words: the value seen and what would be right."""
    kind, seen = detail["type"], detail["input"]
    known = SCHEMA.get(anywhere(key))
    if kind == "extra_forbidden" and known is not None:
        return f"{shown(seen)} has no place here: the key goes with another type of its section"
    if kind == "extra_forbidden":
        return f"unknown key; {nearest_key(key)}"
    if kind.startswith("union_tag"):
        types = types_of(key.removesuffix(".type"))
        given = shown(detail["ctx"]["tag"]) if "tag" in detail.get("ctx", {}) else "missing;"
        return f"{given} should be {', '.join(types[:-1])} or {types[-1]}"
    if kind == "missing":
        what = known.description if known is not None else None
        return f"missing{': ' + ' '.join(what.split()) if what else ''}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    right = detail["msg"].replace("Input should", "should")
    if kind in ("model_type", "model_attributes_type"):
        right = "should be a section, with keys of its own below it"
    elif kind == "int_type" and isinstance(seen, float) and seen.is_integer():
        right += f", such as {int(seen)}" if abs(seen) < 1e15 else ""
    elif kind == "string_type" and isinstance(seen, int | float):
        right += ": put it in quotes"
    return f"{shown(seen)} {right}" if right.startswith("should") else f"{shown(seen)}: {right}"
