"""A step of a tiny LCM, its calls recorded, and METHOD's tensors of it in float64."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import tiny
import torch
from cdpo.engine.models import load_backbone
from cdpo.engine.models.adapters import add_lora, twin_of
from cdpo.engine.models.latent_diffusion import LatentDiffusion
from cdpo.engine.models.protocol import Conditioning, Draw
from cdpo.engine.objectives import Loss, Networks, TrainingBatch, build_objective
from cdpo.engine.recipe import Adapter, Model, Objective
from consistency_cases import clean_and_noise, scalings
from torch import Tensor, nn

CPU = torch.device("cpu")
PAIRS = 3
SPEC = Objective(type="consistency_dpo", beta=200, distance="pseudo_huber")


@dataclass
class Step:
    """A step's networks and batch, with a record of every call."""

    backbone: LatentDiffusion
    policy: nn.Module
    reference: nn.Module
    teacher: nn.Module
    batch: TrainingBatch
    latents: Tensor
    calls: list[tuple[str, int, bool]]

    def networks(self) -> Networks:
        def recorded(
            name: str, net: nn.Module, noisy: Tensor, timesteps: Tensor, told: Conditioning
        ) -> Tensor:
            self.calls.append((name, len(noisy), torch.is_grad_enabled()))
            return self.backbone.predict(net, noisy, timesteps, told)

        named = {"policy": self.policy, "reference": self.reference, "teacher": self.teacher}
        return Networks(**{name: partial(recorded, name, net) for name, net in named.items()})

    def run(self, spec: Objective = SPEC) -> Loss:
        return build_objective(spec)(self.networks(), self.batch)


def make(  # type: ignore[no-untyped-def]
    folder,
    prediction: str = "epsilon",
    perturb: float = 0.3,
    precision: str = "fp32",
    spec: Objective = SPEC,
):
    """A step; what only a teacher needs is there if the objective asks one."""
    tiny.pipeline(prediction_type=prediction).save_pretrained(folder / "sd")
    tiny.lcm_unet().save_pretrained(folder / "lcm")
    model = Model(
        backbone="lcm",
        path=str(folder / "sd"),
        unet=str(folder / "lcm"),
        resolution=(16, 16),
        guidance_range=(1.0, 4.0),
    )
    backbone = load_backbone(model, CPU, precision)
    reference = twin_of(backbone.denoiser)
    policy = add_lora(backbone.denoiser, Adapter(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, perturb, generator=generator)
    latents = torch.randn(2 * PAIRS, 4, 8, 8, generator=generator)
    # Those of a mixed target have low noise and high noise among them.
    ids = torch.arange(PAIRS) + (48 if spec.target == "mixed" else 40)
    draw = backbone.noise.draw(3, ids, torch.zeros_like(ids))
    noisy, target = backbone.noise.corrupt(latents, draw)
    prompts = ["red apple", "house", "tree"]
    batch = TrainingBatch(noisy, target, draw, backbone.encode_prompts([*prompts, *prompts]))
    teacher = nn.Identity()
    if spec.needs_teacher:
        teacher = backbone.load_teacher()
        batch = replace(batch, unconditional=backbone.encode_prompts([""] * 6))
    return Step(backbone, policy, reference, teacher, batch, latents, [])


def guidance_embedding(w: float, width: int) -> Tensor:
    """As the LCM paper's code has it: sines, then cosines, of 1000 w."""
    half = width // 2
    angles = 1000 * w * np.exp(np.arange(half) * -math.log(10_000) / (half - 1))
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)]))[None]


def recomputed(
    step: Step, prediction: str, trained: str = "loss", spec: Objective = SPEC
) -> dict[str, Tensor]:
    """METHOD, image by image, in float64: x_prev, target, both distances, logits, loss, and the
    mean distance of the winners; with the gradient of ``trained``, one of the last two.
    """
    nets = {
        name: copy.deepcopy(getattr(step, name)).double()
        for name in ("policy", "reference", "teacher")
    }
    for parameter in nets["policy"].parameters():
        parameter.grad = None
    abar = step.backbone.pipeline.scheduler.alphas_cumprod.double()
    draw: Draw = step.batch.draw
    assert draw.solver is not None

    def factors(t: int) -> tuple[Tensor, Tensor]:
        return abar[t].sqrt(), (1 - abar[t]).sqrt()

    def consistency(name: str, x: Tensor, t: int, w: float, text: Tensor) -> Tensor:
        cond = guidance_embedding(w, 10)
        out = nets[name](x, t, encoder_hidden_states=text, timestep_cond=cond).sample
        c_skip, c_out = scalings(t)
        return c_skip * x + c_out * clean_and_noise(x, out, *factors(t), prediction)[0]

    found: dict[str, list[Tensor]] = {"x_prev": [], "target": [], "d_policy": [], "d_reference": []}

    def taught(row: int, x: Tensor, t: int, w: float, text: Tensor) -> Tensor:
        """The target that the teacher leads to."""
        assert step.batch.unconditional is not None
        t_next = max(t - 20, 0)
        empty = step.batch.unconditional.text[row : row + 1].double()
        told, untold = (
            clean_and_noise(
                x,
                nets["teacher"](x, t, encoder_hidden_states=each).sample,
                *factors(t),
                prediction,
            )
            for each in (text, empty)
        )
        clean, noise = (a + w * (a - b) for a, b in zip(told, untold, strict=True))
        alpha, sigma = factors(t_next)
        x_prev = (alpha * clean + sigma * noise).detach()
        found["x_prev"].append(x_prev)
        return consistency("reference", x_prev, t_next, w, text).detach()

    for row in range(2 * PAIRS):
        pair = row % PAIRS
        t, w = int(draw.timesteps[pair]), float(draw.solver.guidance[pair])
        x = step.batch.noisy[row : row + 1].double()
        text = step.batch.conditioning.text[row : row + 1].double()
        image = spec.target == "image" or (spec.target == "mixed" and t < 750)
        target = step.latents[row : row + 1].double() if image else taught(row, x, t, w, text)

        def distance(y: Tensor, target: Tensor = target) -> Tensor:
            return (((y - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()

        found["target"].append(target)
        found["d_policy"].append(distance(consistency("policy", x, t, w, text)))
        found["d_reference"].append(distance(consistency("reference", x, t, w, text)).detach())
    stacked = {
        name: torch.stack([v.squeeze(0) for v in values])
        for name, values in found.items()
        if values
    }
    gain = stacked["d_policy"] - stacked["d_reference"]
    stacked["logits"] = -200 * (gain[:PAIRS] - gain[PAIRS:])
    stacked["loss"] = -torch.log(torch.sigmoid(stacked["logits"])).mean()
    stacked["winners"] = stacked["d_policy"][:PAIRS].mean()
    stacked[trained].backward()
    return stacked | {
        f"grad {name}": parameter.grad
        for name, parameter in nets["policy"].named_parameters()
        if parameter.grad is not None
    }
