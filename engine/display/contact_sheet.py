"""The contact sheet of `prepare`: what was sampled, how it was ranked, what each tier trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .drawing import (
    INK,
    LOSER,
    MUTED,
    WINNER,
    captioned,
    fit_image,
    flow,
    framed,
    padded,
    stack,
    text_block,
    wrap_text,
    write_png,
)

_COLUMNS = 12
_LARGEST = 128  # 50 candidates of 512 px must stay a sheet one can look at
_GAP = 8


@dataclass(frozen=True)
class ContactPair:
    """One pair of a tier, the winner first; ranks count from 1 (best)."""

    tier: int
    images: Sequence[Image.Image]
    ranks: Sequence[int]
    scores: Sequence[float]


@dataclass(frozen=True)
class ContactRow:
    """A prompt with its candidates, best first, and one pair of each tier."""

    prompt: str
    images: Sequence[Image.Image]
    scores: Sequence[float]
    pairs: Sequence[ContactPair] = field(default_factory=list)


def draw_contact_sheet(path: Path | str, rows: Sequence[ContactRow]) -> None:
    """Write the sheet as PNG, under its final name only when complete."""
    if not rows:
        raise ValueError("a contact sheet needs at least one prompt, got none")
    sheet = padded(stack([_prompt_block(row) for row in rows], gap=40), 24)
    write_png(sheet, path)


def _prompt_block(row: ContactRow) -> Image.Image:
    tiles = [
        captioned(fit_image(image, largest=_LARGEST), f"#{rank}  {score:.3f}")
        for rank, (image, score) in enumerate(zip(row.images, row.scores, strict=True), start=1)
    ]
    width = _COLUMNS * (max((tile.width for tile in tiles), default=_LARGEST) + _GAP) - _GAP
    parts = [text_block(wrap_text(row.prompt, 20, width, 2), 20, INK)]
    if tiles:
        title = text_block([f"{len(tiles)} candidates, best first"], 13, MUTED)
        parts += [title, flow(tiles, width, _GAP)]
    if row.pairs:
        hardest = max(pair.tier for pair in row.pairs)
        pairs = [_pair_tile(pair, hardest) for pair in row.pairs]
        title = text_block(["one training pair of each tier: winner green, loser orange"], 13)
        parts += [title, flow(pairs, width, 3 * _GAP)]
    return stack(parts, gap=10)


def _pair_tile(pair: ContactPair, hardest: int) -> Image.Image:
    sides = zip(pair.images, pair.ranks, pair.scores, (WINNER, LOSER), strict=True)
    both = stack([_side(*side) for side in sides], gap=_GAP // 2, horizontal=True)
    note = "easiest" if pair.tier == 1 else "hardest" if pair.tier == hardest else ""
    label = f"tier {pair.tier}" + (f" ({note})" if note and hardest > 1 else "")
    return stack([text_block([label], 14, INK), both], gap=4)


def _side(image: Image.Image, rank: int, score: float, color: str) -> Image.Image:
    shown = framed(fit_image(image, largest=_LARGEST), color)
    return captioned(shown, f"#{rank}  {score:.3f}", color=color)
