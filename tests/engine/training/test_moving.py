"""What of a loss moves: the reference's average and beta, against their recursions written out."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cdpo.engine.basics.errors import DataError, RecipeError
from cdpo.engine.models import Conditioning, Draw, sd
from cdpo.engine.objectives import Loss, TrainingBatch, build_objective, rank_weights
from cdpo.engine.recipe import Objective
from cdpo.engine.training.batch import BatchMaker, ranked_candidates
from cdpo.engine.training.moving import FILE, Moving
from cdpo.engine.training.networks import build_networks
from launching import CALM, World, losses, metrics, zero_config
from refusals import refused
from torch import Tensor, nn

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def moving(policy: nn.Module | None = None, reference: nn.Module | None = None, **spec) -> Moving:  # type: ignore[no-untyped-def]
    nothing = nn.Module()
    return Moving(Objective(**spec), policy or nothing, reference or nothing, CPU)


def margins(logits: Tensor) -> Loss:
    return Loss(logits.mean(), logits, logits, logits)


def draw(pairs: int = 2) -> Draw:
    return Draw(torch.tensor([100, 700])[:pairs], noise_keys=torch.zeros(pairs, 4).long())


def batch(weights: Tensor | None = None) -> TrainingBatch:
    noisy, noise = (torch.randn(n, 4, 8, 8, generator=GENERATOR) for n in (4, 2))
    text = torch.randn(2, 9, 16, generator=GENERATOR)
    conditioning = Conditioning(torch.cat([text, text]))
    return TrainingBatch(noisy, noise, draw(), conditioning, weights)


# The reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_the_average_rounded_once_and_resumes_exactly(tmp_path, dtype):
    policy, reference, resumed = (nn.Linear(3, 2).to(dtype) for _ in range(3))
    policy.bias.requires_grad_(False)
    frozen = reference.bias.detach().clone()
    average = policy.weight.detach().double()
    ours = moving(policy, reference, reference_ema=0.9)
    for _ in range(5):
        policy.weight.data += torch.randn(2, 3, generator=GENERATOR).to(dtype)
        ours.skip()  # nothing moves
        assert ours.step() == {}
        average = 0.9 * average + 0.1 * policy.weight.detach().double()
    expected = average.to(dtype)
    torch.testing.assert_close(reference.weight.detach(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours._averages["weight"].double(), average, rtol=1e-5, atol=1e-6)
    assert torch.equal(reference.bias, frozen)
    ours.write(tmp_path)
    again = moving(policy, resumed, reference_ema=0.9)
    again.read(tmp_path)
    assert torch.equal(resumed.weight, reference.weight)
    policy.weight.data += 1
    ours.step()
    again.step()
    assert torch.equal(resumed.weight, reference.weight)


def test_a_reference_that_moves_starts_as_the_base_and_trains_nothing(tiny_recipe) -> None:
    recipe = tiny_recipe("objective.reference_ema=0.5")
    backbone = sd.load(recipe.model, CPU, torch.float32)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    given = batch()
    loss = networks(given)
    assert not loss.logits.any()
    assert loss.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    trained = {n: p for n, p in networks.policy.named_parameters() if p.requires_grad}
    theirs = dict(networks.reference.named_parameters())
    for name, parameter in networks.policy.named_parameters():
        assert not theirs[name].requires_grad
        assert (theirs[name].data_ptr() == parameter.data_ptr()) == (name not in trained)
    assert {id(p) for p in networks.base.parameters()} <= {
        id(p) for n, p in networks.policy.named_parameters() if n not in trained
    }
    ours = Moving(recipe.objective, networks.policy, networks.reference, CPU)
    for parameter in trained.values():
        parameter.data += 0.5
    ours.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(theirs[name] + 0.25, parameter.detach())
    assert networks(given).logits.any()


# Beta


@pytest.mark.parametrize(("type", "half"), [("diffusion_dpo", 0.5), ("consistency_dpo", 1.0)])
def test_beta_brings_the_mean_logit_to_the_target(type, half):
    ours = moving(type=type, beta=100, target_logit=1.5)
    average, weights = 0.0, torch.tensor([0.5, 1.5])
    for step in range(6):
        sizes = torch.rand(4, generator=GENERATOR).double() * (step + 1) / 50 * (step > 0)
        scale = min(max(1.5 / average, 100 * half / 30), 100 * half * 30) if average else 100 * half
        factor = ours.weighted(batch()).weights
        assert factor.tolist() == pytest.approx([scale / (100 * half)] * 2)
        assert torch.equal(ours.weighted(batch(weights)).weights, weights * factor)
        ours.add(margins(torch.tensor([float("nan")] * 2)))
        ours.skip()  # of a skipped step nothing counts
        for part in sizes.chunk(2):
            ours.add(margins(scale * part * torch.tensor([1, -1])))
        assert ours.step()["beta"].item() == pytest.approx(scale / half)
        mean = sizes.mean().item()
        average = 0.99 * average + 0.01 * mean if average else mean
    assert ours._beta.margin.item() == pytest.approx(average)


@pytest.mark.parametrize(("margin", "most"), [(1e-9, 30), (1e9, 1 / 30)])
def test_beta_stays_near_the_recipes_and_resumes_exactly(tmp_path, margin, most):
    ours = moving(beta=2, target_logit=1)
    ours.add(margins(torch.full((2,), margin)))
    assert ours.step()["beta"] == 2
    assert ours.weighted(batch()).weights.tolist() == pytest.approx([most] * 2)
    again = moving(beta=2, target_logit=1)
    again.read(tmp_path)  # of a checkpoint that knew of no target: it starts here
    assert not again._beta.margin
    ours.write(tmp_path)
    again.read(tmp_path)
    assert torch.equal(again._beta.margin, ours._beta.margin)


def test_nothing_moves_by_default(tmp_path):
    ours, given = moving(), batch()
    assert ours.weighted(given) is given
    assert ours.step() == {}
    ours.write(tmp_path)
    ours.read(tmp_path)
    assert not (tmp_path / FILE).exists()


# Ranks


def test_a_batch_weighs_its_pairs_by_their_ranks(tiny_recipe, tiny_backbone):
    recipe = tiny_recipe("objective.pair_weighting=rank")
    maker = BatchMaker(recipe, tiny_backbone, (16, 16), CPU, candidates=4)
    ranks = torch.tensor([[1, 4], [2, 3]])
    assert torch.equal(maker._shares_of(ranks), rank_weights(4)[[1, 2], [4, 3]])
    with refused(DataError, "mismatch", "objective.pair_weighting"):
        maker._shares_of(torch.tensor([[1, 5]]))


def manifest(candidates: int, imported=None, type: str = "clip") -> SimpleNamespace:  # type: ignore[no-untyped-def]
    counts = SimpleNamespace(prompts=3, candidates=candidates, imported=imported)
    return SimpleNamespace(statistics=counts, reward=SimpleNamespace(type=type))


def test_ranks_count_where_all_prompts_have_as_many(tiny_recipe):
    recipe = tiny_recipe("objective.pair_weighting=rank")
    assert ranked_candidates(tiny_recipe(), manifest(10)) is None
    assert ranked_candidates(recipe, manifest(12)) == 4
    for other in (manifest(10), manifest(12, imported={}), manifest(12, type="masked")):
        with refused(DataError, "unsupported", "objective.pair_weighting"):
            ranked_candidates(recipe, other)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (
            ("objective.reference_ema=0.9", "adapter.type=full", "export.formats=[merged]"),
            "objective",
        ),
        (
            (
                "objective.pair_weighting=rank",
                "prepare.source.type=masked",
                "prepare.source.fractions=[0.9,0.5,0.1]",
            ),
            "objective",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_recipe, overrides, key):
    with pytest.raises(RecipeError, match=key):
        tiny_recipe(*overrides)


# A run


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2])
def test_a_killed_run_of_all_of_it_goes_on_bit_for_bit(world: World, tmp_path: Path, zero: int):
    """And on one rank with another stage, to rounding."""
    knobs = [*CALM, "train.steps=4", "checkpoint.every=2", "objective.loser_safeguard=0.5"]
    knobs += ["objective.loss=linear", "objective.reference_ema=0.5", "objective.target_logit=1"]
    knobs += [f"deepspeed={zero_config(tmp_path / 'zero.json', zero)}"]
    knobs += ["objective.pair_weighting=rank"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    world.train(whole, *knobs, ranks=2).succeeded()
    world.train(killed, *knobs, ranks=2, failpoint="train.step@4:kill")
    world.train(killed, *knobs, ranks=2).succeeded()
    assert losses(killed) == losses(whole)
    rows = metrics(whole)
    assert [row["beta"] for row in rows] == [row["beta"] for row in metrics(killed)]
    assert rows[0]["loss"] == 0 and rows[0]["beta"] == rows[1]["beta"] == 500
    assert rows[2]["beta"] != 500
    assert all(0 <= row["loser_kept"] <= 1 for row in rows)
    elastic = tmp_path / "elastic"
    world.train(elastic, *knobs, ranks=2, failpoint="train.step@4:kill")
    knobs += [f"deepspeed={zero_config(tmp_path / 'other.json', 3 - zero)}"]
    world.train(elastic, *knobs, ranks=1).succeeded()
    assert losses(elastic) == pytest.approx(losses(whole), rel=1e-3, abs=1e-5)
    assert metrics(elastic)[-1]["beta"] == pytest.approx(rows[-1]["beta"], rel=1e-4)
