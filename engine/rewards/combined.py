"""Several rewards in one: a weighted sum, and a vote. Both look at one prompt's images at a time.

A reward's scores s_i of the n images of a prompt, those that are finite, are made comparable with
another reward's first::

    weighted   z_i = (s_i - mean(s)) / std(s)        std over the n images; all 0 where they tie
    vote       b_i = (images below i + 1/2 of those that tie with i) / (n - 1)     (Borda's share)

and the score is the sum of w z, or the mean of b weighted by w. An image that one of the rewards
could not score has no score. Such scores are *relative*: they compare images that were given in one
call under the same prompt and nothing else. Two sets of images, such as those of a base and of a
tuned model, are therefore scored together (:func:`score_together`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ..recipe.reward import CombinedReward, Reward
from .protocol import Identity, RewardModel


def standardised(scores: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1, in float64; zeros where all tie."""
    scores = np.asarray(scores, np.float64)
    if (scores == scores[0]).all():  # by value: rounding gives equal scores a spread of 1e-17
        return np.zeros_like(scores)
    centred = scores - scores.mean()
    result: np.ndarray = centred / np.sqrt((centred**2).mean())
    return result


def borda_shares(scores: np.ndarray) -> np.ndarray:
    """Share of the others that each one beats, ties half; 1/2 for a single one."""
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return np.full(1, 0.5)
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, side="left")
    not_above = np.searchsorted(ordered, scores, side="right")
    result: np.ndarray = (below + (not_above - below - 1) / 2) / (len(scores) - 1)
    return result


def combined_identity(kind: str, parts: Sequence[Identity], weights: Sequence[float]) -> Identity:
    """Of a sum or vote, by those of its parts."""

    def of(what: str) -> str:
        named = [f"{part[what]} {weight!r}" for part, weight in zip(parts, weights, strict=True)]
        return hashlib.sha256("\n".join([kind, *named]).encode()).hexdigest()

    return {what: of(what) for what in ("weights", "whole")}


class Combined:
    """Parts and weights."""

    kind: str
    shares: Callable[[np.ndarray], np.ndarray]
    """Makes one part's scores (n,) of one prompt comparable."""
    is_mean = False
    """Whether the weights, without their signs, count as shares of 1."""

    def __init__(self, parts: Sequence[RewardModel], weights: Sequence[float]) -> None:
        self.parts = parts
        self.weights = np.asarray(weights, np.float64)
        self.identity = combined_identity(self.kind, [part.identity for part in parts], weights)
        self.fingerprint = self.identity["whole"]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """float32 (N,); images under the same prompt are compared with each other."""
        raw = np.asarray([part.score(images, prompts) for part in self.parts], np.float64)
        usable = np.isfinite(raw).all(axis=0)
        scores = np.full(len(images), np.nan)
        texts = np.asarray(prompts, dtype=object)
        for prompt in dict.fromkeys(prompts):
            own = np.flatnonzero((texts == prompt) & usable)
            if len(own):
                scores[own] = self.weights @ np.asarray([self.shares(row) for row in raw[:, own]])
        total = np.abs(self.weights).sum() if self.is_mean else 1.0
        return (scores / total).astype(np.float32)


class Weighted(Combined):
    """Weighted sum after standardisation over a prompt's images."""

    kind, shares = "weighted", staticmethod(standardised)


class Vote(Combined):
    """Mean of Borda's shares; every reward's order counts, not its scale."""

    kind, shares, is_mean = "vote", staticmethod(borda_shares), True


def is_relative(spec: Reward) -> bool:
    """Whether scores compare only images that were scored in one call under the same prompt."""
    return isinstance(spec, CombinedReward)


def score_together(
    reward: RewardModel, sets: Sequence[Sequence[Image.Image]], prompt: str
) -> list[np.ndarray]:
    """Scores float32 (n_k,) of several sets of images of one prompt, comparable with each other
    whatever the reward: all images go into one call.
    """
    images = [image for own in sets for image in own]
    scores = reward.score(images, [prompt] * len(images))
    return np.split(scores, np.cumsum([len(own) for own in sets])[:-1])
