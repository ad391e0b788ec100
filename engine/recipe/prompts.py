"""Section `prompts` of a recipe: files, templates with lists, and the split into two sets."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..basics.errors import told_by
from .section import PositiveInt, Section

MAX_PROMPT_CHARACTERS = 2000
# How messages tell the forms of a value apart; with blanks, so that no key can be one of them.
FILE, TEMPLATES, SPLIT = "as a file", "as templates", "as a split"


def _file_or_list(value: object) -> object:
    listed = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, str) or listed:
        return value
    raise PydanticCustomError("entries", "Input should be a file, or a list of texts")


class Templates(Section):
    """Every template with every combination of the entries of the lists that it names.

    Prompts come in the order of the templates. Within one the lists run in the order in which it
    names them, like loops inside each other: the last one changes fastest. A name that comes up
    twice in a template stands for one entry.
    """

    templates: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts with names of lists in braces, e.g. `a photo of {animal}`; braces that are meant as
    such are doubled."""
    lists: dict[str, Annotated[str | tuple[str, ...], BeforeValidator(_file_or_list)]] = Field(
        default={}
    )
    """The entries behind each name: written out, or a file of them, of any kind that prompts may
    be read from."""

    @field_validator("templates")
    @classmethod
    def _can_be_read(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            template_parts(template)
        return templates

    @model_validator(mode="after")
    def _names_and_lists_match(self) -> Templates:
        named = {name for template in self.templates for name in names_in(template)}
        if missing := sorted(named - self.lists.keys()):
            raise ValueError(f"templates name {_braced(missing)}, which lists lacks: add it there")
        if unused := sorted(self.lists.keys() - named):
            raise ValueError(f"lists.{unused[0]} is named by no template: remove it, or use it")
        return self


class Split(Section):
    """Training prompts that are held out, chosen by key.

    Each prompt's place in the draw is a function of the seed and its text alone: neither order nor
    number of the other prompts moves it.
    """

    fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Chance of a prompt to be held out. Prompts that join later change no other's side."""
    count: PositiveInt | None = None
    """The number held out: those with the lowest draws. A prompt that joins later takes at most
    one other's place."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Split:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give either fraction or count, e.g. fraction: 0.2")
        return self


def _form(value: Any) -> str:
    if isinstance(value, Split):
        return SPLIT
    if isinstance(value, Templates):
        return TEMPLATES
    if isinstance(value, dict):
        given = value.keys()
        is_split = given & Split.model_fields.keys() and not given & Templates.model_fields.keys()
        return SPLIT if is_split else TEMPLATES
    return FILE


def _form_without_split(value: Any) -> str:
    return TEMPLATES if _form(value) == SPLIT else _form(value)


_File = Annotated[str, Tag(FILE)]
_Templates = Annotated[Templates, Tag(TEMPLATES)]
_Split = Annotated[Split, Tag(SPLIT)]


class Prompts(Section):
    """Where prompts come from.

    Files are text with one prompt a line, where `#` starts a comment line, tables (.parquet, .csv,
    .tsv or .jsonl), or a .json list of texts or objects; all but parquet also with .gz. Repeated
    prompts count once. A relative
    path is that of the working folder or else of a file that is shipped, such as
    `recipes/prompts/animals.txt`.
    """

    train: Annotated[_File | _Templates, Discriminator(_form_without_split)] | None = None
    """Prompts whose candidates are ranked and trained on: a file, or `templates` and `lists`. A
    `prepare.source` that is not sampled brings captions of its own: there, what `compare` reports
    as training prompts, or null."""
    heldout: Annotated[_File | _Templates | _Split, Discriminator(_form)] | None = None
    """Prompts never trained on; `compare` reports them apart: a file, `templates` and `lists`, or
    a part of `train` that is split off by key, `{fraction: 0.2}` or `{count: 20}`."""
    validation: Annotated[_File | _Templates | _Split, Discriminator(_form)] | None = None
    """Prompts that `evaluate` draws while training goes on, neither trained on nor reported by
    `compare`: what chooses a checkpoint says nothing about it. Given like `heldout`; a part of
    `train` is split off after that."""
    column: str = "prompt"
    """Column of tables that holds the prompts."""
    limit: PositiveInt | None = None
    """Use only the first so many of each set: for trying a recipe out."""

    @model_validator(mode="after")
    def _a_split_has_something_to_split(self) -> Prompts:
        for side in ("heldout", "validation"):
            if isinstance(getattr(self, side), Split) and self.train is None:
                raise ValueError(f"{side} is split off train, which is not given: give it a file")
        return self


def lone_surrogate(text: str) -> str | None:
    """Half of a character, which JSON and YAML can spell and no file can hold; None without one."""
    return next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """A template as literal text and the name that follows it, None at the end.

    Names only: no positions, attributes, indices, conversions or formats, so that a template can
    do nothing but be filled in. ValueError shows the template and what is wrong with it.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template {template!r}: {told_by(error)}; a brace that is meant as such is doubled"
        ) from None
    for _, name, format_spec, conversion in parts:
        if name is not None and (not name.isidentifier() or format_spec or conversion):
            raise ValueError(
                f"template {template!r}: only names of lists stand in braces, such as {{animal}}"
            )
    return [(text, name) for text, name, _, _ in parts]


def names_in(template: str) -> list[str]:
    """The names of a template's lists, in their order, each once."""
    return list(dict.fromkeys(name for _, name in template_parts(template) if name is not None))


def _braced(names: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)
