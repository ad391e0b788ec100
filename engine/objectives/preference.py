"""From predictions to a preference loss, for every objective that compares winner and loser.

With ``d = e^policy - e^reference`` of an image, B pairs, a pair's weight w of mean 1 over timesteps
(see ``weighting.py``) and ``logit = -scale * w * (d_winner - d_loser)``:

====================  ==============================================================  ============
``loss=sigmoid``      ``-mean logsigmoid(logit)``                                     DPO [1]
``label_smoothing``   ``-mean [(1 - s) logsigmoid(logit) + s logsigmoid(-logit)]``    cDPO [2]
``loss=ipo``          ``mean (logit - 1/2)^2``                                        IPO [3]
``loser_gradient``    the loss as it is, the gradient of ``d_loser`` times a factor   damping
====================  ==============================================================  ============

IPO's published form is ``(h - 1/(2 tau))^2`` with the log-ratio ``h = logit / scale`` and tau the
scale; it is multiplied by ``scale^2`` here, so that its size does not depend on beta (at 5000 it
would be 1e-8, which is the epsilon of AdamW).

[1] Wallace et al., arXiv 2311.12908. [2] Mitchell, *A note on DPO with noisy preferences*, 2023.
[3] Azar et al., arXiv 2310.12036.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...kernels import paired_differences, paired_dpo_loss
from ..recipe import Objective as ObjectiveSpec
from .protocol import Loss


class PreferenceLoss:
    """The loss a recipe asks for; plain DPO in one fused kernel, the others in PyTorch."""

    def __init__(self, spec: ObjectiveSpec, scale: float) -> None:
        self.spec = spec
        self.scale = scale
        self._is_plain = (
            spec.loss == "sigmoid" and spec.label_smoothing == 0 and spec.loser_gradient == 1
        )

    def __call__(
        self, policy: Tensor, reference: Tensor, target: Tensor, weights: Tensor | None
    ) -> Loss:
        """Loss of predictions (2B, ...), winners first, and target (B, ...) or (2B, ...)."""
        options: dict[str, Any] = {"distance": self.spec.distance, "huber_c": self.spec.huber_c}
        if self._is_plain and weights is None:
            paired = paired_dpo_loss(policy, reference, target, self.scale, **options)
            winner, loser = (paired.policy_error - paired.reference_error).chunk(2)
            return Loss(paired.loss, paired.logits, winner, loser)
        winner, loser = paired_differences(policy, reference, target, **options).difference.chunk(2)
        logits = self._scaled(winner - self._damped(loser), weights)
        return Loss(self._of(logits), logits.detach(), winner.detach(), loser.detach())

    def _damped(self, loser: Tensor) -> Tensor:
        """The same value with a fraction of the gradient.

        The loser's error can grow without bound, and drags the winner's along: the known failure
        of DPO, which a smaller gradient of the loser holds back.
        """
        kept = self.spec.loser_gradient
        return loser if kept == 1 else kept * loser + (1 - kept) * loser.detach()

    def _scaled(self, margin: Tensor, weights: Tensor | None) -> Tensor:
        logits = -self.scale * margin
        return logits if weights is None else logits * weights

    def _of(self, logits: Tensor) -> Tensor:
        if self.spec.loss == "ipo":
            return ((logits - 0.5) ** 2).mean()
        smoothing = self.spec.label_smoothing
        right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
        return -((1 - smoothing) * right + smoothing * wrong).mean()
