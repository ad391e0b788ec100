"""Zeros in the embeddings of prompts: what Curriculum-DPO++ makes losers from.

The paper sets "a fraction of the prompt embedding" to zero. Here that is a share of its entries,
numbers of the (T, D) token embeddings wherever they stand, and not of its tokens: the share is then
exact, as fine as one likes, and means the same for the pooled embedding (P,) of Stable Diffusion
XL, which has no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import philox_uint32

# Arguments of the stock pipelines, each with a draw of its own. The token embeddings of both of
# Stable Diffusion XL's encoders are one argument. The unconditional half of guidance stays whole.
MASKED_INPUTS = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class PromptMask:
    """Which entries of the prompts' embeddings are zero, for each of N images.

    Of n entries the ``round(share * n)`` with the lowest words of one keyed draw are zero. Under
    one key a larger share therefore zeroes what a smaller one does, and more.
    """

    keys: Tensor
    """(N, 4) int64; the column of visits is free: it tells the embeddings of a prompt apart."""
    shares: Sequence[float]
    """(N,) in [0, 1]; 0 leaves an image's prompt whole."""

    def zeros(self, row: int, part: int, size: int, device: torch.device) -> Tensor:
        """Where (size,) embedding number ``part`` of an image is zero."""
        key = self.keys[row : row + 1].to(device, copy=True)
        key[:, 3] = part
        lowest = philox_uint32(key, size)[0].argsort(stable=True)
        zeros = torch.zeros(size, dtype=torch.bool, device=device)
        zeros[lowest[: round(self.shares[row] * size)]] = True
        return zeros

    def apply(
        self, inputs: Mapping[str, Tensor | Sequence[Tensor]]
    ) -> dict[str, Tensor | Sequence[Tensor]]:
        """A pipeline's inputs, (N, ...) or a list of N by argument, with zeros in those of the
        prompts.
        """
        masked = dict(inputs)
        for part, name in enumerate(MASKED_INPUTS):
            if name in masked:
                given = masked[name]
                rows = zip(range(len(self.shares)), given, strict=True)
                found = [self._row(row, part, value) for row, value in rows]
                masked[name] = torch.stack(found) if isinstance(given, Tensor) else found
        return masked

    def _row(self, row: int, part: int, embedding: Tensor) -> Tensor:
        if not self.shares[row]:
            return embedding
        zeros = self.zeros(row, part, embedding.numel(), embedding.device)
        return embedding.masked_fill(zeros.view(embedding.shape), 0)
