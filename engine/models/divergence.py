"""How far a tuned model has gone from its base: the policy-reference error, a proxy for their KL.

``D = E || f_policy(x_t, t, c) - f_reference(x_t, t, c) ||^2``, a mean over channels, height and
width, over images x_0 that the *base* drew for the prompts c, over timesteps t, and over the noise
of ``x_t = alpha_t x_0 + sigma_t eps``; f is what the network predicts (eps, v or x_0), for a
consistency model told a guidance weight w.

Why it stands for the KL: with fixed variances s_t^2 the reverse process of a DDPM has Gaussian
steps, whose means differ by a multiple of the difference of the predictions, so that

    KL(reference || policy) = sum_t beta_t^2 / (2 s_t^2 (1 - beta_t) (1 - abar_t))
                                    * E || eps_policy(x_t, t, c) - eps_reference(x_t, t, c) ||^2

over x_t of the reference's own chains (Ho et al., arXiv 2006.11239, eqs. 3 and 11-12, with the
reference in the place of the data). Here all timesteps count the same, as they do in the training
loss, and x_t is the base's finished image made noisy again. The number is 0 for the base itself,
grows with the KL, and compares runs of one base; it is no KL in nats.

Timesteps, noise and w are functions of (seed, prompt, image, draw): all runs meet the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..basics.keyed import content_id
from .protocol import Backbone, Conditioning, Framing


@dataclass(frozen=True)
class Divergence:
    """The error of any policy against the reference, on the base's images of a prompt."""

    backbone: Backbone
    reference: nn.Module
    seed: int
    draws: int
    resolution: tuple[int, int]
    batch_size: int

    @torch.no_grad()
    def of(self, policy: nn.Module, prompt: str, latents: Tensor) -> NDArray[np.float64]:
        """(images,): for each image of the base, of which there are ``latents`` (images, C, H, W),
        the mean over its draws.
        """
        rows = torch.arange(len(latents)).repeat_interleave(self.draws)
        visits = torch.arange(self.draws).repeat(len(latents))
        # Ids that no pair of a shard has: these draws are none that training has met.
        ids = [content_id("divergence", prompt, str(image)) for image in range(len(latents))]
        items = torch.as_tensor(ids)[rows]
        errors = [
            self._errors(policy, prompt, latents[rows[part].to(latents.device)], items[part], turns)
            for part, turns in zip(
                torch.arange(len(rows)).split(self.batch_size),
                visits.split(self.batch_size),
                strict=True,
            )
        ]
        table = torch.cat(errors).view(len(latents), self.draws)
        return table.mean(dim=1).cpu().numpy()

    def _errors(
        self, policy: nn.Module, prompt: str, latents: Tensor, items: Tensor, visits: Tensor
    ) -> Tensor:
        """(N,) float64 of N draws."""
        noise = self.backbone.noise
        draw = noise.draw(self.seed, items, visits)
        # The corruption is made for pairs: each image is both halves of its own.
        noisy = noise.corrupt(torch.cat([latents, latents]), draw)[0][: len(latents)]
        conditioning = self._conditioning(prompt, len(latents))
        if draw.solver is not None:
            conditioning = conditioning.with_extras(guidance=draw.solver.guidance)
        predictions = [
            self.backbone.predict(net, noisy, draw.timesteps, conditioning).double()
            for net in (policy, self.reference)
        ]
        return ((predictions[0] - predictions[1]) ** 2).flatten(1).mean(dim=1)

    def _conditioning(self, prompt: str, count: int) -> Conditioning:
        """Of images that are whole and of the size they were drawn in, as all samples are."""
        size = torch.tensor([self.resolution]).expand(count, 2)
        framing = Framing(size, torch.zeros_like(size), self.resolution)
        return self.backbone.encode_prompts([prompt] * count, framing)
