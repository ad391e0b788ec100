"""The tiny world of `tiny.py`, written once a session, for tests that run in this process."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not a folder is an error, not a download
# Not the user's own cache; in this process each test has a fresh one (`fresh_cache`).
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), f"cdpo-tests-{os.getpid()}")
os.environ["NO_PROXY"] = "127.0.0.1"  # where tests serve shards

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import tiny
import torch
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import sd
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from launching import CALM, ForkServer, World, losses, make_world, once
from operations import operations as operations
from pictures import draw_picture
from PIL import Image
from stock import levels_apart

CPU = torch.device("cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: the last minutes then have short ones for all processes."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection() -> None:
    """What libraries and tests make while they are imported stays: no use to look for garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, but not among that."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions complain of what was never collected
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A row for each family's pipeline that tests held images against (`same_images`)."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    compared = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "images"
    ]
    if not compared:
        return
    terminalreporter.section("images beside the stock pipeline's")
    line = "{:<14}{:<32}{:>10}{:>10}{:>16}".format
    terminalreporter.write_line(line("family", "pipeline", "steps", "images", "levels apart"))
    for of in sorted({(family, pipeline) for family, pipeline, *_ in compared}):
        steps, images, apart = zip(
            *(row[2:] for row in compared if tuple(row[:2]) == of), strict=True
        )
        numbers = ",".join(map(str, sorted(set(steps)))), str(sum(images)), f"{max(apart)} of 255"
        terminalreporter.write_line(line(*of, *numbers))


@pytest.fixture
def same_images(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Holds pictures (N, H, W, 3) against a stock pipeline's, and leaves a row for the table at the
    end: `same_images("sd3", stock, steps, expected, *found)`; `most` of 255 levels may they differ.
    """

    def compare(
        family: str, stock: Any, steps: int, expected: Any, *found: Any, most: int = 0
    ) -> None:
        apart = max(levels_apart(one, expected) for one in found)
        images = len(expected) * len(found)
        record_property("images", (family, type(stock).__name__, steps, images, apart))
        assert apart <= most
        assert expected.std() > 10  # of 255: no gray wall

    return compare


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has computed is unknown to the next."""
    folder = tmp_path_factory.getbasetemp() / "cache" / uuid4().hex
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True)
def same_rounding() -> Iterator[None]:
    """Sums round by the number of threads: no test changes it for those that follow."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this run of the tests."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.fixture(scope="session")
def tiny_world(of_all_processes: Path) -> Path:
    """Folder with `sd`, `reward`, `judge`, prompt files and `recipe.yaml`: not to be written to."""
    return once(
        of_all_processes / "tiny",
        lambda folder: tiny.write_recipe(folder / "recipe.yaml", tiny.build(folder)),
    )


@pytest.fixture
def tiny_recipe(tiny_world: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny world's recipe with overrides, e.g. `tiny_recipe("seed=5")`, in a run folder of its
    own; `run="b"` names another one.
    """

    def load(*overrides: str, run: str = "run") -> Recipe:
        return load_recipe(tiny_world / "recipe.yaml", [f"run_dir={tmp_path / run}", *overrides])

    return load


@pytest.fixture(scope="session")
def recipe_of(of_all_processes: Path) -> Callable[..., Recipe]:
    """The recipe of a tiny world by its family, e.g. `recipe_of("lcm", "seed=5")`."""

    def load(family: str, *overrides: str) -> Recipe:
        folder = once(
            of_all_processes / ("tiny" if family == "sd" else f"tiny-{family}"),
            lambda folder: tiny.write_recipe(folder / "recipe.yaml", tiny.build(folder, family)),
        )
        return load_recipe(folder / "recipe.yaml", overrides)

    return load


@pytest.fixture
def tiny_backbone(tiny_recipe: Callable[..., Recipe]) -> LatentDiffusion:
    """The tiny Stable Diffusion in float32, freshly loaded: tests may change it."""
    return sd.load(tiny_recipe().model, CPU, torch.float32)


@pytest.fixture
def ranks() -> Ranks:
    """One rank alone on the CPU; its collectives are no-ops."""
    return Ranks(rank=0, world_size=1, local_rank=0, device=CPU)


@pytest.fixture
def terminal() -> Terminal:
    """A terminal that says nothing."""
    return Terminal(enabled=False)


@pytest.fixture(scope="session")
def server(of_all_processes: Path) -> Iterator[ForkServer]:
    """Runs verbs as processes of their own without importing everything each time."""
    server = ForkServer(of_all_processes)
    yield server
    server.close()


@pytest.fixture(scope="session")
def world(of_all_processes: Path, server: ForkServer) -> World:
    """A tiny world whose shards are made; runs go into folders of their own."""
    folder = once(of_all_processes / "world", lambda folder: make_world(folder, server))
    return World(folder, folder / "recipe.yaml", server)


@pytest.fixture(scope="session")
def uninterrupted(world: World) -> list[float]:
    """Losses of the world's own recipe: one rank, ZeRO-2, micro-batch 4 x accumulation 2."""
    return losses(once(world.folder / "uninterrupted", lambda run: world.train(run).succeeded()))


@pytest.fixture(scope="session")
def calm(world: World) -> Path:
    """The same run with the knobs of CALM, for curves that agree to rounding."""
    return once(world.folder / "calm", lambda run: world.train(run, *CALM).succeeded())


@pytest.fixture(scope="session")
def plain(calm: Path) -> list[float]:
    return losses(calm)


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Draws a picture of a size and a hue."""
    return draw_picture
