"""The networks of a run, built as its recipe says: the one module that DeepSpeed gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_group_offloading
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..basics.errors import DataError, told_by
from ..basics.phases import Phase, phase
from ..models import Backbone, Conditioning
from ..models.adapters import add_lora, twin_of
from ..models.fingerprints import fingerprint_of_tensors
from ..models.tuning import Tuning, tune_for_training
from ..objectives import HeldAgainstFrozen, Loss, Networks, Objective, Predict, TrainingBatch
from ..recipe import Adapter, Recipe
from .export_formats import read_adapter
from .lora import Lora, untrained_lora


class PolicyAndReference(nn.Module):
    """All networks as children of one module, so that ZeRO-3 gathers for each of them."""

    reference: nn.Module
    tuning: Tuning
    captured: Callable[[TrainingBatch], Loss] | None = None
    """What gives the loss in place of the networks themselves, if something does."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        backbone: Backbone,
        objective: Objective,
        teacher: nn.Module | None = None,
        base: nn.Module | None = None,
        *,
        offloaded: bool = False,
    ) -> None:
        """``base`` is what the policy was at the start, where the reference is not to stay that."""
        super().__init__()
        self.policy = policy
        if offloaded:
            # No child: DeepSpeed moves children to the device, and under ZeRO-3 partitions them.
            self.__dict__["reference"] = reference
        else:
            self.reference = reference
        self.teacher = teacher
        self._moved_from = base
        self._backbone = backbone
        self._objective = objective

    @property
    def frozen(self) -> list[nn.Module]:
        """The networks beside the policy."""
        beside = (self.reference, self.teacher, self._moved_from)
        return [net for net in beside if net is not None]

    @property
    def base(self) -> nn.Module:
        """What the policy was at the start."""
        return self.reference if self._moved_from is None else self._moved_from

    def forward(self, batch: TrainingBatch) -> Loss:
        return (self.captured or self.loss)(batch)

    def loss(self, batch: TrainingBatch) -> Loss:
        """A batch's loss, operation by operation."""
        return self._objective(self._networks(), batch)

    def ask_frozen(self, batch: TrainingBatch) -> None:
        """Have the frozen networks say what is not kept of a batch, and no more."""
        objective = cast(HeldAgainstFrozen, self._objective)
        objective.frozen(self._networks(), batch)

    def _networks(self) -> Networks:
        return Networks(
            policy=self._predicting("policy", self.policy),
            reference=self._predicting("reference", self.reference),
            teacher=self.teacher and self._predicting("teacher", self.teacher),
        )

    def _predicting(self, name: Phase, net: nn.Module) -> Predict:
        """The objective's view of a network: a function, each call of which is a phase."""

        def predict(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            with phase(name):
                return self._backbone.predict(net, noisy, timesteps, conditioning)

        return predict


def build_networks(recipe: Recipe, backbone: Backbone, objective: Objective) -> PolicyAndReference:
    """Make ``backbone.denoiser`` the policy, with a frozen reference of equal output beside it.

    All of them are tuned alike, as far as goes before DeepSpeed wraps them. Raises RecipeError if
    the adapter's targets are no layers of this denoiser, or a knob does not work here.
    """
    base: nn.Module | None = None
    denoiser, full = backbone.denoiser, recipe.adapter.type == "full"
    offloaded = full and recipe.train.reference == "offload"
    if full:
        _lay_out_inputs(denoiser)
        reference = _copied_to(torch.device("cpu") if offloaded else backbone.device, denoiser)
        policy = denoiser.requires_grad_(True)
    else:
        reference = twin_of(denoiser)
        policy = add_lora(denoiser, recipe.adapter, recipe.seed)
        if recipe.adapter.start is not None:
            load_start(policy, recipe.adapter)
            base = twin_of(policy, own=True)
        if recipe.objective.reference_ema:
            base, reference = reference, twin_of(policy, own=True)
    policy.train()
    for frozen in (reference, base):
        if frozen is not None:
            frozen.requires_grad_(False).eval()
    teacher = backbone.load_teacher() if recipe.objective.needs_teacher else None
    networks = PolicyAndReference(
        policy, reference, backbone, objective, teacher, base, offloaded=offloaded
    )
    networks.tuning = tune_for_training(recipe, backbone, policy, networks.frozen)
    if offloaded:
        _bring_by_layer(reference, backbone.device)
    return networks


def load_start(policy: nn.Module, spec: Adapter) -> None:
    """Give a policy's adapters the values of those that it starts from. DataError if these cannot
    be read, or are of other layers or another rank.
    """
    lora = started_from(spec)
    own = get_peft_model_state_dict(policy)
    found = {name: value.shape for name, value in lora.values.items()}
    if found != {name: value.shape for name, value in own.items()}:
        raise _other_adapter(spec, lora)
    set_peft_model_state_dict(policy, untrained_lora(lora, spec))


def started_from(spec: Adapter) -> Lora:
    """What training goes on from. DataError if it cannot be read or has another rank."""
    assert spec.start is not None
    try:
        lora = read_adapter(Path(spec.start))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"adapter.start={spec.start} cannot be read as an exported adapter: {told_by(error)}; "
            "name the lora/ of a run",
            "adapter.start",
            "unreadable",
        ) from None
    if lora.rank != spec.rank:
        raise _other_adapter(spec, lora)
    return lora


def _other_adapter(spec: Adapter, lora: Lora) -> DataError:
    return DataError(
        f"adapter.start={spec.start} is an adapter of rank {lora.rank} on {len(lora.layers)} "
        f"layers, not that of adapter.targets at adapter.rank={spec.rank}: give the same, or leave "
        "it out",
        "adapter.start",
        "mismatch",
    )


def started_parts(spec: Adapter) -> dict[str, str]:
    """The fingerprint of what training goes on from, if that is an adapter. DataError as of
    :func:`started_from`.
    """
    if spec.start is None:
        return {}
    return {"start": fingerprint_of_tensors(started_from(spec).values)}


def _copied_to(device: torch.device, network: ModelMixin) -> ModelMixin:
    """A copy there, made without a second one on the network's own device."""
    home = network.device
    copied = copy.deepcopy(network.to(device))
    network.to(home)
    return copied


def _lay_out_inputs(network: nn.Module) -> None:
    """Let linear layers have contiguous inputs: PyTorch multiplies others as rows where the weight
    trains, and as a batch where it does not, which may round otherwise.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def _bring_by_layer(network: nn.Module, device: torch.device) -> None:
    """Let each layer of a network in host memory be on the device while it runs."""
    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        # On a stream of its own the next layer arrives, from pinned memory, while this one runs.
        use_stream=device.type == "cuda",
    )
