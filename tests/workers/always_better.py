"""A scorer in whose eyes the second half of the images it is shown is always the better one."""

from __future__ import annotations


def score(images: list[object], prompts: list[str]) -> list[float]:
    half = len(images) // 2
    return [0.0] * half + [1.0 + 0.1 * at for at in range(len(images) - half)]
