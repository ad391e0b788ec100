"""Training on shards of moments and of raw images: what the VAE does live, and by which key."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import EXIT_DATA
from cdpo.engine.models.tuning import tune_denoiser
from cdpo.engine.shards.batch import PairBatch
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.training.batch import BatchMaker
from cdpo.kernels.layout import sample_strides
from launching import CALM, World, losses

SHORT = (*CALM, "train.steps=4")
CPU, SIZE = torch.device("cpu"), (16, 16)
SAMPLED = "data.posterior=sampled"


# The batch


def batch_of(images: torch.Tensor, pair_ids: list[int], visit: int = 0) -> PairBatch:
    count = len(pair_ids)
    return PairBatch(
        images=images,
        prompts=["house"] * count,
        pair_ids=torch.tensor(pair_ids),
        visits=torch.full((count,), visit),
        tiers=torch.ones(count, dtype=torch.int64),
        ranks=torch.tensor([[1, 2]] * count),
        original_sizes=torch.full((2 * count, 2), 16),
        crops=torch.zeros(2 * count, 2, dtype=torch.int64),
    )


@pytest.fixture
def pixels() -> torch.Tensor:
    """Of two pairs, winners first: uint8 (4, 3, 16, 16)."""
    drawn = np.random.default_rng(0).integers(0, 256, (4, 3, *SIZE), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.fixture
def latents_by(tiny_recipe, tiny_backbone, monkeypatch):
    """The latents that a batch is corrupted from, by kind of shard and overrides."""

    def find(kind: str, batch: PairBatch, *overrides: str) -> torch.Tensor:
        maker = BatchMaker(tiny_recipe(*overrides), tiny_backbone, SIZE, CPU, kind)
        return maker._latents(batch)

    return find


def test_the_mean_is_the_same_from_every_kind(latents_by, tiny_backbone, pixels):
    moments = tiny_backbone.image_moments(pixels)
    wanted = tiny_backbone.vae.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean * 0.5
    for kind, images in (("latents", wanted), ("moments", moments), ("raw", pixels)):
        found = latents_by(kind, batch_of(images, [7, 8]))
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_lie_as_predictions_do_so_that_the_loss_copies_nothing(
    tiny_recipe, tiny_backbone, pixels, prediction_type
):
    tiny_backbone.noise.prediction_type = prediction_type
    pairs = batch_of(tiny_backbone.image_moments(pixels), [7, 8])
    recipes = [tiny_recipe(f"speed.channels_last={knob}") for knob in ("off", "on")]
    plain, ordered = (
        BatchMaker(recipe, tiny_backbone, SIZE, CPU, "moments").make(pairs) for recipe in recipes
    )
    assert plain.noisy.is_contiguous() and not ordered.noisy.is_contiguous()
    assert torch.equal(plain.noisy, ordered.noisy) and torch.equal(plain.target, ordered.target)
    tune_denoiser(recipes[1].speed, tiny_backbone)
    with torch.no_grad():
        predicted = tiny_backbone.predict(
            tiny_backbone.denoiser,
            ordered.noisy,
            ordered.draw.timesteps.repeat(2),
            ordered.conditioning,
        )
    for tensor in (ordered.noisy, ordered.target):
        assert sample_strides(tensor) == sample_strides(predicted)


def test_a_transformers_targets_stay_in_order(tiny_recipe, tiny_backbone, pixels):
    """As its predictions lie, which are rows of tokens put together."""
    recipe = tiny_recipe("model.backbone=sd3", "speed.channels_last=on")
    maker = BatchMaker(recipe, tiny_backbone, SIZE, CPU, "moments")
    batch = maker.make(batch_of(tiny_backbone.image_moments(pixels), [7, 8]))
    assert batch.noisy.is_contiguous() and batch.target.is_contiguous()


def test_a_sample_is_the_mean_and_noise_of_the_posteriors_width(latents_by, tiny_backbone, pixels):
    """Against the definition, z = mean + exp(log variance / 2) n: what is left is a normal n."""
    moments = tiny_backbone.image_moments(pixels)
    mean, log_variance = moments.chunk(2, dim=1)
    drawn = []
    for visit in range(40):
        batch = batch_of(moments, [7, 8], visit)
        z = latents_by("moments", batch, "data.format=moments", SAMPLED) / 0.5
        drawn.append((z - mean) / (log_variance / 2).exp())
    noise = torch.stack(drawn)
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    flat = noise.transpose(0, 1).flatten(1)
    apart = torch.corrcoef(flat) - torch.eye(4)
    assert apart.abs().max() < 0.05  # winners and losers, one pair and another


def test_raw_images_are_sampled_by_the_same_keys(latents_by, tiny_backbone, pixels):
    moments = batch_of(tiny_backbone.image_moments(pixels), [7, 8], visit=3)
    found = latents_by("raw", replace(moments, images=pixels), "data.format=raw", SAMPLED)
    wanted = latents_by("moments", moments, "data.format=raw", SAMPLED)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_sample_depends_on_pair_and_visit_and_not_on_the_batch(latents_by, tiny_backbone, pixels):
    moments = tiny_backbone.image_moments(pixels)

    def draw(rows: list[int], ids: list[int], visit: int = 0) -> torch.Tensor:
        batch = batch_of(moments[rows], ids, visit)
        return latents_by("moments", batch, "data.format=moments", SAMPLED)

    both = draw([0, 1, 2, 3], [7, 8])
    assert torch.equal(draw([1, 3], [8]), both[[1, 3]])
    assert torch.equal(draw([1, 0, 3, 2], [8, 7]), both[[1, 0, 3, 2]])
    assert not torch.equal(draw([1, 3], [8], visit=1), both[[1, 3]])
    assert not torch.equal(draw([1, 3], [9]), both[[1, 3]])


# Whole runs


@pytest.fixture(scope="module")
def shards(world: World) -> dict[str, Path]:
    """The world's pairs in every format."""
    found = {"latents": world.shards}
    for kind in ("moments", "raw"):
        run = world.folder / kind
        overrides = [f"run_dir={run}", f"data.format={kind}"]
        world.server.run("prepare", world.recipe, overrides).succeeded()
        found[kind] = run / "shards"
        assert load_manifest(found[kind]).kind == kind
    return found


