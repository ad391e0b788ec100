"""The schema of a recipe as dotted keys: which there are, and which key a place or a slip means."""

from __future__ import annotations

import difflib
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from .schema import Recipe


def sections_of(info: FieldInfo) -> list[type[BaseModel]]:
    """The section classes behind a field: one of ``Model`` or ``Reward | None``, several where a
    ``type`` or the form of the value chooses, none of a knob that is never a section.
    """
    return [kind for kind in _alternatives(info.annotation) if issubclass(kind, BaseModel)]


def sections_listed(info: FieldInfo) -> list[type[BaseModel]]:
    """The section classes that a field is a list of: `tuple[Part, ...]`."""
    listed = info.annotation if get_origin(info.annotation) is tuple else None
    kinds = [kind for item in get_args(listed) for kind in _alternatives(item)]
    return [kind for kind in kinds if issubclass(kind, BaseModel)]


def is_knob(info: FieldInfo) -> bool:
    """Whether a field takes a value, or, as `prompts.train`, either a value or a section."""
    return not sections_of(info) or str in _alternatives(info.annotation)


def _alternatives(annotation: Any) -> list[type]:
    """The classes among which an annotation leaves the choice."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [kind for inner in get_args(annotation) for kind in _alternatives(inner)]
    return [annotation] if isinstance(annotation, type) else []


def _walk_schema(
    section: type[BaseModel], prefix: str = "", *, default_types: bool = False
) -> dict[str, FieldInfo]:
    """Dotted keys; with ``default_types`` those alone that go with the default of each ``type``,
    and none below a knob.

    Keys inside a list of sections have ``[]`` after the list's name, whatever the place in it.
    """
    found: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        found.setdefault(prefix + name, info)
        inners = sections_of(info)
        if default_types:
            inners = [] if is_knob(info) else inners[:1]
        for inner in inners:
            inside = _walk_schema(inner, f"{prefix}{name}.", default_types=default_types)
            found |= {key: info for key, info in inside.items() if key not in found}
        for inner in sections_listed(info) if not default_types else ():
            inside = _walk_schema(inner, f"{prefix}{name}[].")
            found |= {key: info for key, info in inside.items() if key not in found}
    return found


SCHEMA = _walk_schema(Recipe)  # sections and knobs, in the order of declaration
KNOBS = tuple(
    key for key, info in _walk_schema(Recipe, default_types=True).items() if is_knob(info)
)


def nearest_key(key: str) -> str:
    """The second half of "unknown key": the valid key that was probably meant."""
    parent, _, leaf = anywhere(key).rpartition(".")
    leaf_of = {name: name.rpartition(".")[2] for name in SCHEMA}
    outside = [name for name in SCHEMA if "[]" not in name]
    here = {leaf_of[name]: name for name in SCHEMA if name.rpartition(".")[0] == parent}
    likely = [here[close] for close in difflib.get_close_matches(leaf, here, n=1, cutoff=0.65)]
    if not likely:  # the right name in the wrong section
        likely = [name for name in outside if leaf_of[name] == leaf]
    if not likely and not here:
        likely = difflib.get_close_matches(key, outside, n=1, cutoff=0.6)
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    return f"valid keys: {', '.join(here.values() or Recipe.model_fields)}"


def dotted(location: tuple[int | str, ...]) -> str:
    """The key of pydantic's location, which names as well what was chosen behind a section: its
    ``type``, or the form that a value has.
    """
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif part not in types_of(key) and part not in _forms_of(key):
            key += f".{part}" if key else part
    return key


def types_of(key: str) -> list[str]:
    """The values of ``type`` at a section that has several schemas, none for any other key."""
    listed = key.endswith("]")
    info = SCHEMA.get(anywhere(key.rpartition("[")[0] if listed else key))
    if info is None:
        return []
    sections = sections_listed(info) if listed else sections_of(info)
    if len(sections) < 2 or not all("type" in section.model_fields for section in sections):
        return []
    return [section.model_fields["type"].default for section in sections]


def _forms_of(key: str) -> list[str]:
    """The forms among which the value at a key chooses by what it looks like."""
    return _tags(SCHEMA[key].annotation) if key in SCHEMA else []


def _tags(annotation: Any) -> list[str]:
    own = [note.tag for note in getattr(annotation, "__metadata__", ()) if isinstance(note, Tag)]
    return own + [tag for inner in get_args(annotation) for tag in _tags(inner)]


def anywhere(key: str) -> str:
    """A key as the schema has it, whatever the place in a list: ``rewards[1]`` is ``rewards[]``."""
    return re.sub(r"\[\d+\]", "[]", key)
