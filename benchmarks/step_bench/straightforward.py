"""The straightforward training step: the same losses as public training scripts write them.

What these scripts do, and ours does not: images go through the VAE and prompts through the text
encoders in every step; the reference is a second copy of the network; the loss is eager PyTorch in
the dtype of the networks. Diffusion models predict for winners and losers in one call. Consistency
models predict for them one after the other, once more for guidance, and make the target anew for
each distance it is used in: 12 calls on B images, 14.2 forwards of the network a pair. With
the image as target there are 4 calls.

Where scripts differ the cheaper way is taken: the VAE works in the networks' dtype, its posterior's
mean is used, the empty prompt is encoded once, and nothing waits for the value of the loss.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cdpo.engine.models.latent_diffusion import guidance_embedding
from step_bench.models import StepModel, build
from step_bench.setup import Pairs, Update, add_adapter, trainable
from torch import Tensor, nn

SOLVER_STEPS, GUIDANCE = 50, (5.0, 15.0)
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER_C = 1e-3


class Randomness(NamedTuple):
    """What is drawn for B pairs; winner and loser share it."""

    noise: Tensor
    """(B, C, h, w)."""
    timesteps: Tensor
    """(B,) int64."""
    guidance: Tensor | None
    """(B,), of consistency models."""


class Told(NamedTuple):
    """What a UNet is told of N images."""

    text: Tensor
    added: dict[str, Tensor] | None


class StraightforwardStep:
    """What is common to both families; `loss` is theirs."""

    def __init__(
        self, model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
    ) -> None:
        networks = build(model, device, dtype)
        pipeline = networks.pipeline
        self.model, self.pairs, self.device, self.dtype = model, pairs, device, dtype
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        parts = pipeline.components
        self.encoders = [
            parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts
        ]
        self.teacher = networks.teacher
        self.reference = copy.deepcopy(pipeline.unet)
        self.policy = add_adapter(pipeline.unet, model)
        self.update = Update(trainable(self.policy), device)
        self._tokenize = pipeline.tokenizer
        self.tokens = self._ids(pairs.prompts)
        self.abar = self.scheduler.alphas_cumprod.to(device)

    def __call__(self) -> None:
        """One optimisation step."""
        self.update(self.loss(self.draw()))

    def networks(self) -> dict[str, nn.Module]:
        """By the names that their calls are counted under."""
        named = {"policy": self.policy, "reference": self.reference, "teacher": self.teacher}
        named |= {"vae": self.vae.encoder}
        named |= {f"text {i + 1}": encoder for i, encoder in enumerate(self.encoders)}
        return {name: network for name, network in named.items() if network is not None}

    def loss(self, drawn: Randomness) -> Tensor:
        raise NotImplementedError

    def draw(self) -> Randomness:
        count, side = len(self.pairs), self.model.side // 8
        noise = torch.randn(count, 4, side, side, device=self.device, dtype=self.dtype)
        timesteps = torch.randint(1000, (count,), device=self.device)
        return Randomness(noise, timesteps, None)

    @torch.no_grad()
    def encode_images(self) -> Tensor:
        pixels = self.pairs.pixels.to(self.device, non_blocking=True).to(self.dtype)
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Told:
        if len(self.encoders) == 1:
            return Told(self.encoders[0](tokens)[0], None)
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        side = self.model.side
        time_ids = torch.tensor([side, side, 0, 0, side, side], device=self.device)
        added = {"text_embeds": outputs[1][0], "time_ids": time_ids.repeat(len(tokens), 1)}
        return Told(text, added)

    def _ids(self, prompts: list[str]) -> Tensor:
        """Tokens are made ahead, as by a data loader's workers."""
        tokens = self._tokenize(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)


class StraightforwardDiffusion(StraightforwardStep):
    """Diffusion-DPO: winners and losers stacked, one call of each network."""

    def loss(self, drawn: Randomness) -> Tensor:
        latents = self.encode_images()
        noise, timesteps = drawn.noise.repeat(2, 1, 1, 1), drawn.timesteps.repeat(2)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        told = self.encode_text(self.tokens)
        text = told.text.repeat(2, 1, 1)
        added = told.added and {name: row.repeat(2, 1) for name, row in told.added.items()}
        arguments = {"encoder_hidden_states": text, "added_cond_kwargs": added}

        prediction = self.policy(noisy, timesteps, **arguments).sample
        policy_error = ((prediction - noise) ** 2).mean(dim=(1, 2, 3))
        with torch.no_grad():
            prediction = self.reference(noisy, timesteps, **arguments).sample
            reference_error = ((prediction - noise) ** 2).mean(dim=(1, 2, 3))
        policy_winner, policy_loser = policy_error.chunk(2)
        reference_winner, reference_loser = reference_error.chunk(2)
        margin = (policy_winner - policy_loser) - (reference_winner - reference_loser)
        return -F.logsigmoid(-0.5 * self.model.objective["beta"] * margin).mean()


class StraightforwardConsistency(StraightforwardStep):
    """Consistency-DPO: winners, then losers, each network called for every purpose."""

    def __init__(
        self, model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(model, pairs, device, dtype)
        self.nothing = self.encode_text(self._ids([""] * len(pairs))).text

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


def straightforward(
    model: StepModel, pairs: Pairs, device: torch.device, dtype: torch.dtype
) -> StraightforwardStep:
    kind = StraightforwardConsistency if model.family == "lcm" else StraightforwardDiffusion
    return kind(model, pairs, device, dtype)
