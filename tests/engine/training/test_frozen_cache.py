"""The frozen-pass cache: what is kept gives the losses that asking gives, to the bit, and whatever
is wrong with it is named and asked for again.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import of_latents, train_a_little
from cdpo.engine.basics.errors import DataError, RecipeError
from cdpo.engine.models import load_backbone
from cdpo.engine.objectives import Loss, build_objective
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.batch import BatchMaker
from cdpo.engine.training.frozen.cache import FrozenCache
from cdpo.engine.training.frozen.place import close_cache, made_of, make_place, place_of
from cdpo.engine.training.networks import build_networks
from launching import CALM, World, losses, metrics
from refusals import refused

LOG_2 = math.log(2)
CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
CASES = {
    "sd": ("sd",),
    "sd, loss in PyTorch": ("sd", "objective.loss=ipo"),
    "sd, a reference of its own": ("sd", "adapter.type=full", "export.formats=[merged]"),
    "sdxl": ("sdxl",),
    "lcm teacher": ("lcm",),
    "lcm mixed": ("lcm", "objective.target=mixed"),
    "lcm image": ("lcm", "objective.target=image"),
}


class Steps:
    """Losses of batches of a recipe, with a cache in a folder; calls of frozen networks counted."""

    def __init__(self, recipe: Recipe, folder: Path, draws: int = 2) -> None:
        backbone = load_backbone(recipe.model, CPU, "fp32")
        objective = build_objective(recipe.objective)
        self.networks = build_networks(recipe, backbone, objective)
        self.maker = BatchMaker(recipe, backbone, (16, 16), CPU)
        self.folder, self.has_targets = folder, recipe.objective.needs_teacher
        self.draws = draws
        self.images_asked = 0
        for network in self.networks.frozen:
            network.register_forward_pre_hook(self._count)
        self.restart()

    def _count(self, network: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.images_asked += len(args[0])

    def restart(self, key: str = "k") -> None:
        """As a run that begins: with what lies on the disk."""
        self.cache = self.maker.cache = FrozenCache(
            self.folder,
            key,
            draws=self.draws,
            latent_shape=SHAPE,
            has_targets=self.has_targets,
            device=CPU,
        )

    @torch.no_grad()
    def __call__(self, *ids: int, visit: int = 0) -> Loss:
        return self.networks(self.maker.make(of_latents(*ids, visit=visit)))


@pytest.fixture
def written(recipe_of: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Recipes of tiny worlds by family, with a cache."""
    return lambda family, *overrides: recipe_of(family, "speed.frozen_cache=2", *overrides)


@pytest.fixture
def steps(written: Callable[..., Recipe], tmp_path: Path) -> Steps:
    return Steps(written("sd"), tmp_path)