def options(shards: dict[str, Path], kind: str, posterior: str = "sampled") -> list[str]:
    return [f"data.path={shards[kind]}", f"data.format={kind}", f"data.posterior={posterior}"]


@pytest.fixture(scope="module")
def sampled(world: World, shards: dict[str, Path]) -> dict[str, list[float]]:
    """Losses of undisturbed runs that sample the posterior."""
    found = {}
    for kind in ("moments", "raw"):
        run = world.folder / f"train_{kind}"
        world.train(run, *options(shards, kind)).succeeded()
        found[kind] = losses(run)
    return found


def test_the_same_pairs_in_every_format(shards: dict[str, Path]) -> None:
    first, *others = (load_manifest(folder) for folder in shards.values())
    for other in others:
        assert [(e.name, e.tier, e.count) for e in other.shards] == [
            (e.name, e.tier, e.count) for e in first.shards
        ]


@pytest.mark.parametrize("kind", ["moments", "raw"])
def test_losses_start_at_log_2_and_the_mean_trains_as_latents_do(
    world: World,
    shards: dict[str, Path],
    sampled: dict[str, list[float]],
    plain: list[float],
    tmp_path: Path,
    kind: str,
) -> None:
    world.train(tmp_path / kind, *options(shards, kind, "mean"), *SHORT).succeeded()
    # Latents were rounded to float16 where the others are not, or are before they are scaled.
    assert losses(tmp_path / kind) == pytest.approx(plain[:4], abs=2e-3)
    assert sampled[kind][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(map(math.isfinite, sampled[kind]))
    assert sampled["moments"][1:] != sampled["raw"][1:]


@pytest.mark.parametrize("kind", [pytest.param("moments", marks=pytest.mark.long), "raw"])
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    world: World,
    shards: dict[str, Path],
    sampled: dict[str, list[float]],
    tmp_path: Path,
    kind: str,
) -> None:
    run = tmp_path / "run"
    killed = world.train(run, *options(shards, kind), failpoint="train.step@4:kill")
    assert killed.code == -9
    world.train(run, *options(shards, kind)).succeeded()
    assert losses(run) == sampled[kind]


@pytest.mark.slow
def test_two_ranks_with_the_vae_live_agree_with_one(
    world: World, shards: dict[str, Path], tmp_path: Path
) -> None:
    for ranks in (1, 2):
        run = tmp_path / f"{ranks}"
        world.train(run, *options(shards, "raw"), *SHORT, ranks=ranks).succeeded()
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)


def test_means_cannot_be_sampled(world: World, shards: dict[str, Path], tmp_path: Path) -> None:
    outcome = world.train(tmp_path / "run", "data.format=moments", SAMPLED)
    outcome.refused(EXIT_DATA, "data.posterior=sampled")
    world.train(tmp_path / "run", SAMPLED).refused(2, "posterior=sampled")


def test_another_vae_may_read_raw_images_but_not_moments(
    world: World, shards: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(9)
    tiny.vae().save_pretrained(tmp_path / "vae")
    other = ("train.steps=1", f"model.vae={tmp_path / 'vae'}")
    world.train(tmp_path / "raw", *options(shards, "raw"), *other).succeeded()
    outcome = world.train(tmp_path / "moments", *options(shards, "moments"), *other)
    outcome.refused(EXIT_DATA, "model.vae")
