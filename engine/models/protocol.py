"""What the trainer asks of a model family and of a noise process (one file a family implements it).

Shapes: B pairs; winner and loser ride in one batch ``[winners; losers]`` of 2B images; C, h, w are
latent channels, height and width; T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor, nn

from ...kernels import ConsistencyScales, SchedulePoint
from ..basics.transfer import send_numbers
from .fingerprint_store import Kept
from .masking import PromptMask
from .quantization import Kind, Quantized


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about each image of a batch."""

    text: Tensor
    """Token embeddings (N, T, D)."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further per-image tensors (N, ...) by the denoiser's name for them: SDXL's pooled
    `text_embeds` and `time_ids`, SD3's `pooled_projections`."""
    lengths: tuple[int, ...] | None = None
    """(N,) how many of the T tokens are an image's own, where texts have lengths of their own; the
    rest are zeros. On the host, for a transformer asks for them."""

    def select(self, images: Sequence[int]) -> Conditioning:
        """The rows of M images, in that order."""
        rows = send_numbers(images, self.text.device)
        return Conditioning(
            self.text.index_select(0, rows),
            {name: value.index_select(0, rows) for name, value in self.extras.items()},
            self.lengths and tuple(self.lengths[image] for image in images),
        )

    def first(self, count: int) -> Conditioning:
        """That of so many images alone."""
        extras = {name: value[:count] for name, value in self.extras.items()}
        return Conditioning(self.text[:count], extras, self.lengths and self.lengths[:count])

    def with_extras(self, **extras: Tensor) -> Conditioning:
        """The same with further per-image tensors, each (N, ...)."""
        return replace(self, extras=self.extras | extras)

    def followed_by(self, other: Conditioning) -> Conditioning:
        """The images of both, in that order; both have the same extras, and no lengths."""
        assert self.lengths is None and other.lengths is None
        extras = {
            name: torch.cat([value, other.extras[name]]) for name, value in self.extras.items()
        }
        return Conditioning(torch.cat([self.text, other.text]), extras)


@dataclass(frozen=True)
class Framing:
    """How each of N images was cut out of its original, in pixels; some families are told it."""

    original_sizes: Tensor
    """(N, 2) int64: height and width before resizing and cropping."""
    crops: Tensor
    """(N, 2) int64: top and left of the crop."""
    target_size: tuple[int, int]
    """Height and width of what the model works on."""


@dataclass(frozen=True)
class SolverStep:
    """One step of a teacher's DDIM solver for B pairs, and how it is guided."""

    now: SchedulePoint
    """Where the noisy latents are."""
    earlier: SchedulePoint
    """Where the step leads: nearer to the clean latents."""
    scales: ConsistencyScales
    """The consistency function of predictions at ``now``."""
    earlier_scales: ConsistencyScales
    """That of predictions at ``earlier``."""
    is_high: Tensor
    """(B,) bool: whether the noise is high, which is the last quarter of the timesteps."""
    guidance: Tensor
    """(B,) float32: w of ``conditional + w (conditional - unconditional)``."""
    prediction: str
    """What teacher and consistency model predict: epsilon, v_prediction or sample."""

    def select(self, rows: Tensor) -> SolverStep:
        """That of some of the pairs, whose numbers (M,) int64 are on the device."""
        return replace(
            self,
            now=SchedulePoint(*(x.index_select(0, rows) for x in self.now)),
            earlier=SchedulePoint(*(x.index_select(0, rows) for x in self.earlier)),
            scales=ConsistencyScales(*(x.index_select(0, rows) for x in self.scales)),
            earlier_scales=ConsistencyScales(
                *(x.index_select(0, rows) for x in self.earlier_scales)
            ),
            is_high=self.is_high.index_select(0, rows),
            guidance=self.guidance.index_select(0, rows),
        )


@dataclass(frozen=True)
class Draw:
    """The random numbers of B training examples, each shared by its winner and loser."""

    timesteps: Tensor
    """(B,) what the networks are told of the noise, from 0 to T: int64, of flow models float32."""
    noise_keys: Tensor
    """(B, 4) int64: what the noise is a function of. The corruption makes it where it needs it."""
    solver: SolverStep | None = None
    """The step of a consistency model's teacher; None for diffusion models."""

    def select(self, rows: Tensor) -> Draw:
        """Those of some of the pairs, whose numbers (M,) int64 are on the device."""
        return Draw(
            self.timesteps.index_select(0, rows),
            self.noise_keys.index_select(0, rows),
            self.solver and self.solver.select(rows),
        )


