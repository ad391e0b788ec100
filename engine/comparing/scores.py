"""What rewards make of the images of all sides: the base's and each run's, prompt by prompt.

All images of a prompt go to a reward in one call: a score may be relative to the others there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..preparing.candidates import CandidateSet
from ..ranks import Ranks
from ..recipe import Reward
from ..rewards import ClipModel, RewardModel, score_together
from .result_cache import KeptTables, Tables

Images = Sequence[Sequence[Image.Image]]
"""Of one prompt: those of each side."""


class SideScoring:
    """Scores and distances of all prompts, a share on each rank, kept for the next report."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        sides: Mapping[str, CandidateSet],
        prompts: Sequence[str],
    ) -> None:
        self.ranks = ranks
        self.sides = sides
        self.prompts = prompts
        self._kept = KeptTables(folder)
        made_of = {name: images.fingerprint for name, images in sides.items()}
        text = json.dumps([made_of, list(prompts)], sort_keys=True)
        self._images_hash = hashlib.sha256(text.encode()).hexdigest()

    def scores(self, spec: Reward, reward: RewardModel) -> Tables:
        """(prompts, images) of each side. DataError if not one image of all could be scored."""
        knobs = json.dumps(spec.knobs(), sort_keys=True)

        def score(prompt: str, images: Images) -> NDArray[np.float64]:
            found = score_together(reward, images, prompt)
            failpoint("compare.scored")
            return np.stack(found).astype(np.float64)

        def score_all() -> NDArray[np.float64]:
            whole = self._of_prompts(score)
            if not np.isfinite(whole).any():
                raise DataError(
                    f"the reward {spec.label} could score none of {whole.size} images, for the "
                    "reasons above",
                    spec.type,
                    "non-finite",
                )
            return whole

        made_of = {"reward": knobs, "weights": reward.fingerprint}
        return self._kept_or("scores", made_of, score_all)

    def distances(self, clip: ClipModel, batch_size: int, fingerprint: str) -> Tables:
        """(prompts,) of each side: the mean cosine distance of two images of a prompt, by the CLIP
        of a reward with this ``fingerprint``.
        """

        def measure(_: str, images: Images) -> NDArray[np.float64]:
            return np.array([mean_distance(_embedded(clip, side, batch_size)) for side in images])

        made_of = {"weights": fingerprint, "precision": clip.precision}
        return self._kept_or("distances", made_of, lambda: self._of_prompts(measure))

    def _kept_or(
        self, what: str, made_of: dict[str, str], compute: Callable[[], NDArray[np.float64]]
    ) -> Tables:
        """Tables (prompts, ...) by side: those kept, or what is computed (prompts, sides, ...)."""
        subject = f"{what} {json.dumps(made_of)}"
        made_of = made_of | {"images": self._images_hash}
        kept = self.ranks.on_first(lambda: self._kept.read(subject, made_of))
        if kept is not None:
            return {name: kept[name] for name in self.sides}
        whole = compute()
        tables = {name: whole[:, index] for index, name in enumerate(self.sides)}
        self.ranks.on_first(lambda: self._kept.write(subject, made_of, tables))
        return tables

    def _of_prompts(
        self, work: Callable[[str, Images], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """(prompts, sides, ...) of what ``work`` makes of a prompt, (sides, ...)."""

        def work_on(prompt: str) -> NDArray[np.float64]:
            return work(prompt, [side.read(prompt) for side in self.sides.values()])

        return np.stack(self.ranks.divided(self.prompts, work_on))


def _embedded(
    clip: ClipModel, images: Sequence[Image.Image], batch_size: int
) -> NDArray[np.float64]:
    """Unit vectors (N, D)."""
    parts = [
        clip.embed_images(images[start : start + batch_size]).double().cpu().numpy()
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)


def mean_distance(embeddings: NDArray[np.float64]) -> float:
    """Mean of 1 - cosine over all pairs of N unit vectors (N, D); NaN for fewer than two."""
    count = len(embeddings)
    if count < 2:
        return float("nan")
    # The cosines of all ordered pairs, each vector's with itself left out, add up to |sum|^2 - N.
    total, lengths = embeddings.sum(axis=0), (embeddings**2).sum()
    return float(1 - (total @ total - lengths) / (count * (count - 1)))
