"""A model's networks built from their configs on the meta device: sizes and shapes, no values.

Nothing is read but the configs, so this takes seconds for a model of any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ...basics.shipped import shipped
from ...models import Conditioning, family_of
from ...models.autoencoder import vae_sizes
from ...models.pipelines import TEXT_ENCODERS, refuse_other_family
from ...models.pretrained import config_of, denoiser_in, reading
from ...recipe import Model

META = torch.device("meta")
OF_ONE_DEVICE = (torch.ops.aten.where.self, torch.ops.aten.index_add.default)


@dataclass(frozen=True)
class MetaModel:
    """The networks of a pipeline."""

    spec: Model
    """Of the recipe."""
    denoiser: ModelMixin
    vae: ModelMixin
    text_encoders: dict[str, nn.Module]
    index: Mapping[str, Any]
    """What model_index.json says."""
    shipped: tuple[str, ...] = ()
    """The hub ids among what the recipe names whose configs are those that come with cdpo."""

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of (height, width) pixels."""
        channels, factor = vae_sizes(self.vae.config)
        height, width = resolution
        return channels, height // factor, width // factor

    def inputs(
        self, num_images: int, resolution: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Noisy latents, timesteps and conditioning of so many images of (height, width) pixels."""
        dtype = next(self.denoiser.parameters()).dtype
        family = family_of(self.spec)
        sizes = {"latents": self.latent_shape(resolution)}
        sizes |= family.told(self.denoiser.config, self.text_encoders)
        empty = {
            name: torch.empty(num_images, *size, device=META, dtype=dtype)
            for name, size in sizes.items()
        }
        latents, text = empty.pop("latents"), empty.pop("text")
        clock = torch.float32 if self.spec.is_flow else torch.int64
        timesteps = torch.zeros(num_images, device=META, dtype=clock)
        return latents, timesteps, Conditioning(text, empty)

    def ask(self, network: nn.Module, num_images: int, resolution: tuple[int, int]) -> Tensor:
        """What the denoiser, or a network made of it, predicts of so many images."""
        prediction: Tensor = family_of(self.spec).ask(network, *self.inputs(num_images, resolution))
        return prediction


def read_meta_model(spec: Model, dtype: torch.dtype) -> MetaModel:
    """The networks of ``model.path``, ``model.vae`` and ``model.unet`` as their configs tell.

    Raises:
        OutsideError: for a folder or hub id without a pipeline's configs, naming what is missing.
    """
    diffusers_logging.set_verbosity_error()
    vae_class = getattr(diffusers, spec.family.vae)
    kind = f"{spec.backbone} model in a folder, the hub's cache or the hub"
    path = _config_place(spec.path, "model_index.json", spec.revision)
    with reading(f"model.path={spec.path}", kind, path) as place:
        index = DiffusionPipeline.load_config(place, revision=spec.revision)
        refuse_other_family(index, spec)
        encoders = {
            name: _build(index, name, place, spec.revision, dtype)
            for name in TEXT_ENCODERS
            if index.get(name, [None])[0]
        }
        denoiser = _build(index, denoiser_in(index), place, spec.revision, dtype)
        vae = _build(index, "vae", place, spec.revision, torch.float32)
    places = {spec.path: path}
    if spec.vae is not None:
        places[spec.vae] = _config_place(spec.vae, "config.json")
        with reading(f"model.vae={spec.vae}", "VAE", places[spec.vae]) as place:
            vae = _from_config(vae_class, config_of(vae_class, place), torch.float32)
    if spec.unet is not None:
        places[spec.unet] = _config_place(spec.unet, "config.json")
        with reading(f"model.unet={spec.unet}", "denoiser", places[spec.unet]) as place:
            network = type(denoiser)
            denoiser = _from_config(network, config_of(network, place), dtype)
    family_of(spec).check(spec, denoiser.config, vae.config)
    ours = tuple(name for name, place in places.items() if place != name)
    return MetaModel(spec, denoiser, vae, encoders, index, ours)


def _config_place(path: str, file: str, revision: str | None = None) -> str:
    """``path``, or the shipped configs of that hub id where neither a folder nor the hub's cache
    has it. A revision, which may differ from them, is never taken from there.
    """
    ours = shipped("assets/configs") / path.replace("/", "--")
    is_known = revision is not None or os.path.exists(path) or not os.path.isdir(ours)
    if is_known or isinstance(try_to_load_from_cache(path, file), str):
        return path
    return str(ours)


def _build(
    index: dict[str, Any], name: str, place: str, revision: str | None, dtype: torch.dtype
) -> Any:
    """One network of a pipeline, of the class its model_index.json names."""
    library, class_name = index.get(name, (None, None))
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"its model_index.json has no {name} of diffusers or transformers")
    network = getattr(import_module(library), class_name)
    options = {"subfolder": name, "revision": revision}
    if library == "diffusers":
        return _from_config(network, network.load_config(place, **options), dtype)
    return _from_config(network, network.config_class.from_pretrained(place, **options), dtype)


def _from_config(network: Any, config: Any, dtype: torch.dtype) -> Any:
    """A network on the meta device, of diffusers' configs (dicts) or transformers' (objects)."""
    with META:
        built = network.from_config(config) if isinstance(config, dict) else network(config)
    # Of the module alone: the libraries' own `to` warns about layers that these models lack.
    return nn.Module.to(built, dtype).requires_grad_(False)


class _HostMasks(TorchDispatchMode):
    """Lets masks of the host choose among tensors of the meta device, forward and backward:
    Qwen-Image 2.1 reads the layout of its sequence from one.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in OF_ONE_DEVICE and any(isinstance(x, Tensor) and x.is_meta for x in args):
            args = tuple(x.to(META) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


class _Flops(_HostMasks):
    """PyTorch's counts of operations, without its counter's account of modules, which takes a third
    of the time.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(compute: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a call."""
    with _Flops() as counter:
        compute()
    return counter.total


def forward_flops(model: MetaModel, network: nn.Module, resolution: tuple[int, int]) -> int:
    """Of one forward pass over one image."""
    with torch.no_grad():
        return count_flops(lambda: model.ask(network, 1, resolution))


def training_flops(model: MetaModel, policy: nn.Module, resolution: tuple[int, int]) -> int:
    """Of forward and backward over one image, what is computed twice for checkpoints included."""
    return count_flops(lambda: model.ask(policy, 1, resolution).sum().backward())


def activation_bytes(
    model: MetaModel,
    policy: ModelMixin,
    num_images: int,
    resolution: tuple[int, int],
    *,
    checkpointing: bool,
) -> int:
    """What autograd keeps of one forward pass in eager mode, with attention that saves no scores.

    With checkpointing: the inputs of all blocks, and what the largest of them saves when it is
    computed again. Changes the policy's checkpointing.
    """
    weights = {weight.untyped_storage()._cdata for weight in policy.parameters()}
    largest = 0

    def run_block(block: nn.Module, *args: Any) -> Any:
        nonlocal largest
        inner = SavedTensors(weights)
        with inner:
            block(*args)
        largest = max(largest, inner.bytes)
        return checkpoint(block.__call__, *args, use_reentrant=False)

    if checkpointing:
        policy.enable_gradient_checkpointing(run_block)
    saved = SavedTensors(weights)
    with attention_shaped_like_flash(), _HostMasks(), saved:
        model.ask(policy, num_images, resolution)
    return saved.bytes + largest


class SavedTensors(saved_tensors_hooks):
    """Counts the bytes that autograd keeps while it is active, each storage once."""

    def __init__(self, but: set[int]) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice
        self._but = but
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._but:
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


@contextmanager
def attention_shaped_like_flash() -> Iterator[None]:
    """All attention, whatever layer asks for it, saves what a flash kernel would."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        attended: Tensor = FlashShaped.apply(query, key, value)
        return attended

    before, functional.scaled_dot_product_attention = (
        functional.scaled_dot_product_attention,
        attend,
    )
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class FlashShaped(torch.autograd.Function):
    """Shapes of flash attention: saves its inputs, its output and one number a row of scores.

    PyTorch's own attention takes the plain path on the meta device, and would save all scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
