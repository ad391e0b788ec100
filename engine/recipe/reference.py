"""The schema in words: what people read of a knob, all of it from where the knob is declared.

python -m cdpo.engine.recipe.reference    writes docs/recipe.md and recipes/schema.json anew
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from ..basics.files import replacing
from ..basics.shipped import shipped
from .keys import SCHEMA, is_knob, sections_listed, sections_of
from .reward import ClipScoreSpec
from .schema import Recipe
from .yaml_subset import dump, shown

INTRODUCTION = """\
# Every key of a recipe

Written by `python -m cdpo.engine.recipe.reference` from the schema in `engine/recipe/`; change it
there. A recipe holds what differs from these defaults, and any key may stand on the command line
instead, as `dotted.key=value`. Editors complete and explain the keys with `recipes/schema.json`.
"""


def for_terminal() -> str:
    """Every knob with its default and what it does: what ``--help`` prints."""
    lines = ["Keys of a recipe, with their defaults:"]
    for key in (key for key, info in SCHEMA.items() if is_knob(info) and "[]" not in key):
        default = SCHEMA[key].get_default()
        text = "(required)" if default is PydanticUndefined else shown(default)
        lines.append(f"\n  {key} = {text}")
        lines += _wrapped(SCHEMA[key], 88, " " * 6)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# A recipe with its comments


def annotated(section: BaseModel, indent: str = "") -> str:
    """Every value of a recipe as YAML, below what it is for; equal recipes give equal text."""
    text = ""
    values = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        text += "" if indent else "\n"
        text += "".join(f"{line}\n" for line in _wrapped(info, 100, f"{indent}# "))
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            text += f"{indent}{name}:\n{annotated(inner, indent + '  ')}"
        else:
            value = textwrap.indent(dump(_plain(values[name])), indent + "  ").lstrip()
            text += f"{indent}{name}: {value}\n"
    return text


def _plain(value: Any) -> Any:
    """8 and 8.0 are equal, and must look so."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole else value


def _wrapped(info: FieldInfo, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        info.description or "",
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


# --------------------------------------------------------------------------------------------------
# For editors


def json_schema() -> dict[str, Any]:
    """The schema as JSON Schema, whose unions an editor resolves by their `type`."""
    schema = Recipe.model_json_schema()
    for name, section in schema["$defs"].items():
        # Pydantic calls optional what has a default; but `type` chooses, and CLIP alone needs none.
        if "const" in section["properties"].get("type", {}) and name != ClipScoreSpec.__name__:
            section["required"] = ["type", *section.get("required", [])]
    cleaned: dict[str, Any] = _cleaned(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | cleaned


def _cleaned(node: Any, names: bool = False) -> Any:
    """Without titles, which repeat keys, and the defaults of sections, which their keys have."""
    if isinstance(node, list):
        return [_cleaned(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {}
    for key, value in node.items():
        if names or key not in ("title", "discriminator", "description", "default"):
            found[key] = _cleaned(value, names=key in ("properties", "$defs") and not names)
        elif key == "description":
            found[key] = " ".join(value.split())
        elif key == "default" and not (isinstance(value, dict) and value):
            found[key] = value
    return found


# --------------------------------------------------------------------------------------------------
# For readers


def markdown() -> str:
    """The page docs/recipe.md: a section of the recipe, a table of its keys."""
    sections = {name: info for name, info in Recipe.model_fields.items() if sections_of(info)}
    alone = [name for name in Recipe.model_fields if name not in sections]
    page = _Page()
    page.table(page.rows(Recipe, only=alone))
    for name, info in sections.items():
        page.lines += ["", f"## {name}", ""]
        kinds = sections_of(info)
        if len(kinds) == 1:
            page.lines += [_one_line(kinds[0].__doc__), ""]
            page.table(page.rows(kinds[0]))
        else:
            page.lines.append(_one_line(info.description))
            page.unions[name] = kinds
        page.alternatives()
    return INTRODUCTION + "\n" + "\n".join(page.lines) + "\n"


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.unions: dict[str, list[type[BaseModel]]] = {}
        self._told: dict[type[BaseModel], str] = {}
        self._schema = json_schema()

    def table(self, rows: Iterator[str]) -> None:
        """Append a table of such rows."""
        self.lines += ["| key | value | default | |", "|---|---|---|---|", *rows]

    def rows(
        self, section: type[BaseModel], prefix: str = "", only: list[str] | None = None
    ) -> Iterator[str]:
        """The rows of a section and of those inside it; which alternatives it has is kept."""
        for name, info in section.model_fields.items():
            if only is not None and name not in only:
                continue
            key, kinds, listed = prefix + name, sections_of(info), sections_listed(info)
            if len(kinds) == 1 and not is_knob(info):
                yield from self.rows(kinds[0], f"{key}.")
                continue
            inside = listed if len(listed) == 1 else kinds if is_knob(info) else []
            if alternatives := [kind for kind in kinds + listed if kind not in inside]:
                told = self._told.get(alternatives[0])
                value = f"as `{told}`" if told else "one of those below"
                value = f"list of: {value}" if listed else value
                self.unions |= {} if told else {key: alternatives}
            else:
                value = self._value(section, name)
            default = _default(info)
            default = "" if default == value else default  # a `type`, which chooses the table
            yield f"| `{key}` | {value} | {default} | {_one_line(info.description)} |"
            for inner in inside:
                yield from self.rows(inner, f"{key}[]." if listed else f"{key}.")

    def alternatives(self) -> None:
        """Append a table for each `type` of what was kept."""
        for key, kinds in self.unions.items():
            self._told |= dict.fromkeys(kinds, key)
            for kind in kinds:
                chosen = kind.model_fields["type"].default
                self.lines += ["", f"### {key}: {chosen}", "", _one_line(kind.__doc__), ""]
                self.table(self.rows(kind))
        self.unions = {}

    def _value(self, section: type[BaseModel], name: str) -> str:
        whole = self._schema if section is Recipe else self._schema["$defs"][section.__name__]
        return _spelled(whole["properties"][name])


def _spelled(schema: dict[str, Any]) -> str:
    """The values that a piece of JSON Schema takes, in words."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_spelled, choices)))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        items = schema.get("prefixItems")
        inner = _spelled(items[0] if items else schema["items"])
        return f"{len(items)} of: {inner}" if items else f"list of: {inner}"
    if schema.get("type") == "object":
        return f"names with: {_spelled(schema['additionalProperties'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    names = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    return " ".join([names.get(schema["type"], schema["type"]), *limits])


def _default(info: FieldInfo) -> str:
    default = info.get_default()
    if default is PydanticUndefined:
        return "required"
    return f"`{dump(_plain(to_jsonable_python(default)))}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Write both files anew."""
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    pages = {shipped("docs") / "recipe.md": markdown(), shipped("recipes") / "schema.json": schema}
    for path, text in pages.items():
        with replacing(path) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
