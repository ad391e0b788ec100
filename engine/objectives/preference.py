"""From predictions to a preference loss, for every objective that compares winner and loser.

With ``d = e^policy - e^reference`` of an image, B pairs, a pair's weight w of mean 1 over timesteps
(see ``weighting.py``) and ``logit = -scale * w * (d_winner - d_loser)``:

====================  ==============================================================  ============
``loss=sigmoid``      ``-mean logsigmoid(logit)``                                     DPO [1]
``label_smoothing``   ``-mean [(1 - s) logsigmoid(logit) + s logsigmoid(-logit)]``    cDPO [2]
``loss=ipo``          ``mean (logit - 1/2)^2``                                        IPO [3]
``loss=linear``       ``-mean u * logit``, the gradient not through                   Linear [5]
                      ``u = clip(1/2 - 0.2 logit, 0.01, 0.99)``
``pair_weighting``    each pair's loss times its share (see ``rank_weights.py``)      RankDPO [6]
``loser_gradient``    the loss as it is, the gradient of ``d_loser`` times a factor   damping
``loser_safeguard``   the same with a factor for each pair (see                       SDPO [4]
                      ``kernels/paired_dpo_loss/differences.py``)
====================  ==============================================================  ============

IPO's published form is ``(h - 1/(2 tau))^2`` with the log-ratio ``h = logit / scale`` and tau the
scale; it is multiplied by ``scale^2`` here, so that its size does not depend on beta (at 5000 it
would be 1e-8, which is the epsilon of AdamW). So is Linear-DPO's, ``u * (d_winner - d_loser)``, by
the scale: its gradient is that of the log-sigmoid with u in place of ``sigmoid(-logit)``.

[1] Wallace et al., arXiv 2311.12908. [2] Mitchell, *A note on DPO with noisy preferences*, 2023.
[3] Azar et al., arXiv 2310.12036. [4] Fu et al., Diffusion-SDPO, arXiv 2511.03317, with one factor
a batch. [5] Li et al., arXiv 2605.21123. [6] Karthik et al., arXiv 2410.18013.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import paired_differences, paired_dpo_loss
from ...kernels.paired_dpo_loss import PairedDifferences, PairedLoss
from ..recipe import Objective as ObjectiveSpec
from .protocol import Loss

SLOPE, LEAST = 0.2, 0.01  # of the linear utility


def is_fused(spec: ObjectiveSpec) -> bool:
    """Whether the loss is that of the kernel, which sums in an order of its own."""
    plain = spec.loss == "sigmoid" and spec.label_smoothing == 0
    return plain and spec.pair_weighting == "uniform"


class PreferenceLoss:
    """The loss a recipe asks for; DPO in one fused kernel, the others in PyTorch."""

    def __init__(self, spec: ObjectiveSpec, scale: float) -> None:
        self.spec = spec
        self.scale = scale
        self._options: dict[str, Any] = {
            "distance": spec.distance,
            "huber_c": spec.huber_c,
            "loser_gradient": spec.loser_gradient,
            "safeguard": spec.loser_safeguard,
        }

    def errors(self, predictions: Tensor, target: Tensor, slopes: Tensor | None = None) -> Tensor:
        """(2B,) float32: to the bit what a call finds as the policy's errors of such predictions,
        so that a policy which predicts the same has a margin of 0 over errors that were kept.
        """
        nothing = torch.zeros(len(predictions), device=predictions.device)
        options, given = self._options | {"slopes": slopes}, (predictions, nothing, target)
        if is_fused(self.spec):
            return paired_dpo_loss(*given, self.scale, **options).policy_error
        return paired_differences(*given, **options).policy_error

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor,
        target: Tensor,
        weights: Tensor | None,
        slopes: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Loss:
        """Loss of predictions (2B, ...), winners first, and target (B, ...) or (2B, ...); the
        reference as predictions, too, or as its errors (2B,).

        Weights, slopes and shares (B,) are those of pairs: of the logit, of prediction minus
        target, and of the loss.
        """
        options = self._options | {"slopes": slopes}
        given = (policy, reference, target)
        found: PairedLoss | PairedDifferences
        if is_fused(self.spec) and shares is None:
            found = paired = paired_dpo_loss(*given, self.scale, weights=weights, **options)
            loss, logits = paired.loss, paired.logits
        else:
            found = differences = paired_differences(*given, **options)
            logits = -self.scale * differences.margin
            logits = logits if weights is None else logits * weights
            losses = self._of(logits)
            loss = (losses if shares is None else losses * shares).mean()
            logits = logits.detach()
        winner, loser = (found.policy_error - found.reference_error).chunk(2)
        guarded = self.spec.loser_safeguard is not None
        return Loss(loss, logits, winner, loser, found.loser_kept if guarded else None)

    def _of(self, logits: Tensor) -> Tensor:
        """(B,) losses of logits (B,)."""
        if self.spec.loss == "ipo":
            return (logits - 0.5) ** 2
        if self.spec.loss == "linear":
            return -(0.5 - SLOPE * logits.detach()).clamp(LEAST, 1 - LEAST) * logits
        smoothing = self.spec.label_smoothing
        right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
        return -((1 - smoothing) * right + smoothing * wrong)
