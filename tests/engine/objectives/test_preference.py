"""Every form of the preference loss against its published formula in float64."""

import math

import pytest
import torch
from cdpo.engine.objectives.preference import PreferenceLoss
from cdpo.engine.recipe import Objective
from cdpo.kernels import paired_dpo_loss
from pydantic import ValidationError
from torch import Tensor

PAIRS, SCALE = 5, 30.0


def predictions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference (2B, ...), target (B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(2 * PAIRS, 3, 4, generator=generator)
    reference = policy + 0.2 * torch.randn(2 * PAIRS, 3, 4, generator=generator)
    return policy, reference, torch.randn(PAIRS, 3, 4, generator=generator)


def errors(prediction: Tensor, target: Tensor, spec: Objective) -> Tensor:
    x = prediction.double() - torch.cat([target, target]).double()
    terms = x**2 if spec.distance == "mse" else (x**2 + spec.huber_c**2).sqrt() - spec.huber_c
    return terms.flatten(1).mean(1)


def published(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    spec: Objective,
    weights: Tensor | None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, logits), each form written out as its paper has it."""
    gains = errors(policy, target, spec) - errors(reference, target, spec)
    ratio = -(gains[:PAIRS] - gains[PAIRS:]) * (1.0 if weights is None else weights.double())
    logits = SCALE * ratio
    if spec.loss == "ipo":
        return SCALE**2 * _mean((ratio - 1 / (2 * SCALE)) ** 2, shares), logits
    if spec.loss == "linear":
        utility = [min(max(0.5 - 0.2 * z, 0.01), 0.99) for z in logits.tolist()]
        return -SCALE * _mean(torch.tensor(utility, dtype=torch.float64) * ratio, shares), logits
    right, wrong = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
    smoothing = spec.label_smoothing
    return -_mean((1 - smoothing) * right + smoothing * wrong, shares), logits


def _mean(losses: Tensor, shares: Tensor | None) -> Tensor:
    return losses.mean() if shares is None else (losses @ shares.double()) / PAIRS


FORMS = [{}, {"label_smoothing": 0.1}, {"loss": "ipo"}, {"loss": "linear"}]


@pytest.mark.parametrize("shares", [None, torch.linspace(1.9, 0.1, PAIRS)], ids=["", "shared"])
@pytest.mark.parametrize("weights", [None, torch.linspace(0.2, 1.8, PAIRS)], ids=["", "weighted"])
@pytest.mark.parametrize("distance", ["mse", "pseudo_huber"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_loss_logits_and_gradient_are_those_of_the_formula(options, distance, weights, shares):
    weighting = "uniform" if shares is None else "rank"
    spec = Objective(distance=distance, huber_c=0.05, pair_weighting=weighting, **options)
    policy, reference, target = predictions()
    leaf, exact = policy.clone().requires_grad_(), policy.double().requires_grad_()
    found = PreferenceLoss(spec, SCALE)(leaf, reference, target, weights, shares=shares)
    loss, logits = published(exact, reference, target, spec, weights, shares)
    assert logits.abs().min() > 1e-2  # the example says something
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits.double(), logits.detach(), rtol=1e-5, atol=1e-5)
    found.loss.backward()
    loss.backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    gains = (errors(policy, target, spec) - errors(reference, target, spec)).chunk(2)
    torch.testing.assert_close(found.winner_error.double(), gains[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loser_error.double(), gains[1], rtol=0, atol=1e-6)
    assert not any(x.requires_grad for x in (found.logits, found.winner_error, found.loser_error))


@pytest.mark.parametrize(
    ("options", "at_start"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.3}, math.log(2)),
        ({"loss": "ipo"}, 0.25),
        ({"loss": "linear"}, 0),
        ({"loser_gradient": 0.5}, math.log(2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_identical_networks_start_at_the_known_loss(options, at_start, dtype):
    policy, _, target = predictions()
    policy = policy.to(dtype)
    found = PreferenceLoss(Objective(**options), 2500.0)(policy, policy.clone(), target, None)
    assert not found.logits.any()
    assert found.loss.item() == pytest.approx(at_start, abs=1e-6)


@pytest.mark.parametrize("distance", ["mse", "pseudo_huber"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_safeguard_keeps_of_each_loser_what_its_winner_bears(options, distance):
    policy, reference, target = predictions()
    policy[PAIRS:] += 0.8 * policy[:PAIRS]  # losers that pull where their winners do
    spec = Objective(distance=distance, huber_c=0.05, **options)
    grads = []
    for safeguard in (None, 0.6):
        leaf = policy.clone().requires_grad_()
        guarded = spec.model_copy(update={"loser_safeguard": safeguard})
        found = PreferenceLoss(guarded, SCALE)(leaf, reference, target, None)
        found.loss.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.double().flatten(1))
    plain, held = grads
    exact = policy.double().requires_grad_()
    errors(exact, target, spec).sum().backward()
    assert exact.grad is not None
    winner, loser = exact.grad.flatten(1).chunk(2)
    shared = (winner * loser).sum(1)
    kept = (0.4 * (winner**2).sum(1) / shared).clamp(max=1).where(shared > 0, torch.ones(PAIRS))
    assert found.loser_kept is not None
    torch.testing.assert_close(found.loser_kept.double(), kept, rtol=1e-4, atol=1e-6)
    assert kept.min() < 0.6 and kept.max() > kept.min()  # the example says something
    torch.testing.assert_close(held[:PAIRS], plain[:PAIRS])
    torch.testing.assert_close(held[PAIRS:], kept[:, None] * plain[PAIRS:], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_damping_scales_the_losers_gradient_and_nothing_else(kept, loss):
    policy, reference, target = predictions()
    results = []
    for share in (1.0, kept):
        leaf = policy.clone().requires_grad_()
        spec = Objective(loss=loss, loser_gradient=share)
        found = PreferenceLoss(spec, SCALE)(leaf, reference, target, None)
        found.loss.backward()
        assert leaf.grad is not None
        results.append((found.loss.detach(), found.logits, leaf.grad))
    (loss_1, logits_1, grad_1), (loss_k, logits_k, grad_k) = results
    torch.testing.assert_close(loss_k, loss_1)
    torch.testing.assert_close(logits_k, logits_1)
    torch.testing.assert_close(grad_k[:PAIRS], grad_1[:PAIRS])
    torch.testing.assert_close(grad_k[PAIRS:], kept * grad_1[PAIRS:])
    assert grad_1[PAIRS:].abs().max() > 1e-3


def test_weights_and_shares_of_the_loser_stay_in_the_fused_kernel(monkeypatch):
    calls = []

    def recorded(*args, **options):  # type: ignore[no-untyped-def]
        calls.append(options)
        return paired_dpo_loss(*args, **options)

    monkeypatch.setattr("cdpo.engine.objectives.preference.paired_dpo_loss", recorded)
    spec = Objective(distance="pseudo_huber", huber_c=0.01)
    found = PreferenceLoss(spec, SCALE)(*predictions(), None)
    same = PreferenceLoss(spec, SCALE)(*predictions(), torch.ones(PAIRS), torch.ones(PAIRS))
    guarded = spec.model_copy(update={"loser_gradient": 0.5, "loser_safeguard": 0.9})
    held = PreferenceLoss(guarded, SCALE)(*predictions(), None)
    assert [(c["loser_gradient"], c["safeguard"]) for c in calls] == [(1, None)] * 2 + [(0.5, 0.9)]
    for other in (same, held):  # the same value, whatever becomes of the gradient
        assert torch.equal(other.loss, found.loss)
        assert torch.equal(other.logits, found.logits)


def test_loss_is_finite_where_the_sigmoid_underflows():
    policy, reference, target = predictions()
    found = PreferenceLoss(Objective(label_smoothing=0.1), 1e7)(policy, reference, target, None)
    assert found.logits.abs().max() > 1e4
    assert found.loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 needs loss=sigmoid"),
        ({"type": "sft", "loser_gradient": 0.5}, "loser_gradient has no effect with type=sft"),
        ({"type": "sft", "loser_safeguard": 0.9}, "loser_safeguard has no effect with type=sft"),
        ({"type": "sft", "pair_weighting": "rank"}, "pair_weighting has no effect with type=sft"),
        ({"type": "sft", "reference_ema": 0.9}, "reference_ema has no effect with type=sft"),
        ({"type": "sft", "target_logit": 1}, "target_logit has no effect with type=sft"),
        ({"loss": "ipo", "target_logit": 1.5}, "target_logit=1.5 does not go with loss=ipo"),
        ({"loss": "linear", "label_smoothing": 0.1}, "label_smoothing=0.1 needs loss=sigmoid"),
        ({"reference_ema": 1}, "less than 1"),
        ({"target_logit": 0}, "greater than 0"),
        ({"loser_safeguard": 1.5}, "less than or equal to 1"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loser_gradient": 1.5}, "less than or equal to 1"),
        (
            {"type": "consistency_dpo", "timestep_weighting": "min_snr"},
            "min_snr is for diffusion models",
        ),
        ({"target": "image"}, "target=image has no effect with type=diffusion_dpo"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Objective(**options)
