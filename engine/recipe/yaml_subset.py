"""The part of YAML a recipe is written in: safe to read, and with a place for every key.

Recipes are untrusted input. Tags, anchors and aliases are not taken (430 bytes of aliases expand to
10^9 values), nesting is bounded, duplicate keys are errors, and scalars are those of YAML 1.2:
``1e-4`` is a number and ``no`` is text, where PyYAML reads a string and ``False``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..basics.errors import RecipeError, redact, told_by

MAX_DEPTH = 16  # the schema nests four deep; the bound keeps hostile files off Python's stack


class _NotTakenError(yaml.MarkedYAMLError):
    pass


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and without tags, aliases and deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (emptied: those of YAML 1.1 must not stay)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse a node by its event, before anything below it has been read."""
        event = self.peek_event()
        refused = None
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refused = "anchors and aliases are not taken"
        elif getattr(event, "tag", None) is not None:
            refused = f"the tag {event.tag} is not taken"
        elif self.depth >= MAX_DEPTH:
            refused = "nested too deep"
        if refused:
            raise _NotTakenError(problem=refused, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or :class:`Loader` would not read as text."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def compose(text: str) -> yaml.Node | None:
    """The node tree of one YAML document; raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def dump(value: Any) -> str:
    """YAML that :class:`Source` reads back equal, in one line unless a text has several."""
    text = yaml.dump(
        value,
        Dumper=Dumper,
        sort_keys=False,
        # Escapes for all but ASCII: PyYAML writes U+0085 as it is and reads it as a line break.
        allow_unicode=False,
        default_flow_style=True,
        width=float("inf"),
    )
    return text.removesuffix("...\n").removesuffix("\n")


@dataclass
class Source:
    """A recipe file and its overrides: where each key is, and what is wrong with it so far."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, which is the file's name for what concerns the whole, kind and message of each."""
    failed: set[str] = field(default_factory=set)

    def fail(self, key: str, kind: str, message: str) -> None:
        """Note a problem; of several with one key only the first is worth reading."""
        if key and key in self.failed:
            return
        self.failed.add(key)
        name = key if key.isprintable() and len(key) < 100 else shown(key)
        text = f"{self._place(key)}: {name + ': ' if key else ''}{message}"
        self.problems.append((key or self.file, kind, text))

    def error(self) -> RecipeError:
        """All problems in one error, a line each."""
        key, kind, _ = self.problems[0]
        error = RecipeError([message for _, _, message in self.problems], key, kind)
        error.problems = tuple(self.problems)
        return error

    def _place(self, key: str) -> str:
        """``recipe.yaml:12`` or ``override 'a.b=c'``: where a key, or the section above it, is."""
        while key:
            if key in self.overrides:
                return f"override {self.overrides[key]!r}"
            if key in self.lines:
                return f"{self.file}:{self.lines[key]}"
            key = key.rpartition("[" if key.endswith("]") else ".")[0]
        return self.file

    def read(self, text: str, key: str = "") -> Any:
        """The dicts, lists and scalars of a YAML text that was found at ``key``."""
        try:
            node = compose(text)
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # chr() of a \U escape too big
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and not key else ""
            reason = getattr(error, "problem", None) or getattr(error, "reason", None)
            kind = "unsupported" if isinstance(error, _NotTakenError) else "damaged"
            self.fail(
                key, kind, f"{line}not YAML that can be read here: {reason or told_by(error)}"
            )
            return None
        return None if node is None else self._plain(node, key)

    def _plain(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail(key, "wrong-type", f"line {line}: a key must be a word")
                continue
            name = key_node.value
            inner = f"{key}.{name}" if key else name
            if "." in name:
                remedy = "dots are for the command line, in a file put the key below its section"
                text = f"{self.file}:{line}: {shown(name)}: {remedy}"
                self.problems.append((inner, "unsupported", text))
                continue
            if name in mapping:
                twice = f"given again on line {line}: keep one of the two"
                self.fail(inner, "duplicate", twice)
                continue
            self.lines.setdefault(inner, line)
            mapping[name] = self._plain(value_node, inner)
        return mapping

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        text = node.value
        # Who writes ${HOME} expects what other tools do, not a folder of that name.
        if "${" in text:
            remedy = f"{shown(text)}: ${{...}} is not expanded in recipes, write it out"
            self.fail(key, "unsupported", remedy)
            return None
        kind = node.tag.rpartition(":")[2]
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:  # more digits than Python converts
            self.fail(key, "out-of-range", f"{shown(text)} has too many digits")
            return None
        return {"null": None, "bool": text.lower() == "true"}.get(kind, text)


def shown(value: object) -> str:
    """A value as a recipe would spell it, on one line of bounded length."""
    if isinstance(value, str):
        text = value if value.isprintable() else ascii(value)[1:-1]
        text = f"'{redact(text)}'"
    else:
        text = redact(json.dumps(value, default=str))
    return text if len(text) <= 80 else text[:77] + "..."
