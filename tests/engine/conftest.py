"""What rooms that make or take shards are tested with."""

import errno
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import shard_sets


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """Builders of small shard sets."""
    return shard_sets


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the disk is full: nothing that is written reaches it any more."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", full)
