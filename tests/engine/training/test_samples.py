"""Sample rows during training: when they are due; a row shows the same prompts and seeds."""

import numpy as np
import pytest
import torch
from cdpo.engine.training.samples import TrainingSamples, progression
from PIL import Image


def pixels(path: object) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def samples(tiny_recipe, tiny_backbone, ranks) -> TrainingSamples:
    recipe = tiny_recipe(
        "train.steps=10", "train.sample_every=4", "train.sample_prompts=2", "compare.batch_size=3"
    )
    return TrainingSamples(recipe, tiny_backbone, ranks)


def test_due_at_the_start_every_n_steps_and_at_the_end(samples):
    assert [step for step in range(11) if samples.is_due(step)] == [0, 4, 8, 10]


def test_a_picture_that_exists_is_not_drawn_again(samples, tiny_backbone):
    samples.draw(tiny_backbone.denoiser, 4)
    assert not samples.is_due(4) and samples.is_due(8)
    assert [path.name for path in samples.folder.iterdir()] == ["step-00000004.png"]


def test_never_due_when_turned_off(tiny_recipe, tiny_backbone, ranks):
    recipe = tiny_recipe("train.sample_every=0")
    assert not any(TrainingSamples(recipe, tiny_backbone, ranks).is_due(step) for step in range(7))


def test_a_row_is_training_prompts_then_held_out_ones(samples, tiny_backbone):
    assert samples.prompts == ["red apple", "grinning face", "dog face", "green book"]
    samples.draw(tiny_backbone.denoiser, 0)
    assert pixels(samples.path(0)).shape == (16, 4 * 16, 3)


def test_what_changes_from_row_to_row_is_the_policy(samples, tiny_backbone):
    policy = tiny_backbone.denoiser
    for step in (0, 4):
        samples.draw(policy, step)
    assert np.array_equal(pixels(samples.path(0)), pixels(samples.path(4)))
    with torch.no_grad():
        policy.conv_out.weight.mul_(1.5)
    samples.draw(policy, 8)
    assert not np.array_equal(pixels(samples.path(0)), pixels(samples.path(8)))


def test_other_ranks_draw_along_but_do_not_write(samples, tiny_backbone, monkeypatch):
    monkeypatch.setattr(type(samples.ranks), "is_first", False)
    calls: list[int] = []
    tiny_backbone.denoiser.register_forward_hook(lambda *_: calls.append(1))
    samples.draw(tiny_backbone.denoiser, 0)
    assert calls and not samples.folder.exists()


def test_progression_is_a_grid_of_all_rows_in_order(samples, tiny_backbone):
    assert progression(samples.folder, (16, 16)) is None
    for step in (8, 0):
        samples.draw(tiny_backbone.denoiser, step)
    grid = progression(samples.folder, (16, 16))
    assert grid is not None
    assert grid.height >= 2 * 16 and grid.width >= 4 * 16
