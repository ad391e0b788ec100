"""The contact sheet of an import: some captions with the pairs that training will see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from .sources.index import Index
from .sources.pictures import Size, load_records
from .sources.rows import RowReader
from .tier_shards import TierShards


def chosen_pairs(pairs: np.ndarray, fills: list[TierShards], count: int) -> list[int]:
    """Numbers of ``count`` pairs, from each tier in turn, as they lie in its first shard."""
    firsts = [fill.pairs[fill.fill.members(0)] for fill in fills]
    turns = ((firsts[turn % len(firsts)], turn // len(firsts)) for turn in range(count))
    return [int(members[place]) for members, place in turns if place < len(members)]


def draw_import_sheet(
    path: Path,
    index: Index,
    reader: RowReader,
    pairs: np.ndarray,
    chosen: list[int],
    resolution: Size,
) -> None:
    """A row for the caption of each chosen pair: that pair, and one of each other tier it has."""
    each = len(reader.images)
    captions = index.numbers("caption_id")[pairs["winner"] // each]

    def picture(image: int) -> Image.Image:
        record, place = divmod(image, each)
        part = index.part(index.part_of(record))
        [loaded] = load_records(reader, part, [record - part.first], resolution)
        return loaded.pictures[place].image

    rows = []
    for number in chosen:
        same = pairs[captions == captions[number]]
        by_tier = {int(pair["tier"]): pair for pair in same[::-1]}
        by_tier[int(pairs[number]["tier"])] = pairs[number]
        shown = [by_tier[tier] for tier in sorted(by_tier)]
        scores = {
            int(pair[side]): float(pair["scores"][place])
            for pair in shown
            for place, side in enumerate(("winner", "loser"))
        }
        images = {image: picture(image) for image in scores}
        ranked = sorted(scores, key=lambda image: -scores[image])
        caption = index.caption(int(pairs[number]["winner"]) // each)
        rows.append(
            ContactRow(
                prompt=caption,
                images=[images[image] for image in ranked],
                scores=[scores[image] for image in ranked],
                pairs=[_contact_pair(pair, images) for pair in shown],
            )
        )
    if rows:
        draw_contact_sheet(path, rows)


def _contact_pair(pair: np.void, images: dict[int, Image.Image]) -> ContactPair:
    return ContactPair(
        tier=int(pair["tier"]),
        winner_image=images[int(pair["winner"])],
        loser_image=images[int(pair["loser"])],
        winner_rank=int(pair["ranks"][0]),
        loser_rank=int(pair["ranks"][1]),
        winner_score=float(pair["scores"][0]),
        loser_score=float(pair["scores"][1]),
    )
