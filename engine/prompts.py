"""Prompt files: one prompt a line, `#` starts a comment line, repeated prompts count once."""

from __future__ import annotations

from pathlib import Path

from .errors import DataError
from .recipe import Prompts

MAX_PROMPT_CHARACTERS = 2000


def read_prompts(spec: Prompts) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a recipe, none where it names no file.

    DataError names the file and line at fault.
    """
    train = _read(spec.train, spec.limit) if spec.train else []
    heldout = _read(spec.heldout, spec.limit) if spec.heldout else []
    both = set(train) & set(heldout)
    if both:
        raise DataError(
            f"prompts.heldout={spec.heldout} shares {len(both)} prompts with {spec.train}, e.g. "
            f"{sorted(both)[0]!r}: held-out prompts must not be trained on"
        )
    return train, heldout


def _read(path: str, limit: int | None) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"prompts: {path} is not UTF-8 text (byte {error.start})") from None
    prompts: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise DataError(
                f"prompts: {path}:{number} has {len(prompt)} characters; at most "
                f"{MAX_PROMPT_CHARACTERS} are taken"
            )
        prompts[prompt] = None
    if not prompts:
        raise DataError(f"prompts: {path} holds no prompt")
    return list(prompts)[:limit]
