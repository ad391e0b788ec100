"""Named places where a test may make the process die, the disk fill up or a loss go bad.

``CDPO_FAILPOINT=name:action``, with action ``kill`` (SIGKILL to itself), ``term`` (SIGTERM),
``stall`` (wait for ever), ``enospc`` (OSError as if the disk were full) or one that the place
itself plays (``nan``).
``name@3:action`` acts at the third passage, ``name@3+:action`` from the third on, and
``name:action/rank1`` on that rank alone; several are joined by commas. Unset, a fail-point costs
one dictionary look-up. Every name is listed here, and a test holds the list against the code.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections import Counter

NAMES = (
    "checkpoint.write",
    "checkpoint.written",
    "checkpoint.synced",
    "checkpoint.hashed",
    "checkpoint.manifest",
    "checkpoint.before_rename",
    "checkpoint.replacing",
    "checkpoint.after_rename",
    "checkpoint.latest",
    "checkpoint.before_prune",
    "checkpoint.pruned",
    "checkpoint.divided",
    "train.start",
    "train.sample",
    "train.step",
    "train.loss",
    "frozen.write",
    "evaluate.draw",
    "evaluate.measured",
    "export.published",
    "rounds.judged",
    "rounds.exported",
    "prepare.candidates",
    "prepare.part",
    "prepare.scoring",
    "prepare.scored",
    "prepare.latents",
    "prepare.shard",
    "shard.write",
    "cache.fill",
    "merge.shard",
    "compare.diverged",
    "compare.scored",
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
    for part in wanted.split(","):
        match = _SYNTAX.fullmatch(part)
        if match is None or match["name"] not in NAMES:
            raise ValueError(
                f"CDPO_FAILPOINT={wanted!r}: write it as name@3:kill, name one of {NAMES}"
            )
        if match["name"] == name and match["rank"] in (None, os.environ.get("RANK", "0")):
            _passages[part] += 1
            if _is_meant(_passages[part], match):
                return _act(match["action"])
    return None


def _is_meant(passage: int, match: re.Match[str]) -> bool:
    if not match["passage"]:
        return True
    first = int(match["passage"])
    return passage == first or (match["on"] is not None and passage > first)


def _act(action: str) -> str | None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "stall":
        threading.Event().wait()
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return action
