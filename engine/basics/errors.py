"""Errors a user can act on, each with the exit code that scripts around a run rely on.

Every verb catches :class:`CdpoError`, prints its message as one line and exits with ``exit_code``;
any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from typing import Any

EXIT_OK = 0
EXIT_DEFECT = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_NUMERICS = 4
EXIT_CHECKPOINT = 5
EXIT_OUTSIDE = 6
EXIT_STUCK = 7
EXIT_STOPPED = 75

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last where a file may not grow

MOST_CHARACTERS = 2000  # of a message of ours
MOST_TOLD = 200  # of another library's inside it
# Escape sequences of terminals: colours and cursors (CSI), titles and links (OSC), the rest.
_ESCAPES = re.compile(
    r"(\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?|\x1b[ -/]*[0-~]?"
)
# What ends lines, moves cursors or turns the direction of a text, and halves of characters.
_CONTROLS = re.compile(r" *([\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]\s*)+")
_SENTENCE = re.compile(r"(?<=[^\s.]{2})[.!]\s+(?=[A-Z])")
# A URL as scheme, user and password, place, query. `hf://owner@branch/...` names no user.
_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])((?P<hf>hf)|[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?:[^\s/@'\"]*:(?!\d+/)[^\s@'\"]*@|(?(hf)(?!)|[^\s/@'\"]*@))?(?P<place>[^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*)?"
)
# What is a secret wherever it stands: by its name, and by its form.
_NAMED = re.compile(
    r"(?i)\b((?:x-amz-|x-goog-)?(?:signature|credential|security-token|sig)"
    r"|(?:access_?|api_?|auth_?|hf_?)?(?:token|key_secret|api_?key)|passw(?:or)?d|secret)"
    r"=[^\s&'\"]+"
)
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_)\w{16,}")
_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "ACCESS_KEY", "ACCESS_KEY_ID")
_OF_ENVIRONMENT = re.compile(rf"(.*_)?({'|'.join(_ENDINGS)})")
_SHORTEST = 8  # characters of a variable's value that is looked for


def told_by(error: BaseException) -> str:
    """What an error of another library or of the system says, as a part of a line of ours: its
    first sentence, without escape sequences and control characters, in at most
    :data:`MOST_TOLD` characters; its class where it says nothing.

    Whatever is put into a message goes through here. What follows the first sentence is advice for
    programmers ("re-run with weights_only=False"), which users of ours must not take.
    """
    if isinstance(error, OSError) and error.errno and error.errno in errno.errorcode:
        return os.strerror(error.errno)  # str() names the file again, which the message does
    lines = str(error)[: 4 * MOST_CHARACTERS].strip().split("\n")
    text = " ".join(lines[:2] if lines[0].rstrip().endswith(":") else lines[:1])
    text = _SENTENCE.split(plain(" ".join(text.split())), maxsplit=1)[0].removesuffix(".")
    if isinstance(error, KeyError) or not text:  # of which the key is all that is said
        text = f"{type(error).__name__} {text}".strip()
    return plain(text, MOST_TOLD)


def redact(text: str) -> str:
    """``text`` without secrets: users, passwords and queries (signatures) of its URLs, tokens, and
    the values of variables such as HF_TOKEN and AWS_SECRET_ACCESS_KEY.

    Whatever a run says or writes of names and texts that are not its own goes through here; and a
    recipe in which there is something to cut out is refused.
    """
    for name in os.environ:  # their values are decoded each time: only of those that may be secret
        if name.endswith(_ENDINGS) and _OF_ENVIRONMENT.fullmatch(name):
            value = os.environ[name]
            text = text.replace(value, "…") if len(value) >= _SHORTEST else text
    text = _URL.sub(r"\1://\g<place>", text) if "://" in text else text
    text = _NAMED.sub(r"\1=…", text) if "=" in text else text
    return _TOKEN.sub(r"\1…", text)


def plain(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text as one line that no terminal obeys, without secrets, whose middle is left out if it is
    too long.
    """
    if len(text) > 2 * most:  # megabytes need not be looked through
        text = f"{text[:most]} {text[-most:]}"
    text = redact(_CONTROLS.sub(" ", _ESCAPES.sub("", text)).strip())
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


class CdpoError(Exception):
    """Base of the errors that are the user's to mend: the message says what, where and the fix.

    ``key`` is what it is about, as a program would name it: a dotted key of the recipe, a file, a
    column, a sample. ``kind`` is what is wrong with it, in one or two words joined by a hyphen that
    stay when the message is worded anew: `unknown`, `missing`, `damaged`, `mismatch` ...

    A message is one line, whatever names and texts it was made of; a sequence has a line for each
    of several problems.
    """

    exit_code = EXIT_DEFECT
    of_all_ranks = False
    """Whether every rank raises it now, and none need be told."""

    def __init__(
        self, message: str | Sequence[str], key: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message, key, kind)
        self.message = "\n".join(map(plain, [message] if isinstance(message, str) else message))
        self.key, self.kind = key, kind

    def __str__(self) -> str:
        return self.message


class RecipeError(CdpoError):
    """The recipe, an override or the command line is wrong (names file and dotted key)."""

    exit_code = EXIT_USAGE
    problems: tuple[tuple[str, str, str], ...] = ()
    """Where a file has several: key, kind and message of each; the first are the error's own."""


class DataError(CdpoError):
    """Prompts, candidates, shards or a manifest are missing or wrong (names shard, key, member)."""

    exit_code = EXIT_DATA


class NumericsError(CdpoError):
    """Loss or gradients stayed non-finite for too many steps in a row, weights are not finite, or
    an image came out NaN.
    """

    exit_code = EXIT_NUMERICS


class CheckpointError(CdpoError):
    """A checkpoint cannot be written or read, or is another recipe's (names folder and step)."""

    exit_code = EXIT_CHECKPOINT


class OutsideError(CdpoError):
    """Something outside the run failed: a model folder, a hub, a reward's weights, a package."""

    exit_code = EXIT_OUTSIDE


class StuckError(CdpoError):
    """The run has died at one place again and again, and nothing about it has changed since."""

    exit_code = EXIT_STUCK


def unwritable(message: str, key: str, raised: OSError, error: type[CdpoError]) -> CdpoError:
    """What could not be written, as an ``error``; but a full disk is no mistake in a recipe."""
    full = raised.errno in DISK_FULL and issubclass(error, RecipeError)
    return (OutsideError if full else error)(f"{message}: {told_by(raised)}", key, "unwritable")


class StopRequested(CdpoError):
    """The run was asked to stop, and what it has done is committed: all ranks leave together."""

    exit_code = EXIT_STOPPED


class ShardError(DataError):
    """Something in a tar is wrong. ``key`` (of the sample) and ``member`` are None where they play
    no part.
    """

    def __init__(
        self,
        shard: str,
        reason: str,
        key: str | None = None,
        member: str | None = None,
        kind: str | None = None,
    ) -> None:
        sample = f", key {key}" if key is not None else ""
        part = f", member {member}" if member is not None else ""
        super().__init__(f"shard {shard}{sample}{part}: {reason}", key, kind)
        self.shard, self.reason, self.member = shard, reason, member

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.reason, self.key, self.member, self.kind)
