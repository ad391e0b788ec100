"""Sampling of candidates: seeded by prompt and index, so an image is the same wherever drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ..basics import keyed
from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..basics.keyed import Stream, content_id
from ..display.terminal import Terminal
from ..models import Backbone
from ..models.fingerprints import changed_parts, named
from ..models.masking import PromptMask
from ..ranks import Ranks
from ..recipe import Model, Sampler
from .candidate_files import (
    PARTS,
    differing_settings,
    has_candidates,
    read_candidates,
    write_candidates,
)


@dataclass(frozen=True, slots=True)
class Start:
    """What an image of a prompt is drawn from; images that share a name share what it names."""

    noise: str
    """Names the noise it begins with."""
    masked: float = 0.0
    """Share of the prompt's embedding that is zero."""
    mask: str = ""
    """Names the order in which the embedding's entries become zero as the share grows."""


def whole_prompts(count: int) -> list[Start]:
    """Images of the whole prompt, each with noise of its own."""
    return [Start(str(number)) for number in range(count)]


def drawn_by(model: Model, backbone: Backbone) -> dict[str, Any]:
    """Content hashes of what draws. Images drawn before there were ``parts`` know the denoiser, and
    the VAE if the recipe names one.
    """
    found = backbone.fingerprints()
    old = {"model": found["model"]} | ({"vae": found["vae"]} if model.vae is not None else {})
    return old | {PARTS: found}


@dataclass(frozen=True)
class CandidateSet:
    """Images of some prompts in a folder, all made with the same settings."""

    folder: Path
    meta: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of the settings: what scores and latents of these images are kept under."""
        return hashlib.sha256(json.dumps(dict(self.meta), sort_keys=True).encode()).hexdigest()

    def has(self, prompt: str) -> bool:
        """Whether this prompt's images are there, whole and made with these settings."""
        return has_candidates(self.folder, prompt, self.meta)

    def differs_in(self, prompt: str) -> list[str]:
        """What made the images that lie there and is another now: parts, then settings."""
        found = differing_settings(self.folder, prompt, self.meta)
        parts = []
        if PARTS in found:
            parts = changed_parts(found.pop(PARTS), self.meta.get(PARTS, {}))
        return list(dict.fromkeys([*parts, *found]))

    def read(self, prompt: str) -> list[Image.Image]:
        """The images of a prompt; DataError if they have gone since they were sampled."""
        images = read_candidates(self.folder, prompt, self.meta)
        if images is None:
            told = f"{self.folder}: the images of {prompt!r} have gone: start again"
            raise DataError(told, prompt, "missing")
        return images

    def write(self, prompt: str, images: Sequence[Image.Image]) -> None:
        """Keep the images of a prompt; they appear when they are whole."""
        write_candidates(self.folder, prompt, images, self.meta)
        failpoint("prepare.candidates")


@dataclass(frozen=True)
class CandidateSampler:
    """Draws ``count`` images a prompt from some network, skipping prompts that are done.

    ``starts`` gives what each of a prompt's images is drawn from; left out, each has its own noise
    and the whole prompt.
    """

    backbone: Backbone
    net: nn.Module
    folder: Path
    _: KW_ONLY
    seed: int
    stream: Stream
    count: int
    sampler: Sampler
    resolution: tuple[int, int]
    batch_size: int
    made_by: Mapping[str, Any]
    starts: Callable[[str], Sequence[Start]] | None = None

    @cached_property
    def images(self) -> CandidateSet:
        """What is drawn, kept with what an image is a function of besides its prompt."""
        meta = {
            **self.made_by,
            "seed": self.seed,
            "stream": int(self.stream),
            "count": self.count,
            "steps": self.sampler.steps,
            "guidance": self.sampler.guidance,
            "resolution": list(self.resolution),
        }
        return CandidateSet(self.folder, meta)

    def run(self, prompts: Sequence[str], ranks: Ranks, terminal: Terminal, label: str) -> None:
        """Sample what is missing, a share on each rank; a prompt is on disk whole or not at all."""
        missing = ranks.on_first(lambda: [p for p in prompts if not self.images.has(p)])
        if others := ranks.on_first(lambda: self._why_again(missing)):
            terminal.warn(f"{label}: images are drawn again that were made with {others}")
        total = len(prompts) * self.count
        done = total - len(missing) * self.count
        mine = list(ranks.share(missing))
        group = max(1, self.batch_size // self.count)
        with terminal.progress(label, total, done, "images") as progress:
            for start in ranks.until_stopped(range(0, len(mine), group)):
                names = mine[start : start + group]
                images = self._draw([(name, one) for name in names for one in self._starts(name)])
                for index, name in enumerate(names):
                    own = images[index * self.count : (index + 1) * self.count]
                    self.images.write(name, own)
                # Shares differ by at most one prompt, so rank 0 can speak for all.
                progress.advance(min(len(images) * ranks.world_size, total - progress.done))
        ranks.meet()

    def _starts(self, prompt: str) -> Sequence[Start]:
        return self.starts(prompt) if self.starts else whole_prompts(self.count)

    def _why_again(self, missing: Sequence[str]) -> str:
        """What the images that lie there, of the first prompt that has some, differ in."""
        found = next(filter(None, map(self.images.differs_in, missing)), [])
        return f"another {named(found)}" if found else ""

    def _draw(self, wanted: list[tuple[str, Start]]) -> list[Image.Image]:
        images: list[Image.Image] = []
        shape = self.backbone.latent_shape(self.resolution)
        for first in range(0, len(wanted), self.batch_size):
            rows = wanted[first : first + self.batch_size]
            noise = [content_id(prompt, start.noise) for prompt, start in rows]
            keys = keyed.make_keys(self.seed, self.stream, noise)
            images += self.backbone.sample(
                self.net,
                [prompt for prompt, _ in rows],
                keyed.normal(keys.to(self.backbone.device), shape),
                steps=self.sampler.steps,
                guidance=self.sampler.guidance,
                mask=self._mask(rows),
            )
        return images

    def _mask(self, rows: Sequence[tuple[str, Start]]) -> PromptMask | None:
        shares = [start.masked for _, start in rows]
        if not any(shares):
            return None
        items = [content_id(prompt, start.mask) for prompt, start in rows]
        return PromptMask(keyed.make_keys(self.seed, Stream.PROMPT_MASK, items), shares)
