"""The error of a shard: which file, which sample, which part of it, and what is wrong."""

from __future__ import annotations

from ..errors import DataError


class ShardError(DataError):
    """Something in a tar is wrong. ``key`` and ``member`` are None where they play no part."""

    def __init__(
        self, shard: str, reason: str, key: str | None = None, member: str | None = None
    ) -> None:
        super().__init__(shard, reason, key, member)
        self.shard, self.reason, self.key, self.member = shard, reason, key, member

    def __str__(self) -> str:
        key = f", key {self.key}" if self.key is not None else ""
        member = f", member {self.member}" if self.member is not None else ""
        return f"shard {self.shard}{key}{member}: {self.reason}"
