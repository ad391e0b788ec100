"""The straightforward training step: the same losses as public training scripts write them.

What these scripts do, and ours does not: images go through the VAE and prompts through the text
encoders in every step; the reference is a second copy of the network, of flow models the policy
with its adapters switched off; the loss is eager PyTorch in the dtype of the networks. Diffusion
and flow models predict for winners and losers in one call. Consistency models predict for them one
after the other, once more for guidance, and make the target anew for each distance it is used in:
12 calls on B images, 14.2 forwards of the network a pair. With the image as target there are 4
calls.

Where scripts differ the cheaper way is taken: the VAE works in the networks' dtype, its posterior's
mean is used, the empty prompt is encoded once, and nothing waits for the value of the loss. Texts
are as long as the stock pipelines have them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from cdpo.engine.models.autoencoder import vae_sizes
from cdpo.engine.models.latent_diffusion import guidance_embedding
from diffusers import FluxPipeline
from step_bench.models import (
    EMBEDDED_GUIDANCE,
    GUIDANCE,
    INSTRUCTION,
    SOLVER_STEPS,
    StepModel,
    build,
)
from step_bench.setup import Pairs, Update, add_adapter, encoders_of, latents_of, trainable
from torch import Tensor, nn

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER_C = 1e-3


class Randomness(NamedTuple):
    """What is drawn for B pairs; winner and loser share it."""

    noise: Tensor
    """(B, C, h, w)."""
    timesteps: Tensor
    """(B,) int64, of flow models float32."""
    guidance: Tensor | None
    """(B,), of consistency models."""


class Told(NamedTuple):
    """What a denoiser is told of N images."""

    text: Tensor
    added: dict[str, Tensor]

    def twice(self) -> "Told":
        """Of 2N: winners, then losers."""
        added = {name: torch.cat([value, value]) for name, value in self.added.items()}
        return Told(torch.cat([self.text, self.text]), added)


class StraightforwardStep:
    """What is common to all families; `loss` is theirs."""

    text_tokens: ClassVar[tuple[int | None, ...]] = (None, None, None)
    """How many each text encoder reads, if not as many as its tokenizer says."""

    def __init__(
        self, model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
    ) -> None:
        networks = build(model, device, dtype)
        pipeline = networks.pipeline
        self.model, self.pairs, self.device, self.dtype = model, pairs, device, dtype
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        self._encoders = encoders_of(pipeline)
        self.encoders = [*self._encoders.values()]
        self.teacher = networks.teacher
        self.reference = self.reference_of(networks.denoiser)
        self.policy: Any = add_adapter(networks.denoiser, model)
        self.update = Update(trainable(self.policy), device)
        parts = pipeline.components
        self.tokenizers = [parts[name] for name in sorted(parts) if name.startswith("tokenizer")]
        self.tokens = self.tokenize(pairs.prompts)

    def __call__(self) -> None:
        """One optimisation step."""
        self.update(self.loss(self.draw()))

    def networks(self) -> dict[str, nn.Module]:
        """By the names that their calls are counted under."""
        named = {"policy": self.policy, "reference": self.reference, "teacher": self.teacher}
        named |= {"vae": self.vae.encoder, **self._encoders}
        return {name: network for name, network in named.items() if network is not None}

    def loss(self, drawn: Randomness) -> Tensor:
        raise NotImplementedError

    def reference_of(self, denoiser: nn.Module) -> nn.Module | None:
        """A second copy, made before it has an adapter; None if none is held."""
        return copy.deepcopy(denoiser)

    def draw(self) -> Randomness:
        channels, factor = vae_sizes(self.vae.config)
        count, side = len(self.pairs), self.model.side // factor
        noise = torch.randn(count, channels, side, side, device=self.device, dtype=self.dtype)
        return Randomness(noise, self.draw_timesteps(count), None)

    def draw_timesteps(self, count: int) -> Tensor:
        """(B,) as those of :class:`Randomness`."""
        return torch.randint(1000, (count,), device=self.device)

    @torch.no_grad()
    def encode_images(self) -> Tensor:
        pixels = self.pairs.pixels.to(self.device, non_blocking=True).to(self.dtype)
        return latents_of(self.vae, pixels)

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """For each text encoder (B, T), made ahead, as by a data loader's workers."""
        return [
            tokenizer(
                prompts,
                padding="max_length",
                max_length=most,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(self.device)
            for tokenizer, most in zip(self.tokenizers, self.text_tokens, strict=False)
        ]

    @torch.no_grad()
    def encode_text(self, tokens: list[Tensor]) -> Told:
        if len(self.encoders) == 1:
            return Told(self.encoders[0](*tokens)[0], {})
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders, tokens, strict=True)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        side = self.model.side
        time_ids = torch.tensor([side, side, 0, 0, side, side], device=self.device)
        added = {"text_embeds": outputs[1][0], "time_ids": time_ids.repeat(len(text), 1)}
        return Told(text, added)


