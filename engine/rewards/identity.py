"""What a reward is, by content: its weights, and all that its scores depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.fingerprint_store import Kept
from ..models.fingerprints import readers_in
from ..recipe.reward import RewardSection
from .protocol import Identity, Scorer


def reward_files(spec: RewardSection) -> Kept:
    """The identity of a reward with weights, kept for its files: those that ``spec.names`` name,
    and whatever else the section says that is a file or folder here.
    """
    code = Path(__file__).with_name(f"{spec.made_by.partition(':')[0]}.py")
    source = hashlib.sha256(code.read_bytes()).hexdigest() if code.exists() else ""
    knobs = spec.model_dump(mode="json", exclude=set(spec.memory_only))
    texts = {key: value for key, value in knobs.items() if isinstance(value, str)}
    named = {key for key in texts if key in spec.names or os.path.exists(texts[key])} - {"revision"}
    revision = getattr(spec, "revision", None)
    places = [(knobs[key], revision if key == "path" else None) for key in sorted(named)]
    unnamed = {key: value for key, value in knobs.items() if key not in spec.names}
    return Kept(["reward", __version__, source, sorted(named), unnamed], places)


def identified(spec: RewardSection, scorer: Scorer, files: Kept) -> Identity:
    """Of a scorer that was made of ``files``."""
    found = files.read()
    if found is None:
        found = identity_of(scorer, spec.settings(), spec.knobs())
        files.keep(found)
    return found


def identity_of(scorer: Scorer, settings: str, knobs: Mapping[str, Any]) -> dict[str, str]:
    """The identity of a scorer whose section has these knobs."""
    weights = _hash(f"{scorer.fingerprint} {settings}") if settings else scorer.fingerprint
    readers = readers_in(scorer)
    whole = _hash(json.dumps([scorer.fingerprint, readers, dict(knobs)], sort_keys=True))
    return {"weights": weights, "whole": whole if readers else weights}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