class NoiseProcess(Protocol):
    """How images are corrupted and what the denoiser is asked to predict."""

    num_timesteps: int
    prediction_type: str
    """What the denoiser predicts, as its scheduler says: epsilon, v_prediction or sample; or flow,
    the velocity, which is noise minus latents in every family."""
    resolution: tuple[int, int] | None
    """Height and width in pixels that it is for; None if it is for any."""

    def at(self, timesteps: Tensor) -> SchedulePoint:
        """The factors of latents and noise at timesteps (N,) on the device, as draws have them."""
        ...

    def draw(self, seed: int, pair_ids: Tensor, visits: Tensor) -> Draw:
        """The random numbers of B pairs, from their ids and visits, (B,) int64 on the host."""
        ...

    def corrupt(
        self, latents: Tensor, draw: Draw, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what a perfect denoiser predicts for them.

        Args:
            latents: (2B, C, h, w) in bf16, fp16 or fp32, winners first; the arithmetic is float32.
            draw: of the B pairs.
            dtype: of the noisy latents, (2B, C, h, w); the target is float32, (B, C, h, w) if a
                pair shares it, else (2B, C, h, w).
        """
        ...


class StoredPrompts(Protocol):
    """Embeddings of prompts that were made before, in place of text encoders."""

    location: str
    """As messages name it."""
    fingerprint: str
    """Of the text encoders and tokenizers that made them, as `fingerprints.PARTS` has it."""

    def row(self, prompt: str) -> tuple[Tensor, ...]:
        """What `text.PromptCache` holds of a prompt, in host memory; DataError if it is missing."""
        ...

    def hold_to(self, columns: Sequence[tuple[int | None, ...]]) -> None:
        """DataError unless rows are tensors of these sizes, None being any from 1 on."""
        ...


class Backbone(Protocol):
    """A family of text-to-image models."""

    pipeline: DiffusionPipeline
    """The stock pipeline, its denoiser being :attr:`denoiser`: what exports are written with."""
    denoiser: ModelMixin
    denoiser_name: str
    """What the pipeline calls it, as does its folder: unet or transformer."""
    device: torch.device
    files: Kept | None
    """What knows the fingerprints of the files it was loaded from; None if that is not known."""

    quantized: Quantized | None
    """What of the denoiser is in fewer bits; None if it is whole."""

    @property
    def noise(self) -> NoiseProcess:
        """Corruption and targets, as the model's scheduler says."""
        ...

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of an image of (height, width) pixels."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Content hashes of all parts as they were loaded, by the names of `fingerprints.PARTS`:
        to be asked before anything is trained or tuned. The teacher is there once it is loaded.
        """
        ...

    def take_prompts(self, stored: StoredPrompts, told: Mapping[str, tuple[int, ...]]) -> None:
        """Let go of the text encoders, which need not have values, for what they have made before:
        once, and before anything is asked of the networks. DataError unless it is of the sizes that
        the family's ``told`` gives.
        """
        ...

    def embedded(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """What the text encoders make of each of N prompts, on :attr:`device`: to be stored."""
        ...

    def place(self, quantization: Kind | None = None) -> None:
        """Bring all networks to :attr:`device`, the denoiser in fewer bits if so asked: once, and
        before anything is asked of them.
        """
        ...

    def load_teacher(self) -> ModelMixin | None:
        """The frozen diffusion model a consistency model was distilled from; None for others."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Load an exported adapter into the denoiser, as any user of it would."""
        ...

    def load_denoiser(self, folder: Path) -> None:
        """Take the denoiser of another pipeline folder of the same family."""
        ...

    def use_denoiser(self, net: ModelMixin) -> None:
        """Take a network that is already there as :attr:`denoiser`."""
        ...

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Scaled latents (N, C, h, w) float32 of RGB images: the mean of the VAE's posterior."""
        ...

    def image_moments(self, pixels: Tensor) -> Tensor:
        """The VAE's posterior of images uint8 (N, 3, H, W): mean and log variance, (N, 2C, h, w)
        float32.
        """
        ...

    def latents_of(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (N, C, h, w) float32 of moments: the mean, or with standard normal
        ``noise`` (N, C, h, w) a sample.
        """
        ...

    def encode_prompts(
        self, prompts: Sequence[str], framing: Framing | None = None
    ) -> Conditioning:
        """Conditioning of N images by their prompts, encoded once each, and by their framing."""
        ...

    def seen_tokens(self, prompt: str) -> int | None:
        """How many tokens of a prompt the text encoders see, if that is not all of them."""
        ...

    def limit_prompt_cache(self, num_bytes: int) -> None:
        """Keep at most so many bytes of encoded prompts on the device."""
        ...

    def predict(
        self, net: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """What ``net`` (policy or reference) predicts for noisy latents (N, C, h, w)."""
        ...

    def sample(
        self,
        net: nn.Module,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        mask: PromptMask | None = None,
    ) -> list[Image.Image]:
        """Images drawn from ``net``, one a prompt, starting from ``noise`` (N, C, h, w); ``mask``
        sets parts of the prompts' embeddings to zero.
        """
        ...
