"""Diffusion-DPO against the published formula, worked by hand and recomputed in float64."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from batches import bare, constant, corrupted
from cdpo.engine.models import sd
from cdpo.engine.models.adapters import add_lora, twin_of
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.protocol import Conditioning
from cdpo.engine.objectives import Networks, build_objective
from cdpo.engine.recipe import Adapter, Objective
from torch import Tensor, nn

LOG_2 = math.log(2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def policy_and_reference(
    backbone: LatentDiffusion, perturb: float = 0.0
) -> tuple[nn.Module, nn.Module]:
    """The backbone's denoiser with an adapter, moved away from the reference, and its twin."""
    reference = twin_of(backbone.denoiser)
    policy = add_lora(backbone.denoiser, Adapter(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, perturb, generator=generator)
    return policy, reference


def test_by_hand():
    """One pair of one-pixel images, target 1, beta 20.

    winner: policy 0.9, reference 0.8; errors 0.01 and 0.04, so it gains 0.03
    loser:  policy 0.4, reference 0.5; errors 0.36 and 0.25, so it loses 0.11
    logit = -20/2 * ((0.01 - 0.04) - (0.36 - 0.25)) = -10 * -0.14 = 1.4
    loss  = -log sigmoid(1.4) = log(1 + exp(-1.4)) = 0.220417
    """
    policy = torch.tensor([0.9, 0.4]).view(2, 1, 1, 1)
    reference = torch.tensor([0.8, 0.5]).view(2, 1, 1, 1)
    objective = build_objective(Objective(beta=20))
    found = objective(Networks(constant(policy), constant(reference)), bare(torch.ones(1, 1, 1, 1)))
    torch.testing.assert_close(found.logits, torch.tensor([1.4]))
    torch.testing.assert_close(found.winner_error, torch.tensor([-0.03]))
    torch.testing.assert_close(found.loser_error, torch.tensor([0.11]))
    assert found.loss.item() == pytest.approx(0.220417, abs=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradients_are_those_of_the_formula_in_float64(tiny_backbone, prediction_type):
    """Of networks and loss together, in LoRA parameters: everything after the noise, again."""
    tiny_backbone.noise.prediction_type = prediction_type
    policy, reference = policy_and_reference(tiny_backbone, perturb=0.05)
    batch = corrupted(tiny_backbone, ["red apple", "house", "tree"])
    objective = build_objective(Objective(beta=300))
    found = objective(
        Networks(partial(tiny_backbone.predict, policy), partial(tiny_backbone.predict, reference)),
        batch,
    )
    found.loss.backward()

    policy64 = copy.deepcopy(policy).double()
    for parameter in policy64.parameters():
        parameter.grad = None
    reference64 = copy.deepcopy(reference).double()
    text = batch.conditioning.text.double()
    times = torch.cat([batch.draw.timesteps] * 2)
    target = batch.target.double()
    target = torch.cat([target, target]) if prediction_type == "epsilon" else target

    def errors(net: nn.Module) -> Tensor:
        prediction = net(batch.noisy.double(), times, encoder_hidden_states=text).sample
        return ((prediction - target) ** 2).mean(dim=(1, 2, 3))

    gains = errors(policy64) - errors(reference64).detach()
    logits = -300 / 2 * (gains[:3] - gains[3:])
    loss = -torch.log(torch.sigmoid(logits)).mean()
    loss.backward()

    assert logits.abs().min() > 1e-3  # the example says something
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.logits.double(), logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.winner_error.double(), gains[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loser_error.double(), gains[3:], rtol=0, atol=1e-6)
    expected = dict(policy64.named_parameters())
    trained = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    largest = max(expected[name].grad.abs().max() for name in trained)
    assert largest > 0
    for name, gradient in trained.items():
        torch.testing.assert_close(
            gradient.double(), expected[name].grad, rtol=0, atol=1e-4 * largest.item()
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fresh_adapter_starts_at_log_2_exactly(tiny_recipe, precision):
    backbone = sd.load(tiny_recipe().model, torch.device("cpu"), DTYPES[precision])
    policy, reference = policy_and_reference(backbone)
    found = build_objective(Objective(beta=5000))(
        Networks(partial(backbone.predict, policy.train()), partial(backbone.predict, reference)),
        corrupted(backbone, ["red apple", "house", "tree"]),
    )
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, torch.zeros(3))
    assert found.loss.item() == pytest.approx(LOG_2, abs=1e-6)
    assert not found.winner_error.any() and not found.loser_error.any()


def test_one_call_each_on_all_images_the_reference_first_and_without_a_graph(tiny_backbone):
    """And both see the very same noisy latents, timesteps and captions."""
    policy, reference = policy_and_reference(tiny_backbone, perturb=0.05)
    batch = corrupted(tiny_backbone, ["red apple", "house", "tree"])
    calls: list[tuple[str, bool, Tensor, Tensor, Conditioning]] = []

    def recorded(
        name: str, net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        calls.append((name, torch.is_grad_enabled(), noisy, timesteps, conditioning))
        return tiny_backbone.predict(net, noisy, timesteps, conditioning)

    build_objective(Objective())(
        Networks(partial(recorded, "policy", policy), partial(recorded, "reference", reference)),
        batch,
    )
    assert [call[:2] for call in calls] == [("reference", False), ("policy", True)]
    for _, _, noisy, timesteps, conditioning in calls:
        assert noisy is batch.noisy and len(noisy) == 6
        assert torch.equal(timesteps, torch.cat([batch.draw.timesteps] * 2))
        assert conditioning is batch.conditioning


@pytest.mark.parametrize("beta", [1.0, 200.0, 5000.0])
def test_beta_is_the_recipes_and_halved(tiny_recipe, beta):
    """Every form of the loss is in test_preference.py."""
    policy, reference, targets = 0.1 * torch.randn(3, 8, 2, 3, 5, dtype=torch.float64)
    target = targets[:4]
    networks = Networks(constant(policy.float()), constant(reference.float()))
    objective = build_objective(tiny_recipe(f"objective.beta={beta}").objective)
    found = objective(networks, bare(target.float()))
    policy_error, reference_error = (
        ((x - torch.cat([target, target])) ** 2).mean((1, 2, 3)) for x in (policy, reference)
    )
    gains = policy_error - reference_error
    logits = -beta / 2 * (gains[:4] - gains[4:])
    torch.testing.assert_close(found.logits.double(), logits, rtol=1e-4, atol=1e-6 * beta)
    expected = F.softplus(-logits).mean()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-4, atol=1e-6)