class StraightforwardDiffusion(StraightforwardStep):
    """Diffusion-DPO: winners and losers stacked, one call of each network."""

    def loss(self, drawn: Randomness) -> Tensor:
        latents = self.encode_images()
        noise, timesteps = drawn.noise.repeat(2, 1, 1, 1), drawn.timesteps.repeat(2)
        noisy, target = self.corrupt(latents, noise, timesteps)
        told = self.encode_text(self.tokens).twice()

        prediction = self.predict(self.policy, noisy, timesteps, told)
        policy_error = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
        with torch.no_grad(), self.frozen() as reference:
            prediction = self.predict(reference, noisy, timesteps, told)
            reference_error = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
        policy_winner, policy_loser = policy_error.chunk(2)
        reference_winner, reference_loser = reference_error.chunk(2)
        margin = (policy_winner - policy_loser) - (reference_winner - reference_loser)
        return -F.logsigmoid(-0.5 * self.model.objective["beta"] * margin).mean()

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what is to be predicted."""
        return self.scheduler.add_noise(latents, noise, timesteps), noise

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """The network that is the reference while this is open."""
        yield self.reference

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        prediction: Tensor = network(
            noisy,
            timesteps,
            encoder_hidden_states=told.text,
            added_cond_kwargs=told.added,
        ).sample
        return prediction


class StraightforwardFlow(StraightforwardDiffusion):
    """The same of velocities; the reference is the policy with its adapters switched off."""

    def reference_of(self, denoiser: nn.Module) -> None:
        return None

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        self.policy.disable_adapters()
        try:
            yield self.policy
        finally:
            self.policy.enable_adapters()

    def draw_timesteps(self, count: int) -> Tensor:
        """Logit-normal."""
        return 1000 * torch.randn(count, device=self.device).sigmoid()

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = _column(timesteps / 1000, latents)
        return (1 - sigmas) * latents + sigmas * noise, noise - latents


class StraightforwardSD3(StraightforwardFlow):
    """Both CLIPs' tokens side by side, then the T5's."""

    text_tokens = (None, None, 256)

    @torch.no_grad()
    def encode_text(self, tokens: list[Tensor]) -> Told:
        *clips, t5 = self.encoders
        outputs = [
            clip(ids, output_hidden_states=True)
            for clip, ids in zip(clips, tokens[:2], strict=True)
        ]
        clip_text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output[0] for output in outputs], dim=-1)
        t5_text = t5(tokens[2])[0]
        clip_text = F.pad(clip_text, (0, t5_text.shape[-1] - clip_text.shape[-1]))
        text = torch.cat([clip_text, t5_text], dim=1)
        return Told(text, {"pooled_projections": pooled})

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        prediction: Tensor = network(
            noisy, encoder_hidden_states=told.text, timestep=timesteps, **told.added
        ).sample
        return prediction


class StraightforwardFlux(StraightforwardFlow):
    """Latents packed, 2 x 2 a token; guidance embedded."""

    @torch.no_grad()
    def encode_text(self, tokens: list[Tensor]) -> Told:
        clip, t5 = self.encoders
        pooled = clip(tokens[0]).pooler_output
        return Told(t5(tokens[1])[0], {"pooled_projections": pooled})

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        count, channels, height, width = noisy.shape
        like = {"device": noisy.device, "dtype": noisy.dtype}
        tokens: Tensor = network(
            FluxPipeline._pack_latents(noisy, count, channels, height, width),
            encoder_hidden_states=told.text,
            timestep=timesteps / 1000,
            guidance=torch.full([count], EMBEDDED_GUIDANCE, device=noisy.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, **like),
            txt_ids=torch.zeros(told.text.shape[1], 3, **like),
            **told.added,
        ).sample
        factor = self.model.side // height
        unpacked: Tensor = FluxPipeline._unpack_latents(
            tokens, self.model.side, self.model.side, factor
        )
        return unpacked


class StraightforwardSana(StraightforwardFlow):
    """Prompts behind an instruction, of which the last tokens are told, and the first."""

    told_tokens = 300

    def tokenize(self, prompts: list[str]) -> list[Tensor]:
        """Ids and mask."""
        (tokenizer,) = self.tokenizers
        tokenizer.padding_side = "right"
        rows = tokenizer(
            [INSTRUCTION + prompt for prompt in prompts],
            padding="max_length",
            max_length=len(tokenizer.encode(INSTRUCTION)) + self.told_tokens - 2,
            truncation=True,
            return_tensors="pt",
        )
        return [rows.input_ids.to(self.device), rows.attention_mask.to(self.device)]

    @torch.no_grad()
    def encode_text(self, tokens: list[Tensor]) -> Told:
        ids, mask = tokens
        text = self.encoders[0](ids, attention_mask=mask)[0]
        last = 1 - self.told_tokens
        told, told_mask = (torch.cat([x[:, :1], x[:, last:]], dim=1) for x in (text, mask))
        return Told(told, {"encoder_attention_mask": told_mask})

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        prediction: Tensor = network(
            noisy,
            encoder_hidden_states=told.text,
            timestep=timesteps * network.config.timestep_scale,
            **told.added,
        ).sample
        return prediction


class StraightforwardConsistency(StraightforwardStep):
    """Consistency-DPO: winners, then losers, each network called for every purpose."""

    def __init__(
        self, model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(model, pairs, device, dtype)
        self.abar = self.scheduler.alphas_cumprod.to(device)
        self.nothing = self.encode_text(self.tokenize([""] * len(pairs))).text

    def draw(self) -> Randomness:
        drawn = super().draw()
        stride = 1000 // SOLVER_STEPS
        steps = drawn.timesteps // stride  # uniform over the solver's steps
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(len(steps), device=self.device)
        return Randomness(drawn.noise, (steps + 1) * stride - 1, guidance)

    def loss(self, drawn: Randomness) -> Tensor:
        text = self.encode_text(self.tokens).text
        winners, losers = self.encode_images().chunk(2)
        margin = self._gain(winners, text, drawn) - self._gain(losers, text, drawn)
        return -F.logsigmoid(-self.model.objective["beta"] * margin).mean()

    def _gain(self, latents: Tensor, text: Tensor, drawn: Randomness) -> Tensor:
        """(B,) distance to the target of the policy minus that of the reference."""
        assert drawn.guidance is not None
        start = drawn.timesteps
        end = (start - 1000 // SOLVER_STEPS).clamp(min=0)
        guidance = guidance_embedding(drawn.guidance, self.policy.config.time_cond_proj_dim)
        arguments = {
            "encoder_hidden_states": text,
            "timestep_cond": guidance.to(self.dtype),
        }
        noisy = self.scheduler.add_noise(latents, drawn.noise, start)
        if self.model.target == "teacher":
            previous = self._solve(noisy, start, end, text, drawn.guidance)

        def distance(network: nn.Module) -> Tensor:
            output = self._consistent(network, noisy, start, arguments)
            target = latents
            if self.model.target == "teacher":
                with torch.no_grad():
                    target = self._consistent(self.reference, previous, end, arguments)
            distances = ((output - target) ** 2 + HUBER_C**2).sqrt() - HUBER_C
            return distances.mean(dim=(1, 2, 3))

        with torch.no_grad():
            reference = distance(self.reference)
        return distance(self.policy) - reference

    @torch.no_grad()
    def _solve(
        self, noisy: Tensor, start: Tensor, end: Tensor, text: Tensor, guidance: Tensor
    ) -> Tensor:
        """One guided DDIM step of the teacher."""
        assert self.teacher is not None
        conditional = self.teacher(noisy, start, encoder_hidden_states=text).sample
        unconditional = self.teacher(noisy, start, encoder_hidden_states=self.nothing).sample
        clean = self._clean(noisy, start, conditional)
        clean = clean + _column(guidance, noisy) * (
            clean - self._clean(noisy, start, unconditional)
        )
        noise = conditional + _column(guidance, noisy) * (conditional - unconditional)
        abar = self.abar[end]
        return _column(abar.sqrt(), noisy) * clean + _column((1 - abar).sqrt(), noisy) * noise

    def _consistent(
        self, network: nn.Module, noisy: Tensor, timesteps: Tensor, arguments: dict[str, Tensor]
    ) -> Tensor:
        """The consistency function of a network: it is the identity at timestep 0."""
        output = network(noisy, timesteps, **arguments).sample
        scaled = timesteps * TIMESTEP_SCALING
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        clean = self._clean(noisy, timesteps, output)
        return _column(c_skip, noisy) * noisy + _column(c_out, noisy) * clean

    def _clean(self, noisy: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        abar = self.abar[timesteps]
        return (noisy - _column((1 - abar).sqrt(), noisy) * noise) / _column(abar.sqrt(), noisy)


def _column(values: Tensor, images: Tensor) -> Tensor:
    """One number an image, to be multiplied with images, in their dtype."""
    return values.to(images.dtype)[:, None, None, None]


STEPS: dict[str, type[StraightforwardStep]] = {
    "sd": StraightforwardDiffusion,
    "sdxl": StraightforwardDiffusion,
    "lcm": StraightforwardConsistency,
    "sd3": StraightforwardSD3,
    "flux": StraightforwardFlux,
    "sana": StraightforwardSana,
}


def straightforward(
    model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
) -> StraightforwardStep:
    return STEPS[model.family](model, pairs, device, dtype)
