"""paired_differences: the numbers inside the loss, differentiable for losses of all forms."""

import pytest
import torch
from cdpo.kernels import paired_differences, paired_dpo_loss


@pytest.mark.parametrize("distance", ["mse", "pseudo_huber"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_built_on_the_same_differences(distance, cached):
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, 2, 5, generator=generator).requires_grad_()
    target = torch.randn(3, 2, 5, generator=generator)
    reference = torch.randn(6, 2, 5, generator=generator)
    options = {"distance": distance, "slopes": torch.tensor([0.5, -2.0, 3.0])}
    if cached:
        reference = paired_differences(reference, reference, target, **options).policy_error
    options |= {"loser_gradient": 0.7, "safeguard": 0.6}
    found = paired_differences(policy, reference, target, **options)
    loss = paired_dpo_loss(policy, reference, target, 3.0, **options)
    torch.testing.assert_close(-3.0 * found.margin.detach(), loss.logits)
    for name in ("policy_error", "reference_error", "loser_kept"):
        assert torch.equal(getattr(found, name), getattr(loss, name))
    again = -torch.nn.functional.logsigmoid(-3.0 * found.margin).mean()
    grads = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (again, loss.loss)]
    torch.testing.assert_close(*grads)


def test_gradcheck():
    policy = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    reference, target = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    for distance in ("mse", "pseudo_huber"):
        options = {"distance": distance, "huber_c": 0.1, "slopes": torch.tensor([0.5, -2.0])}
        assert torch.autograd.gradcheck(
            lambda p, o=options: paired_differences(p, reference, target, **o).margin, policy
        )


def test_bad_input():
    with pytest.raises(ValueError, match=r"target is \(3, 3\); it must be \(4, 3\)"):
        paired_differences(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3, 3))
