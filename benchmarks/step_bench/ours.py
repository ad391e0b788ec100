"""Our training step, of the engine's own parts, with knobs to undo what it does for speed.

It is what the trainer does between a shard's pairs and the optimizer, less DeepSpeed, whose share
is not compared here (`profile_step.py` shows it): latents come in half precision from the host's
memory, prompts from the cache, the reference is the policy's network without adapters, winners and
losers ride in one call, and the loss and what surrounds it are our kernels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import Conditioning, Framing, family_of
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.quantization import Kind, quantize
from cdpo.engine.models.tuning import order_weights, rounding
from cdpo.engine.objectives import TrainingBatch, build_objective
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.batch import PairBatch
from cdpo.engine.training.batch import BatchMaker
from cdpo.engine.training.cuda_graph import CapturedLoss
from cdpo.engine.training.frozen.cache import FrozenCache
from cdpo.engine.training.networks import build_networks
from cdpo.kernels import use as use_kernels
from diffusers import DiffusionPipeline
from step_bench.models import FAMILIES, StepFamily, StepModel, build
from step_bench.setup import (
    SEED,
    Pairs,
    Update,
    adapter_of,
    encoders_of,
    in_one_dtype,
    in_reach,
    latents_of,
    trainable,
)
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Knobs:
    """How our step is taken."""

    precision: str
    """Of the networks: `bf16` or `fp32`."""
    fused_layers: bool
    """GroupNorm, SiLU and GEGLU of a UNet as our kernels."""
    channels_last: bool
    """Images of a UNet in the order of tensor cores."""
    kernels: str = "auto"
    """`torch`: noise, solver and loss in PyTorch instead of Triton."""
    cached_latents: bool = True
    cached_text: bool = True
    twin_reference: bool = True
    """The reference shares the policy's weights; else it is a second copy of them."""
    checkpointing: bool = False
    """Activations are computed again in the backward."""
    compiled: bool = False
    """The blocks that repeat go through torch.compile."""
    frozen_cache: int = 0
    """Draws of a pair whose frozen passes are kept; 0 asks the frozen networks in every step."""
    captured: bool = False
    """Networks and gradients are replayed as CUDA graphs."""
    free_rounding: bool = False
    """cuDNN's convolutions are those that were fastest when first met, float32 products TF32."""
    quantization: Kind | None = None
    """Bits of the base's linear layers."""
    attention: str = "sdpa"
    """As in the straightforward step."""
    latents_dtype: torch.dtype = torch.float16
    """Of cached latents: half precision is what shards hold."""

    @classmethod
    def for_device(cls, device: torch.device, model: StepModel) -> "Knobs":
        """The engine's choice: on a GPU everything that is fast there. A transformer has neither
        layers to fuse nor images.
        """
        on_gpu = device.type == "cuda"
        of_unets = on_gpu and not model.spec.is_flow
        return cls("bf16" if on_gpu else "fp32", fused_layers=of_unets, channels_last=of_unets)


class NotCaptured(Exception):
    """A step that was to be replayed is not."""


