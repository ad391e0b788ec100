"""Training on shards behind a URL: the same losses as on the folder, or one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import KILLED, Outcome, World, losses
from shard_server import ShardServer, serving

FAST = ("data.fetch.retries=2", "data.fetch.backoff=0.01", "data.fetch.budget=30.0")


@pytest.fixture
def web(world: World) -> Iterator[ShardServer]:
    with serving(world.shards, chunk=512) as web:
        yield web


@pytest.fixture
def train(world: World, web: ShardServer, tmp_path: Path) -> Callable[..., Outcome]:
    """Train from the web into ``tmp_path / "run"``, with a cache of this test's own."""

    def train(*overrides: str, **options: object) -> Outcome:
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}", *FAST)
        return world.train(tmp_path / "run", *mine, *overrides, **options)  # type: ignore[arg-type]

    return train


def test_losses_are_those_of_the_folder(
    train: Callable[..., Outcome],
    web: ShardServer,
    uninterrupted: list[float],
    tmp_path: Path,
) -> None:
    web.faults["*"] = ["500", "drop", "none", "503"]
    outcome = train().succeeded()
    assert losses(tmp_path / "run") == uninterrupted
    assert "Unclosed" not in outcome.text


@pytest.mark.slow
def test_two_ranks_share_a_cache_too_small_for_the_set(
    world: World, train: Callable[..., Outcome], tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in world.shards.glob("*.tar"))
    shards = len(list(world.shards.glob("*.tar")))
    room = 2 * 3 + 1  # the shards that two ranks read in turns, one lane each, and one more
    assert room < shards
    world.train(tmp_path / "near", "data.shuffle_shards=2", ranks=2).succeeded()
    train("data.shuffle_shards=2", f"data.cache_gib={room * largest / 2**30}", ranks=2).succeeded()
    assert losses(tmp_path / "run") == losses(tmp_path / "near")
    kept = list((tmp_path / "cache").glob("*.tar"))
    assert kept and sum(path.stat().st_size for path in kept) <= room * largest


@pytest.mark.parametrize("passage", [pytest.param(2, marks=pytest.mark.long), 12])
def test_killed_while_the_cache_is_filled(
    train: Callable[..., Outcome], uninterrupted: list[float], tmp_path: Path, passage: int
) -> None:
    assert train(failpoint=f"cache.fill@{passage}:kill").code == KILLED
    assert list((tmp_path / "cache").glob("*.part"))
    train().succeeded()
    assert losses(tmp_path / "run") == uninterrupted
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code"),
    [pytest.param("500*", 6, marks=pytest.mark.long), ("stall*", 6), ("corrupt*", 3)],
)
def test_one_shard_that_cannot_be_had_ends_both_ranks_alike(
    train: Callable[..., Outcome],
    web: ShardServer,
    world: World,
    fault: str,
    code: int,
) -> None:
    bad = max(world.shards.glob("tier-1-*.tar")).name  # of the last lane, so of rank 1 alone
    web.faults[bad] = [fault]
    outcome = train("data.fetch.stall=0.5", "data.fetch.retries=1", ranks=2)
    outcome.refused(code, f"{web.url}/{bad}")


def test_no_service_at_all(train: Callable[..., Outcome], web: ShardServer) -> None:
    web.faults["*"] = ["503*"]
    train().refused(6, f"{web.url}/manifest.json")


def test_a_full_disk_is_one_error(train: Callable[..., Outcome]) -> None:
    train(failpoint="cache.fill@3+:enospc").refused(3, "data.cache_gib")


def test_a_url_with_a_password_goes_nowhere(world: World, tmp_path: Path) -> None:
    outcome = world.train(tmp_path / "run", "data.path=https://me:SECRET@host/set")
    outcome.refused(2, "data.path=https://host/set")
    assert "SECRET" not in outcome.text
    assert not list((tmp_path / "run").rglob("*.yaml"))


def test_prepare_writes_to_folders(world: World, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", "data.path=s3://bucket/set"]
    outcome = world.server.run("prepare", world.recipe, overrides)
    outcome.refused(2, "data.path=s3://bucket/set")
