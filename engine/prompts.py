"""The prompts of a recipe: read or filled in, each once, and divided into training and held-out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from .basics import keyed
from .basics.errors import DataError
from .basics.keyed import Stream, content_id
from .prompt_files import prompts_in
from .recipe import Prompts, Split, Templates
from .recipe.prompts import MAX_PROMPT_CHARACTERS, lone_surrogate, names_in, template_parts

MAX_FILLED_IN = 1_000_000  # prompts of templates: lists multiply, and a slip is soon a billion


def read_prompts(spec: Prompts, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a recipe, none where it names none.

    DataError names the file and line, or row and column, at fault.
    """
    train, heldout = _read(spec, "train"), _read(spec, "heldout")
    if isinstance(spec.heldout, Split):
        train, heldout = _divided(train, spec.heldout, seed)
    train, heldout = train[: spec.limit], heldout[: spec.limit]
    both = set(train) & set(heldout)
    if both:
        raise DataError(
            f"{_named(spec, 'heldout')} shares {len(both)} prompts with "
            f"{_named(spec, 'train')}, e.g. {sorted(both)[0]!r}: held-out prompts must not be "
            "trained on"
        )
    return train, heldout


def _read(spec: Prompts, side: str) -> list[str]:
    """The prompts of `train` or `heldout` in their order, each once."""
    value = getattr(spec, side)
    if isinstance(value, str):
        return _some(prompts_in(value, spec.column), f"prompts: {value} holds no prompt")
    if isinstance(value, Templates):
        return list(dict.fromkeys(_filled_in(value, spec.column, f"prompts.{side}")))
    return []


def _some(texts: Iterable[str], otherwise: str) -> list[str]:
    """The texts, each once; DataError saying ``otherwise`` where there is none."""
    found = list(dict.fromkeys(texts))
    if not found:
        raise DataError(otherwise)
    return found


def _filled_in(spec: Templates, column: str, key: str) -> Iterator[str]:
    lists = {
        name: _entries(value, column, f"{key}.lists.{name}") for name, value in spec.lists.items()
    }
    sizes = {
        template: math.prod(len(lists[name]) for name in names_in(template))
        for template in spec.templates
    }
    if sum(sizes.values()) > MAX_FILLED_IN:
        raise DataError(
            f"{key}: its lists make {sum(sizes.values())} prompts; at most {MAX_FILLED_IN} are "
            "taken: shorten a list"
        )
    for template in spec.templates:
        yield from _products(template, lists, key)


def _entries(value: str | Sequence[str], column: str, key: str) -> list[str]:
    if isinstance(value, str):
        return _some(prompts_in(value, column), f"{key}: {value} holds no entry")
    return _some(filter(None, map(str.strip, value)), f"{key}: the list is empty")


def _products(template: str, lists: dict[str, list[str]], key: str) -> Iterator[str]:
    names, parts = names_in(template), template_parts(template)
    for entries in product(*(lists[name] for name in names)):
        chosen = dict(zip(names, entries, strict=True))
        prompt = "".join(text + (chosen[name] if name else "") for text, name in parts).strip()
        if not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
            raise DataError(
                f"{key}: template {template!r} makes a prompt of {len(prompt)} characters; 1 to "
                f"{MAX_PROMPT_CHARACTERS} are taken"
            )
        if half := lone_surrogate(prompt):
            raise DataError(
                f"{key}: template {template!r} makes a prompt with half a character, {half!r}: "
                "remove it"
            )
        yield prompt


def _divided(prompts: list[str], split: Split, seed: int) -> tuple[list[str], list[str]]:
    """Both sides in the order of the prompts, whose draws have nothing to do with one another."""
    keys = keyed.make_keys(seed, Stream.PROMPT_SPLIT, [content_id(prompt) for prompt in prompts])
    draws = dict(zip(prompts, keyed.uniform(keys).tolist(), strict=True))
    if split.count is not None:
        lowest = sorted(prompts, key=lambda prompt: (draws[prompt], prompt))
        out = set(lowest[: split.count])
    else:
        assert split.fraction is not None
        out = {prompt for prompt in prompts if draws[prompt] < split.fraction}
    if not 0 < len(out) < len(prompts):
        raise DataError(
            f"{_shown(split)} holds out {len(out)} of {len(prompts)} prompts; both sides need "
            "one: change it, or the seed"
        )
    trained = [prompt for prompt in prompts if prompt not in out]
    return trained, [prompt for prompt in prompts if prompt in out]


def _shown(split: Split) -> str:
    which = f"fraction={split.fraction:g}" if split.fraction is not None else f"count={split.count}"
    return f"prompts.heldout.{which}"


def _named(spec: Prompts, side: str) -> str:
    value = getattr(spec, side)
    if side == "train" and isinstance(value, str):
        return value
    return f"prompts.{side}={value}" if isinstance(value, str) else f"prompts.{side}"
