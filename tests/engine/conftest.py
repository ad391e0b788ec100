"""What rooms that make or take shards are tested with."""

from types import ModuleType

import pytest
import shard_sets


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """Builders of small shard sets."""
    return shard_sets
