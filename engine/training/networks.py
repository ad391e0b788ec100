"""The networks of a run, built as its recipe says: the one module that DeepSpeed gets."""

from __future__ import annotations

import copy

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from ..basics.phases import Phase, phase
from ..models import Backbone, Conditioning
from ..models.adapters import add_lora, twin_of
from ..models.tuning import PLAIN, Tuning, tune, tune_frozen_parts, tune_training
from ..objectives import Loss, Networks, Objective, Predict, TrainingBatch
from ..recipe import Recipe


class PolicyAndReference(nn.Module):
    """All networks as children of one module, so that ZeRO-3 gathers for each of them."""

    reference: nn.Module

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        backbone: Backbone,
        objective: Objective,
        teacher: nn.Module | None = None,
        *,
        offloaded: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        if offloaded:
            # No child: DeepSpeed moves children to the device, and under ZeRO-3 partitions them.
            self.__dict__["reference"] = reference
        else:
            self.reference = reference
        self.teacher = teacher
        self._backbone = backbone
        self._objective = objective

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks beside the policy."""
        return [net for net in (self.reference, self.teacher) if net is not None]

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


def build_networks(
    recipe: Recipe, backbone: Backbone, objective: Objective, tuning: Tuning = PLAIN
) -> PolicyAndReference:
    """Make ``backbone.denoiser`` the policy, with a frozen reference of equal output beside it.

    What ``tuning`` changes (how the networks compute, not what) it changes in all of them alike.
    Raises RecipeError if the adapter's targets are no layers of this denoiser.
    """
    tune(backbone.denoiser, tuning)  # before it is copied, and before hooks know its layers
    tune_frozen_parts(backbone, tuning)
    offloaded = False
    if recipe.adapter.type == "full":
        offloaded = recipe.train.reference == "offload"
        reference = _frozen_copy(backbone.denoiser, backbone.device, offloaded)
        policy = backbone.denoiser.requires_grad_(True)
    else:
        reference = twin_of(backbone.denoiser)
        policy = add_lora(backbone.denoiser, recipe.adapter, recipe.seed)
    policy.train()
    reference.eval()
    teacher = backbone.load_teacher()
    if teacher is not None:
        tune(teacher, tuning)
    networks = PolicyAndReference(
        policy, reference, backbone, objective, teacher, offloaded=offloaded
    )
    tune_training(policy, networks.frozen, tuning)
    return networks


def _frozen_copy(network: ModelMixin, device: torch.device, offloaded: bool) -> ModelMixin:
    """A copy on the device; or in host memory, each layer brought to the device when it runs."""
    if not offloaded:
        return copy.deepcopy(network).requires_grad_(False)
    reference = copy.deepcopy(network.to("cpu")).requires_grad_(False)
    network.to(device)
    apply_group_offloading(
        reference,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        # On a stream of its own the next layer arrives, from pinned memory, while this one runs.
        use_stream=device.type == "cuda",
    )
    return reference
