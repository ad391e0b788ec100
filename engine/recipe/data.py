"""Sections of a recipe for pairs: which are formed and when, and where their shards lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Fetch(Section):
    """How shards behind a URL are brought here; no effect on shards in a folder."""

    threads: NonNegativeInt = 4
    """Shards brought ahead of training at the same time; 0 brings one when it is read."""
    retries: NonNegativeInt = 6
    """Tries after the first that may fail in a row, none bringing a further byte."""
    backoff: PositiveFloat = 1.0
    """Seconds before the first retry; each further wait is twice as long, up to 30, with jitter."""
    stall: PositiveFloat = 30.0
    """Seconds without a byte after which a connection is given up."""
    budget: PositiveFloat = 300.0
    """Seconds one shard may take in all, retries included; raise it where the network is slow."""


class Data(Section):
    """The pair shards between `prepare` and `train`."""

    path: str | None = None
    """Folder of shards and manifest.json; by default `shards` inside the run folder. `train` also
    reads them from a URL: `https://`, `s3://bucket/prefix`, `hf://datasets/owner/name/prefix`."""
    manifest_sha256: Sha256 | None = None
    """What manifest.json must have, as `sha256sum` prints it: `train` refuses any other. It holds
    the hashes of all shards, so it vouches for a whole set that comes from a URL."""
    cache: str | None = None
    """Folder that keeps shards read from a URL, on a local disk; all processes of a machine and
    other runs may share it. By default `~/.cache/cdpo/shards`."""
    cache_gib: PositiveFloat = 64.0
    """Most that the cache may hold, in GiB; shards not used for longest go first."""
    fetch: Fetch = Fetch()
    """Time-outs and retries of shards behind a URL."""
    lanes: PositiveInt = 8
    """Independent reading lanes: the world size must divide it, and it the global batch."""
    pairs_per_shard: PositiveInt = 1000
    """Upper bound of samples in one tar."""
    format: Literal["latents", "moments", "raw"] = "latents"
    """What `prepare` writes of an image: `latents` (smallest), `moments` of the VAE's posterior
    (twice that), or `raw` pixels as lossless WebP, encoded in training; `train` takes them all."""
    posterior: Literal["mean", "sampled"] = "mean"
    """`sampled`: every visit of a pair draws its latents from the VAE's posterior, by key (not with
    `format: latents`, which holds means)."""
    text: Literal["live", "stored"] = "live"
    """`stored`: `prepare` writes what text encoders make of all prompts, in `train.precision`,
    beside the shards, and `train` reads that and loads none: the same numbers in less memory."""
    shuffle_shards: PositiveInt = 8
    """Shards of a lane whose pairs are mixed; more mixes better and reads less in order."""
    workers: NonNegativeInt = 1
    """Reader threads that fetch batches ahead of the step, for `raw` with as many processes that
    decode; 0 reads in the step itself."""

    @model_validator(mode="after")
    def _a_posterior_is_there_to_be_sampled(self) -> Data:
        if self.posterior == "sampled" and self.format == "latents":
            raise ValueError("posterior=sampled needs format=moments or raw: latents hold the mean")
        return self


class Curriculum(Section):
    """Which pairs are formed, how hard each is, and when each tier opens."""

    tiers: Annotated[int, Field(ge=1, le=1000)] = 5
    """Number of difficulty tiers B; 1 is the easiest (3, 5 and 7 work in the papers)."""
    difficulty: Literal["rank_gap", "score_gap"] = "rank_gap"
    """What makes a pair easy: a large gap in rank (as published) or in reward."""
    binning: Literal["equal_width", "quantile"] = "equal_width"
    """Tiers of equal width in the gap (as published) or of equal pair count, per prompt."""
    min_score_gap: NonNegativeFloat = 0.0
    """Pairs whose rewards differ by less never form; exact ties never do."""
    pairs_per_prompt_per_tier: PositiveInt = 32
    """Pair budget: all O(M^2) pairs would repeat each image up to M-1 times."""
    order: Literal["easy_to_hard", "hard_to_easy", "random"] = "easy_to_hard"
    """`random` trains on the same pairs without order: plain DPO."""
    cumulative: bool = True
    """Stage k trains on the union of tiers 1..k (as published); false: on tier k alone."""
    steps_per_tier: PositiveInt = 400
    """Optimiser steps before the next tier opens (K); the last stage takes the rest. The papers'
    best lie between 300 and 400."""