def alike(one: Loss, other: Loss, rounding: float = 0.0) -> bool:
    """``rounding`` of errors that are around 1: of batches of other sizes, on some processors."""
    found = [(value, getattr(other, name)) for name, value in vars(one).items()]
    return all(
        ours is theirs or torch.allclose(ours, theirs, rtol=0.0, atol=rounding)
        for ours, theirs in found
    )


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("sd", "lcm mixed") else pytest.param(case, marks=pytest.mark.long)
        for case in CASES
    ],
)
def test_a_first_visit_and_a_kept_one_give_the_same_loss(
    written: Callable[..., Recipe], tmp_path: Path, case: str
) -> None:
    steps = Steps(written(*CASES[case]), tmp_path)
    ids = (0, 1, 2, 3, 5)  # among them timesteps of the last quarter, and others
    start = 0.25 if "PyTorch" in case else LOG_2
    assert steps(*ids).loss.item() == pytest.approx(start, abs=1e-6)
    steps.cache.write()
    steps.restart()
    assert steps(*ids).loss.item() == pytest.approx(start, abs=1e-6)

    train_a_little(steps.networks.policy)
    kept = steps(*ids)
    asked = steps.images_asked
    # A visit later by the number of draws is the same one; another is not
    assert alike(kept, steps(*ids, visit=2)) and steps.images_asked == asked
    assert not torch.equal(kept.logits, steps(*ids, visit=1).logits)
    # In a cache that is empty all is asked for again
    steps.folder = tmp_path / "empty"
    steps.restart()
    steps.images_asked = 0
    assert alike(kept, steps(*ids))
    assert (
        steps.images_asked == len(ids) * build_objective(steps.maker.recipe.objective).frozen_passes
    )
    steps.maker.cache = None
    live = steps(*ids)
    # Half precision of the target: 1e-3 of predictions around 1
    atol = 0.05 if steps.has_targets else 1e-3
    torch.testing.assert_close(kept.logits, live.logits, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("case", [pytest.param("sd", marks=pytest.mark.long), "lcm mixed"])
def test_of_a_batch_only_what_is_missing_is_asked_for(
    written: Callable[..., Recipe], tmp_path: Path, case: str
) -> None:
    steps = Steps(written(*CASES[case]), tmp_path)
    train_a_little(steps.networks.policy)
    passes = build_objective(steps.maker.recipe.objective).frozen_passes
    separate = [steps(pair, 7).logits[0].item() for pair in (0, 1, 2, 3)]
    steps.folder = tmp_path / "b"
    steps.restart()
    steps(1, 3), steps.cache.write()
    steps.images_asked = 0
    mixed = steps(0, 1, 2, 3, 0)  # the first comes twice: it is asked about once
    assert steps.images_asked == 2 * passes
    assert mixed.logits[:4].tolist() == pytest.approx(separate, rel=1e-3, abs=2e-3)
    assert mixed.logits[4] == mixed.logits[0]
    assert alike(mixed, steps(0, 1, 2, 3, 0)) and steps.images_asked == 2 * passes
    assert (steps.cache.served, steps.cache.asked) == (3 + 5, 2 + 5 + 5)


def test_compiled_networks_are_asked_about_whole_batches(steps: Steps) -> None:
    steps(1), steps.cache.write()
    steps.cache.whole, steps.images_asked = True, 0
    steps(0, 1, 2)
    assert steps.images_asked == 6
    steps.cache.write()
    assert len(steps.cache) == 3  # the one that was kept already is kept once


def test_what_is_not_finite_is_not_kept(steps: Steps) -> None:
    with torch.no_grad():
        kept = steps.networks.reference.conv_out.bias.clone()
        steps.networks.reference.conv_out.bias.fill_(math.inf)
        steps(0), steps.cache.write()
        steps.networks.reference.conv_out.bias.copy_(kept)
    assert len(steps.cache) == 0 and steps.cache.lacks(torch.tensor([0]), torch.tensor([0]))
    assert steps(0).loss.isfinite()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flipped(path: Path) -> None:
    """A bit of the last number: of a target, where there are some."""
    data = bytearray(path.read_bytes())
    data[-1 if b"targets" in data[:4000] else -8] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("case", "damage"),
    [
        ("sd", torn),
        ("lcm teacher", flipped),
        *(pytest.param("sd", damage, marks=pytest.mark.long) for damage in (flipped, empty)),
        *(pytest.param("lcm teacher", damage, marks=pytest.mark.long) for damage in (torn, empty)),
    ],
)
def test_a_damaged_file_is_named_and_what_it_held_is_asked_for_again(
    written: Callable[..., Recipe], tmp_path: Path, case: str, damage: Callable[[Path], None]
) -> None:
    steps = Steps(written(*CASES[case]), tmp_path)
    train_a_little(steps.networks.policy)
    steps.images_asked = 0
    whole, asked_whole = steps(0, 1), steps.images_asked
    steps.cache.write()
    [path] = tmp_path.glob("*.safetensors")
    damage(path)
    steps.restart()
    steps.images_asked = 0
    again = steps(0, 1)
    assert steps.images_asked in (asked_whole // 2, asked_whole)  # of one pair or of both
    assert alike(whole, again, rounding=0.0 if steps.images_asked == asked_whole else 1e-4)
    [problem] = steps.cache.problems
    assert problem.startswith(f"{path}: ")
    warned: list[str] = []
    told: Any = SimpleNamespace(warn=warned.append)
    assert close_cache(steps.cache, Ranks(0, 1, 0, CPU), told).damaged == 1
    assert len(warned) == 1 and problem in warned[0]
    steps.restart()
    assert alike(again, steps(0, 1)) and steps.cache.served == 2


def test_two_runs_fill_one_cache_and_another_key_sees_nothing_of_it(steps: Steps) -> None:
    one = steps.cache
    steps(0, 1)
    steps.restart()
    two = steps.cache
    steps(1, 2)
    one.write(), two.write()
    steps.restart()
    assert len(steps.cache) == 4 and steps.cache.problems == []  # one of them twice
    steps(0, 1, 2)
    assert steps.cache.served == 3
    steps.restart("another")
    assert len(steps.cache) == 0 and len(steps.cache.problems) == 2


def test_a_full_disk_is_one_line(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    steps(0)
    monkeypatch.setattr(os, "fsync", full)
    with refused(DataError, "unwritable"):
        steps.cache.write()
    assert list(steps.folder.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# What decides


def test_beta_and_the_loss_do_not_decide_what_is_kept_and_the_rest_does(
    written: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cdpo.engine.training.frozen.place as place

    monkeypatch.setattr(place, "trained_parts", lambda backbone: {"model": "m"})
    monkeypatch.setattr(place, "manifest_hash", lambda manifest: "s")
    tuning = SimpleNamespace(
        channels_last=False, fused_kernels=False, attention="sdpa", compile="off"
    )
    backbone = SimpleNamespace(device=CPU)

    def key(*overrides: str) -> object:
        return made_of(written("sd", *overrides), backbone, tuning, None)  # type: ignore[arg-type]

    for free in ("objective.beta=1", "train.optimizer.lr=1", "objective.loser_gradient=0.5"):
        assert key(free, "objective.loss=ipo", "speed.frozen_cache=8") == key()
    for bound in ("seed=4", "train.precision=bf16", "train.caption_dropout=0.5"):
        assert key(bound) != key()
    assert key("objective.distance=pseudo_huber") != key()
    huber = "objective.distance=pseudo_huber"
    assert key(huber, "objective.huber_c=0.1") != key(huber)
    before = key()
    tuning.channels_last = True
    assert key() != before


@pytest.mark.parametrize(
    "wrong",
    [
        ("speed.frozen_cache=-1",),
        ("speed.frozen_cache=2", "objective.type=sft"),
        ("speed.frozen_cache=0", "speed.frozen_cache_at=x"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_recipe: Callable[..., Recipe], wrong: tuple[str]):
    with pytest.raises(RecipeError, match="frozen_cache"):
        tiny_recipe(*wrong)


def test_a_place_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place, kind in ((tmp_path / "file", "wrong-type"), (tmp_path / "file" / "x", "unwritable")):
        recipe = tiny_recipe("speed.frozen_cache=1", f"speed.frozen_cache_at={place}")
        with refused(RecipeError, kind):
            make_place(recipe)
    beside = tiny_recipe("speed.frozen_cache=1", f"data.path={tmp_path}/set")
    assert place_of(beside) == tmp_path / "set.frozen"
    away = tiny_recipe("speed.frozen_cache=1", "data.path=https://x.org/set")
    assert place_of(away) == Path(os.environ["XDG_CACHE_HOME"]) / "cdpo" / "frozen"


# --------------------------------------------------------------------------------------------------
# Through the real trainer


def test_a_reference_that_moves_is_refused(steps: Steps) -> None:
    recipe = steps.maker.recipe
    moving = SimpleNamespace(type="diffusion_dpo", reference_ema=0.99)
    with pytest.raises(ValueError, match="reference_ema"):
        Recipe._check_frozen_cache(SimpleNamespace(speed=recipe.speed, objective=moving))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def filled(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run that fills its cache as it goes, and the cache of `cdpo cache fill`, which under `auto`
    takes the micro-batches of its checkpoints.
    """
    folder = tmp_path_factory.mktemp("filled")
    run, cache = folder / "run", f"speed.frozen_cache_at={folder / 'ahead'}"
    own = f"speed.frozen_cache_at={folder / 'own'}"
    outcome = world.train(run, *CALM, "speed.frozen_cache=1", own).succeeded()
    assert "10 of 48 pairs were served from the cache (20.8%), 38 asked for" in outcome.text
    where = [f"run_dir={run}", f"data.path={world.shards}", "train.micro_batch=auto"]
    outcome = world.server.run(
        "cache", world.recipe, [*where, *CALM, "speed.frozen_cache=1", cache]
    )
    assert "38 draws of pairs asked for" in outcome.succeeded().text
    yield run, cache


def test_a_run_filled_ahead_is_the_run_that_fills(
    world: World, filled: tuple[Path, str], plain: list[float], tmp_path: Path
) -> None:
    run, cache = filled
    world.train(tmp_path, *CALM, "speed.frozen_cache=1", cache).succeeded()
    assert losses(tmp_path) == losses(run)
    assert [row["cached"] for row in metrics(tmp_path)] == [1] * 6
    assert losses(run)[:2] == pytest.approx(plain[:2], abs=1e-5)  # the first visits draw the same
    assert losses(run)[0] == pytest.approx(LOG_2, abs=1e-6)
    changed = world.train(tmp_path, *CALM, "speed.frozen_cache=2", cache, "train.steps=8")
    changed.refused(5, "speed.frozen_cache")


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_and_two_ranks_come_to_the_same(
    world: World, filled: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = filled
    knobs = (*CALM, "speed.frozen_cache=1", f"speed.frozen_cache_at={tmp_path / 'cache'}")
    world.train(tmp_path / "a", *knobs, failpoint="frozen.write@2:kill")
    world.train(tmp_path / "a", *knobs, failpoint="checkpoint.manifest@2:kill")
    world.train(tmp_path / "a", *knobs).succeeded()
    assert losses(tmp_path / "a") == losses(run)
    world.train(tmp_path / "b", *knobs, ranks=2).succeeded()
    assert [row["cached"] for row in metrics(tmp_path / "b")] == [1] * 6
    assert losses(tmp_path / "b") == pytest.approx(losses(run), abs=1e-5)
    new = (*CALM, "speed.frozen_cache=1", f"speed.frozen_cache_at={tmp_path / 'new'}")
    world.train(tmp_path / "c", *new, ranks=2, failpoint="train.step@4:kill/rank1")
    world.train(tmp_path / "c", *new, ranks=2).succeeded()
    assert losses(tmp_path / "c") == pytest.approx(losses(run), abs=1e-5)
