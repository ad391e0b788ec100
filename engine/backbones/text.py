"""Embedding prompts: what a family's text encoders must offer, and each prompt embedded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .protocol import Conditioning, Framing

MAX_CACHED = 1024  # prompts; SDXL's take 0.3 MB each in half precision


class TextConditioner(Protocol):
    """The text side of a family: one for each way of telling a UNet what to draw."""

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """What the UNet is told of N images, framed as given if the family is told that."""
        ...

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings that the stock pipeline takes in place of prompts, by argument name."""
        ...


class PromptCache:
    """Embeddings of prompts, the newest ``MAX_CACHED`` of them, each computed once.

    ``embed`` gives, for a list of N prompts, tensors with N rows each.
    """

    def __init__(self, embed: Callable[[list[str]], tuple[Tensor, ...]]) -> None:
        self._embed = embed
        self._rows: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The tensors of ``embed`` for these prompts, which may repeat."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            rows = zip(*self._embed(missing), strict=True)
            self._rows.update(zip(missing, rows, strict=True))
        wanted = [self._rows[prompt] for prompt in prompts]
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        while len(self._rows) > MAX_CACHED:
            self._rows.popitem(last=False)
        return tuple(torch.stack(column) for column in zip(*wanted, strict=True))
