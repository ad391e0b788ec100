"""How much a pair counts by the ranks of its images (RankDPO, arXiv 2410.18013): 1 on average.

    weight = |G(w) - G(l)| * |1 / D(w) - 1 / D(l)|,    G(r) = 2^psi(r) - 1,  D(r) = log2(1 + r)

is what a prompt's discounted gain loses when ranks w and l are swapped (their algorithm 2, whose
ranks are those of the labels; it multiplies the pair's loss). psi is the probability with which an
image is preferred to another candidate of its prompt (algorithm 1): of M candidates that one reward
has ranked, rank r is preferred to M - r of the M - 1 others. Divided by its mean over all pairs of
M candidates, which they do not, the weight depends on nothing but the two ranks and M, and the
learning rate keeps its meaning. Pairs of the best image count most, those among the worst least.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_weights(candidates: int) -> Tensor:
    """(M + 1, M + 1) float32: the weight of a winner's and a loser's rank, both from 1."""
    ranks = torch.arange(1, candidates + 1, dtype=torch.float64)
    gains = 2 ** ((candidates - ranks) / (candidates - 1)) - 1
    discounts = torch.log2(1 + ranks).reciprocal()
    changes = (gains[:, None] - gains).abs() * (discounts[:, None] - discounts).abs()
    weights = torch.zeros(candidates + 1, candidates + 1, dtype=torch.float64)
    weights[1:, 1:] = changes / (changes.sum() / (candidates * (candidates - 1)))
    return weights.float()