class OurStep:
    """One optimisation step a call, always on the same pairs, at new timesteps with new noise."""

    def __init__(self, model: StepModel, pairs: Pairs, device: torch.device, knobs: Knobs) -> None:
        built = build(model, device, PRECISIONS[knobs.precision])
        pipeline, recipe = built.pipeline, _recipe(model, knobs)
        family = FAMILIES[model.family]
        self.model, self.pairs, self.device, self.knobs = model, pairs, device, knobs
        self._pipeline = pipeline
        self._backbone = LatentDiffusion(
            pipeline,
            family.text(pipeline) if knobs.cached_text else LiveText(pipeline, family),
            family.noise(pipeline.scheduler, device, model.side),
            device,
            family_of(model.spec).ask,
            load_teacher=None if built.teacher is None else lambda: (built.teacher, {}),
        )
        if knobs.quantization:
            quantize(self._backbone.denoiser, knobs.quantization, device)
        self._backbone.place()
        self.module = build_networks(recipe, self._backbone, build_objective(recipe.objective))
        order_weights(self.module.tuning, self.module.policy, *self.module.frozen)
        if knobs.captured:
            self.module.captured = CapturedLoss(self.module, self.module.loss, Terminal())
        if not knobs.twin_reference:
            self.module.reference = copy.deepcopy(self.module.reference)
        self.policy = in_one_dtype(self.module.policy)
        self.update = Update(trainable(self.policy), device)
        self._maker = BatchMaker(recipe, self._backbone, (model.side, model.side), device)
        self._shard = self._read_shard()
        if knobs.frozen_cache:
            self._folder = TemporaryDirectory()
            self._maker.cache = FrozenCache(
                Path(self._folder.name),
                "bench",
                draws=knobs.frozen_cache,
                latent_shape=self._backbone.latent_shape((model.side, model.side)),
                has_targets=recipe.objective.needs_teacher,
                device=device,
            )

    def __call__(self) -> None:
        """One optimisation step; NotCaptured if the networks cannot be replayed but were to be."""
        with self._kernels():
            self.update(self.module(self.batch()).loss)
        if self.knobs.captured and not self.module.captured.captures:
            raise NotCaptured

    def networks(self) -> dict[str, nn.Module]:
        """By the names that their calls are counted under."""
        named = {name: getattr(self.module, name) for name in ("policy", "reference", "teacher")}
        named |= {"vae": self._pipeline.vae.encoder, **encoders_of(self._pipeline)}
        return {name: network for name, network in named.items() if network is not None}

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The loss of one batch, differentiable in the adapter."""
        with self._kernels():
            return self.module(batch).loss

    def batch(self) -> TrainingBatch:
        """The next visit of the pairs, corrupted and told of their prompts."""
        shard = replace(self._shard, visits=self._shard.visits + 1)
        self._shard = shard
        if not self.knobs.cached_latents:
            shard = replace(shard, images=self._encode_images())
        return self._maker.make(shard)

    def predict(self, batch: TrainingBatch) -> Tensor:
        """The reference's prediction for the first image: one unit of work."""
        timesteps = batch.draw.timesteps[:1]
        told = batch.conditioning.first(1)
        return self._backbone.predict(self.module.reference, batch.noisy[:1], timesteps, told)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents of pixels (N, 3, H, W), by the VAE in the precision of the networks."""
        vae = self._pipeline.vae
        return latents_of(vae, pixels.to(self.device, non_blocking=True).to(vae.dtype))

    def _encode_images(self) -> Tensor:
        return self.encode_images(self.pairs.pixels)

    def _read_shard(self) -> PairBatch:
        """The pairs as they come out of a shard."""
        latents = self._encode_images().to(self.knobs.latents_dtype)
        count, side = len(self.pairs), self.model.side
        return PairBatch(
            images=in_reach(latents, self.device),
            prompts=self.pairs.prompts,
            pair_ids=torch.arange(count),
            visits=torch.zeros(count, dtype=torch.int64),
            tiers=torch.ones(count, dtype=torch.int64),
            ranks=torch.tensor([[1, 2]] * count),
            original_sizes=torch.full((2 * count, 2), side),
            crops=torch.zeros(2 * count, 2, dtype=torch.int64),
        )

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        kernels = self.knobs.kernels
        ours = nullcontext() if kernels == "auto" else use_kernels(kernels)
        with ours, rounding(self.module.tuning):
            yield


class LiveText:
    """Embeds the prompts of every step anew."""

    def __init__(self, pipeline: DiffusionPipeline, family: StepFamily) -> None:
        self._make = partial(family.text, pipeline)
        self.cache = self._make().cache  # of the protocol, and never filled

    def encode(self, prompts: list[str], framing: Framing | None) -> Conditioning:
        conditioner = self._make()
        conditioner.cache.rows = len(set(prompts))  # without fillers
        return conditioner.encode(prompts, framing)


def _recipe(model: StepModel, knobs: Knobs) -> Recipe:
    """What the engine's parts read in a recipe; its paths are not read."""
    return Recipe.model_validate(
        {
            "run_dir": "unused",
            "seed": SEED,
            "model": model.spec.model_dump(),
            "adapter": adapter_of(model).model_dump(),
            "objective": model.objective,
            "prompts": {"train": "unused"},
            "reward": {"path": "unused"},
            "train": {"precision": knobs.precision, "caption_dropout": 0.0},
            "speed": {
                "channels_last": _switch(knobs.channels_last),
                "fused_kernels": _switch(knobs.fused_layers),
                "attention": knobs.attention,
                "compile": "regional" if knobs.compiled else "off",
                "activation_checkpointing": knobs.checkpointing,
                "frozen_cache": knobs.frozen_cache,
                "rounding": "free" if knobs.free_rounding else "fixed",
            },
        }
    )


def _switch(on: bool) -> str:
    return "on" if on else "off"
