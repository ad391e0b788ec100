"""Errors a user can act on, each with the exit code that scripts around a run rely on.

Every verb catches :class:`CdpoError`, prints its message as one line and exits with ``exit_code``;
any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_DEFECT = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_NUMERICS = 4
EXIT_CHECKPOINT = 5
EXIT_OUTSIDE = 6
EXIT_STOPPED = 75


class CdpoError(Exception):
    """Base of the errors that are the user's to mend: the message says what, where and the fix.

    ``key`` is what it is about, as a program would name it: a dotted key of the recipe, a file, a
    column, a sample. ``kind`` is what is wrong with it, in one or two words joined by a hyphen that
    stay when the message is worded anew: `unknown`, `missing`, `damaged`, `mismatch` ...
    """

    exit_code = EXIT_DEFECT
    of_all_ranks = False
    """Whether every rank raises it now, and none need be told."""

    def __init__(self, message: str, key: str | None = None, kind: str | None = None) -> None:
        super().__init__(message, key, kind)
        self.message, self.key, self.kind = message, key, kind

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
    """Loss or gradients stayed non-finite for too many steps in a row, or an image came out NaN."""

    exit_code = EXIT_NUMERICS


class CheckpointError(CdpoError):
    """A checkpoint cannot be written or read, or is another recipe's (names folder and step)."""

    exit_code = EXIT_CHECKPOINT


class OutsideError(CdpoError):
    """Something outside the run failed: a model folder, a hub, a reward's weights, a package."""

    exit_code = EXIT_OUTSIDE


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
