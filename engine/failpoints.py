"""Named places where a test may make the process die or the disk fill up.

``CDPO_FAILPOINT=name:action`` with action ``kill`` (SIGKILL to itself), ``enospc`` (OSError as if
the disk were full) or ``nan``; ``name@N:action`` acts at the N-th passage. Unset, a fail-point
costs one dictionary look-up. Every name is listed here, and a test holds the list against the code.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

NAMES = (
    "checkpoint.write",
    "checkpoint.hashed",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.before_prune",
    "train.step",
    "train.loss",
    "prepare.candidates",
    "prepare.scored",
    "prepare.latents",
    "prepare.shard",
)

_passages: Counter[str] = Counter()


def failpoint(name: str) -> str | None:
    """Act if this passage of ``name`` was asked for; returns an action the caller is to play."""
    wanted = os.environ.get("CDPO_FAILPOINT")
    if not wanted:
        return None
    place, _, action = wanted.partition(":")
    place, _, passage = place.partition("@")
    if place != name:
        return None
    _passages[name] += 1
    if passage and _passages[name] != int(passage):
        return None
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return action
