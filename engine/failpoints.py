"""Named places where a test may make the process die, the disk fill up or a loss go bad.

``CDPO_FAILPOINT=name:action``, with action ``kill`` (SIGKILL to itself), ``term`` (SIGTERM),
``enospc`` (OSError as if the disk were full) or one that the place itself plays (``nan``).
``name@3:action`` acts at the third passage, ``name@3+:action`` from the third on, and
``name:action/rank1`` on that rank alone. Unset, a fail-point costs one dictionary look-up. Every
name is listed here, and a test holds the list against the code.
"""

from __future__ import annotations

import errno
import os
import re
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
    "export.published",
    "prepare.candidates",
    "prepare.part",
    "prepare.scored",
    "prepare.latents",
    "prepare.shard",
)

_SYNTAX = re.compile(
    r"(?P<name>[a-z._]+)(@(?P<passage>\d+)(?P<on>\+)?)?:(?P<action>[a-z]+)(/rank(?P<rank>\d+))?"
)
_passages: Counter[str] = Counter()


def failpoint(name: str) -> str | None:
    """Act if this passage of ``name`` was asked for; returns an action the caller is to play."""
    wanted = os.environ.get("CDPO_FAILPOINT")
    if not wanted:
        return None
    match = _SYNTAX.fullmatch(wanted)
    if match is None or match["name"] not in NAMES:
        raise ValueError(f"CDPO_FAILPOINT={wanted!r}: write it as name@3:kill, name one of {NAMES}")
    if match["name"] != name or match["rank"] not in (None, os.environ.get("RANK", "0")):
        return None
    _passages[name] += 1
    if match["passage"]:
        passage, first = _passages[name], int(match["passage"])
        if passage != first and not (match["on"] and passage > first):
            return None
    return _act(match["action"])


def _act(action: str) -> str | None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return action
