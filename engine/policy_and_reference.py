"""The networks of a run as the one module that DeepSpeed gets."""

from __future__ import annotations

from torch import Tensor, nn

from .backbones import Backbone, Conditioning
from .objectives import Loss, Networks, Objective, Predict, TrainingBatch
from .phases import Phase, phase


class PolicyAndReference(nn.Module):
    """All networks as children of one module, so that ZeRO-3 gathers for each of them."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        backbone: Backbone,
        objective: Objective,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.teacher = teacher
        self._backbone = backbone
        self._objective = objective

    def forward(self, batch: TrainingBatch) -> Loss:
        teacher = self.teacher and self._predicting("teacher", self.teacher)
        networks = Networks(
            policy=self._predicting("policy", self.policy),
            reference=self._predicting("reference", self.reference),
            teacher=teacher,
        )
        return self._objective(networks, batch)

    def _predicting(self, name: Phase, net: nn.Module) -> Predict:
        """The objective's view of a network: a function, each call of which is a phase."""

        def predict(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            with phase(name):
                return self._backbone.predict(net, noisy, timesteps, conditioning)

        return predict
