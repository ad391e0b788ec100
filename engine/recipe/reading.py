"""Recipe files, read and overridden.

The schema is :mod:`.schema`. Whatever is wrong with a file and its overrides is said at once, one
line each, in a single :class:`RecipeError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ..basics.errors import RecipeError, redact, told_by
from ..basics.files import LFS_REMEDY, lfs_pointer
from ..basics.shipped import locate
from .keys import SCHEMA, anywhere, dotted, is_knob, nearest_key, types_of
from .schema import Recipe
from .yaml_subset import Source, shown

MAX_BYTES = 1 << 18  # a recipe is some 10 KB; PyYAML takes seconds for a megabyte
KINDS = {  # of pydantic's types those that do not tell by their names
    "missing": "missing",
    "union_tag_not_found": "missing",
    "extra_forbidden": "unknown",
    "literal_error": "unknown",
    "union_tag_invalid": "unknown",
    "targets": "unknown",
    "value_error": "contradiction",
    "finite_number": "non-finite",
    "entries": "wrong-type",
    "string_pattern_mismatch": "wrong-type",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``dotted.key=value`` overrides and check the whole.

    Raises:
        RecipeError: with all problems, each naming its place, dotted key, value and remedy.
    """
    source = Source(str(path))
    values = _apply_overrides(_read_file(Path(locate(str(path))), source), overrides, source)
    if _refuse_secrets(values, source):
        raise source.error()
    recipe = _validate(values, source)
    if recipe is None or source.problems:
        raise source.error()
    return recipe


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
            kind = "wrong-type" if path.exists() else "missing"
            raise RecipeError(f"{name} {what}{hint}", str(path), kind)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            size = f"larger than {MAX_BYTES >> 10} KiB"
            raise RecipeError(f"{name} is {size}: not a recipe", str(path), "too-large")
        if lfs_pointer(raw):
            raise RecipeError(f"{name} {LFS_REMEDY}", str(path), "unreadable")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = told_by(error) if isinstance(error, OSError) else "its name or text is not UTF-8"
        raise RecipeError(f"{name} cannot be read: {reason}", str(path), "unreadable") from None
    values = source.read(text)
    if source.problems and values is None:  # not YAML: nothing further could be said
        raise source.error()
    if not isinstance(values, dict):
        what = {type(None): "is empty", list: "is a list"}.get(type(values), "is one value")
        kind = "empty" if values is None else "wrong-type"
        right = "it should be keys and values: run_dir: runs/mine"
        raise RecipeError(f"{name} {what}; {right}", str(path), kind)
    return values


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], source: Source
) -> dict[str, Any]:
    for text in overrides:
        key, equals, raw = text.partition("=")
        wrong = None
        if not equals:
            wrong = "unreadable", "write it as dotted.key=value, e.g. train.steps=200"
        elif "[]" in key:
            wrong = "unsupported", "what is inside a list is written in the file"
        elif key not in SCHEMA:
            wrong = "unknown", f"unknown key; {nearest_key(key)}"
        if wrong:
            source.problems.append((key, wrong[0], f"override {text!r}: {wrong[1]}"))
        else:
            source.overrides[key] = text
            value = source.read(raw, key)
            if isinstance(value, dict) and not is_knob(SCHEMA[key]):
                remedy = "set the keys of a section one by one, e.g. train.steps=200"
                source.fail(key, "wrong-type", remedy)
            else:
                _assign(values, key, value)
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, in sections made where there are none, or a text such as a file of prompts.

    Anything else in a section's place stays as it is, and is refused with the rest.
    """
    *sections, last = key.split(".")
    for name in sections:
        if values.get(name) is None or isinstance(values[name], str):
            values[name] = {}
        if not isinstance(values[name], dict):
            return
        values = values[name]
    values[last] = value


_URL = re.compile(r"\s*[\w+.:-]+://")
WITHOUT_SECRETS = (
    "without user, password, token or query string, please, which would end up in the run folder; "
    "credentials come from the environment (HF_TOKEN, AWS_*) or ~/.netrc"
)


def _refuse_secrets(value: Any, source: Source, key: str = "") -> bool:
    """Whether some text of the recipe holds a secret, which is noted as a problem there; prose that
    mentions a URL is no matter.
    """
    if isinstance(value, dict):
        inner = [*value.items(), *((name, name) for name in value)]
        places = [(f"{key}.{name}" if key else name, item) for name, item in inner]
    elif isinstance(value, list):
        places = [(f"{key}[{number}]", item) for number, item in enumerate(value)]
    else:
        is_name = isinstance(value, str) and (_URL.match(value) or len(value.split()) == 1)
        if not is_name or redact(value) == value:
            return False
        source.fail(key, "secret", f"{shown(value)}: {WITHOUT_SECRETS}")
        return True
    found = [_refuse_secrets(item, source, place) for place, item in places]  # all of them
    return any(found)


def _validate(values: dict[str, Any], source: Source) -> Recipe | None:
    try:
        # Strict: true is not 1 and "200" is not 200, so that a slip in a file is not guessed away.
        return Recipe.model_validate(_with_tuples(values), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = dotted(detail["loc"])
            if detail["type"].startswith("union_tag"):
                key += ".type"
            source.fail(key, _kind(key, detail["type"]), _wording(key, detail))
        return None


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _kind(key: str, pydantic: str) -> str:
    """Pydantic's type of an error in the words of :class:`CdpoError`."""
    if pydantic == "extra_forbidden" and anywhere(key) in SCHEMA:
        return "contradiction"
    if pydantic in KINDS:
        return KINDS[pydantic]
    return "wrong-type" if pydantic.endswith("_type") else "out-of-range"


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
