"""A model's networks built from their configs on the meta device: sizes and shapes, no values.

Nothing is read but the configs, so this takes seconds for a model of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ...models.attention import use_attention
from ...models.pretrained import reading
from ...recipe import Model

META = torch.device("meta")
TIME_IDS = 6  # SDXL: original size, crop corner and target size


@dataclass(frozen=True)
class MetaModel:
    """The networks of a pipeline."""

    denoiser: ModelMixin
    vae: AutoencoderKL
    text_encoders: dict[str, nn.Module]

    @property
    def latent_scale(self) -> int:
        """Pixels along one side of a latent pixel."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def tokens(self) -> int:
        """Length of an encoded prompt."""
        first: Any = next(iter(self.text_encoders.values()))
        return int(first.config.max_position_embeddings)

    def inputs(self, num_images: int, resolution: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the denoiser for so many images of (height, width) pixels."""
        config, dtype = self.denoiser.config, next(self.denoiser.parameters()).dtype

        def empty(*shape: int) -> Tensor:
            return torch.empty(num_images, *shape, device=META, dtype=dtype)

        height, width = (side // self.latent_scale for side in resolution)
        inputs: dict[str, Any] = {
            "sample": empty(config["in_channels"], height, width),
            "timestep": torch.zeros(num_images, device=META, dtype=torch.int64),
            "encoder_hidden_states": empty(self.tokens, config["cross_attention_dim"]),
        }
        if config.get("time_cond_proj_dim"):
            inputs["timestep_cond"] = empty(config["time_cond_proj_dim"])
        if config.get("addition_embed_type") == "text_time":
            sizes = TIME_IDS * config["addition_time_embed_dim"]
            pooled = config["projection_class_embeddings_input_dim"] - sizes
            inputs["added_cond_kwargs"] = {
                "text_embeds": empty(pooled),
                "time_ids": empty(TIME_IDS),
            }
        return inputs


def read_meta_model(spec: Model, dtype: torch.dtype) -> MetaModel:
    """The networks of ``model.path`` (and ``model.vae``) as their configs describe them.

    Raises:
        OutsideError: for a folder or hub id without a pipeline's configs, naming what is missing.
    """
    diffusers_logging.set_verbosity_error()
    kind = f"{spec.backbone} model in a folder, the hub's cache or the hub"
    with reading(f"model.path={spec.path}", kind):
        index = DiffusionPipeline.load_config(spec.path, revision=spec.revision)
        encoders = {
            name: _build(index, name, spec, dtype)
            for name in ("text_encoder", "text_encoder_2")
            if index.get(name, [None])[0]
        }
        denoiser = _build(index, "unet", spec, dtype)
        vae = _build(index, "vae", spec, torch.float32)
    if spec.vae is not None:
        with reading(f"model.vae={spec.vae}", "VAE"):
            vae = _from_config(AutoencoderKL, AutoencoderKL.load_config(spec.vae), torch.float32)
    if spec.unet is not None:
        with reading(f"model.unet={spec.unet}", "UNet"):
            config = UNet2DConditionModel.load_config(spec.unet)
            denoiser = _from_config(UNet2DConditionModel, config, dtype)
    return MetaModel(denoiser, vae, encoders)


def _build(index: dict[str, Any], name: str, spec: Model, dtype: torch.dtype) -> Any:
    """One network of a pipeline, of the class its model_index.json names."""
    library, class_name = index.get(name, (None, None))
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"its model_index.json has no {name} of diffusers or transformers")
    network = getattr(import_module(library), class_name)
    place = {"subfolder": name, "revision": spec.revision}
    if library == "diffusers":
        return _from_config(network, network.load_config(spec.path, **place), dtype)
    return _from_config(network, network.config_class.from_pretrained(spec.path, **place), dtype)


def _from_config(network: Any, config: Any, dtype: torch.dtype) -> Any:
    """A network on the meta device, of diffusers' configs (dicts) or transformers' (objects)."""
    with META:
        built = network.from_config(config) if isinstance(config, dict) else network(config)
    # Of the module alone: the libraries' own `to` warns about layers that these models lack.
    return nn.Module.to(built, dtype).requires_grad_(False)


def count_flops(compute: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())


def forward_flops(model: MetaModel, network: nn.Module, resolution: tuple[int, int]) -> int:
    """Of one forward pass over one image."""
    inputs = model.inputs(1, resolution)

    def forward() -> None:
        with torch.no_grad():
            network(**inputs)

    return count_flops(forward)


def training_flops(model: MetaModel, policy: nn.Module, resolution: tuple[int, int]) -> int:
    """Of forward and backward over one image, what is computed twice for checkpoints included."""
    inputs = model.inputs(1, resolution)
    return count_flops(lambda: policy(**inputs, return_dict=False)[0].sum().backward())


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
    computed again. Changes the policy's attention and checkpointing.
    """
    use_attention(policy, FlashShaped.apply)
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
    with saved:
        policy(**model.inputs(num_images, resolution))
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
