"""Sections of a recipe for stage 2: what is optimised, how, how fast, and on what machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveIntOrAuto,
    Section,
)


class Cluster(Section):
    """How long to wait, for other ranks and before leaving."""

    timeout_minutes: PositiveFloat = 30.0
    """Longest wait of a rank for the others, in minutes; then the run ends instead of hanging.
    More than the slowest rank is ever late, e.g. in writing a large checkpoint."""
    grace_seconds: PositiveFloat = 300.0
    """Seconds from a request to stop (SIGTERM, in all three verbs) to leaving even without having
    come to a safe point. Give it what the cluster gives, e.g. Slurm's `--signal=TERM@300`."""


class Objective(Section):
    """What is optimised."""

    type: Literal["diffusion_dpo", "consistency_dpo", "sft", "consistency_sft"] = "diffusion_dpo"
    """`diffusion_dpo` for eps/v models, `consistency_dpo` for LCM (two scales of beta); `sft` and
    `consistency_sft` train either on the winners alone: the baselines."""
    target: Literal["teacher", "image", "mixed"] = "teacher"
    """What a consistency model's answer is held to: the reference's answer one step of the teacher
    nearer to the image (as published); the image's own latents, which needs no teacher and half
    the work; or `mixed`, the teacher's in the last quarter of the timesteps, else the image."""
    beta: PositiveFloat = 5000
    """Strength of the pull towards the reference (published: diffusion 5000, consistency 200, flow
    100 to 2000). Errors are means over a latent; for trainers that sum them divide by C x h x w."""
    target_logit: PositiveFloat | None = None
    """Let beta follow the margins, so that the mean size of the logits is this, e.g. 1.386, where
    the policy prefers the winner by 4 to 1: beta starts as given and stays within a factor of 30 of
    that. `null`: beta as given."""
    distance: Literal["mse", "pseudo_huber"] = "mse"
    """Error of a prediction: mean square (diffusion) or pseudo-Huber (consistency)."""
    huber_c: PositiveFloat = 1e-3
    """Bend of the pseudo-Huber distance; unused for mse."""
    loss: Literal["sigmoid", "ipo", "linear"] = "sigmoid"
    """Loss of a margin: DPO's log-sigmoid; IPO's square, which stops at a margin instead of
    widening it for ever; or Linear-DPO's, whose pull falls linearly with the margin and never
    vanishes (as published with `reference_ema=0.995`)."""
    pair_weighting: Literal["uniform", "rank"] = "uniform"
    """How much a pair counts: all the same, or by what swapping its ranks would change of the
    prompt's discounted gain, with a mean of 1 (RankDPO); for pairs of sampled candidates."""
    reference_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay a step of a moving average of the adapter that the reference has, e.g. 0.995; 0: the
    reference stays what the policy was at the start. For adapters, under ZeRO-1 and 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose label is taken to be wrong (cDPO); for `loss=sigmoid`."""
    timestep_weighting: Literal["uniform", "min_snr"] = "uniform"
    """How much a timestep counts: all the same (as published), or min-SNR-5 with a mean of 1."""
    time_weight: Literal["constant", "epsilon", "x0"] = "constant"
    """Flow models only, with s the share of noise: beta at every s, as Flow-DPO recommends; beta
    (1 - s)^2, as if errors of the noise were compared; beta s^2, as if those of the image were."""
    loser_gradient: Fraction = 1.0
    """Share of the loser's gradient that is kept; below 1 it holds back the failure in which the
    errors of winner and loser rise together."""
    loser_safeguard: Fraction | None = None
    """Keep of each loser's gradient only what leaves its winner this share of the gain it would
    have alone, to first order (published: 0.9 for SD 1.5, 0.6 for SDXL); null: off."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Objective:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing} needs loss=sigmoid; loss={self.loss} has "
                "no labels to smooth"
            )
        without_pairs = {
            "loss": "sigmoid",
            "label_smoothing": 0,
            "pair_weighting": "uniform",
            "reference_ema": 0,
            "target_logit": None,
            "loser_gradient": 1,
            "loser_safeguard": None,
        }
        given = [name for name, off in without_pairs.items() if getattr(self, name) != off]
        if self.type.endswith("sft") and given:
            raise ValueError(
                f"{', '.join(given)} has no effect with type={self.type}, which compares nothing"
            )
        if self.target_logit is not None and self.loss == "ipo":
            raise ValueError(
                f"target_logit={self.target_logit:g} does not go with loss=ipo, which has a target "
                "of its own for the logits: use loss=sigmoid or linear"
            )
        if self.target != "teacher" and not self.is_consistency:
            raise ValueError(
                f"target={self.target} has no effect with type={self.type}: it is for "
                "consistency_dpo and consistency_sft"
            )
        if self.is_consistency and self.timestep_weighting != "uniform":
            raise ValueError(
                "timestep_weighting=min_snr is for diffusion models: a consistency model always "
                "predicts x0"
            )
        return self

    @property
    def is_consistency(self) -> bool:
        """Whether it trains a consistency model."""
        return self.type.startswith("consistency")

    @property
    def needs_teacher(self) -> bool:
        """Whether the diffusion model that a consistency model was distilled from is asked."""
        return self.is_consistency and self.target != "image"


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate, reached after warm-up and constant from there. The papers use 5e-5 and
    3e-4, their public code 1e-4."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""


class Train(Section):
    """Stage 2: the optimisation."""

    steps: PositiveInt = 10_000
    """Optimiser steps in all (skipped ones do not count)."""
    global_batch: PositiveInt = 32
    """Pairs in one optimiser step, over all ranks and accumulation; fixes what the run computes.
    The default is the papers' 16 times 2 steps of accumulation."""
    micro_batch: PositiveIntOrAuto = "auto"
    """Most pairs in one forward on one rank: memory only. Accumulation follows from it. `auto`: the
    largest divisor of a rank's share, `global_batch` / ranks, that by the dry run's plan takes at
    most 80 % of a GPU's memory, or of this machine's divided by its ranks; kept by a resume on as
    many ranks. A number divides that share too."""
    optimizer: Optimizer = Optimizer()
    """Optimiser settings."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up of the learning rate."""
    gradient_clip: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the networks; optimiser states and errors are float32 in any case. `fp16` for
    GPUs older than 2020, `fp32` for CPUs."""
    reference: Literal["copy", "offload"] = "copy"
    """Where full fine-tuning keeps its frozen reference: `copy` on the device (under ZeRO-3 divided
    among the ranks like the policy), `offload` in host memory, streamed to the device layer by
    layer at each use. Adapters need neither: their reference is the frozen weights."""
    caption_dropout: Fraction = 0.1
    """Share of pairs trained with the empty caption (winner and loser together), on which guidance
    rests; the papers use 0 to 0.25."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """`auto`: Triton on CUDA, PyTorch elsewhere; on a CPU `triton` wants TRITON_INTERPRET=1."""
    threads: NonNegativeInt = 0
    """CPU threads a rank computes with; 0 divides the machine's cores among its ranks. Fix it
    where float32 results, those of `prepare` among them, should repeat to the last bit on other
    machines or other numbers of ranks."""
    max_skipped: PositiveInt = 5
    """Stop after so many non-finite steps in a row."""
    log_every: PositiveInt = 10
    """Optimiser steps between transfers of metrics to the host."""
    sample_every: NonNegativeInt = 500
    """Optimiser steps between sample grids; 0 turns them off."""
    sample_prompts: PositiveInt = 4
    """Prompts shown in each sample grid."""


class Speed(Section):
    """Memory and speed of the networks; but for `frozen_cache` what is computed stays the same up
    to rounding.
    """

    channels_last: Literal["auto", "on", "off"] = "auto"
    """Order of images in memory: channels next to each other, as tensor cores want them. `auto`:
    on a GPU."""
    fused_kernels: Literal["auto", "on", "off"] = "auto"
    """GroupNorm with SiLU, and GEGLU, as one Triton kernel each: fewer passes over memory, fewer
    saved activations. `auto`: on a GPU."""
    attention: Literal["auto", "sdpa", "cudnn", "xformers", "flash"] = "auto"
    """Attention kernel of the denoiser: PyTorch's choice, cuDNN's, or that of a package. `auto`
    takes the first of cudnn (in half precision on an H100, H200 or B200), flash, xformers and sdpa
    that imports and works on the device, and says which."""
    compile: Literal["off", "regional", "full"] = "off"
    """torch.compile for training: minutes at the start for faster steps. `regional` compiles each
    kind of block once, `full` the whole denoiser. Not with ZeRO-3; step-0 loss within 1e-3."""
    cuda_graph: Literal["off", "auto"] = "off"
    """`auto`: capture the networks of a micro-batch and the gradients once and replay them, which
    takes the host two launches in place of thousands. With adapters on a GPU under ZeRO 1 or 2;
    where it does not go the head of the run says why. Not tried on a GPU yet."""
    rounding: Literal["fixed", "free"] = "fixed"
    """`fixed`: equal starts take equal kernels. `free`: in training, on a GPU, cuDNN times its
    convolutions at each start and takes the fastest, and matrix products of float32 are TF32; a run
    that is resumed rounds differently from there on. Not tried on a GPU yet."""
    activation_checkpointing: bool = False
    """Keep the inputs of the policy's blocks alone and compute the rest again in the backward pass:
    a quarter of the activations, for a third more operations with adapters, a quarter without."""
    encoders: Literal["device", "offload"] = "device"
    """Where frozen text encoders and VAE wait. `offload`: in host memory, on the GPU only while
    they encode a new prompt or draw a sample."""
    frozen_cache: Annotated[int, Field(ge=0, le=1000)] = 0
    """Draws of timestep, noise, guidance and caption dropout that a pair has: its visit v repeats
    visit v modulo this, and what the frozen networks say of it is kept on the disk for all runs
    that ask the same. 0: every visit draws anew."""
    frozen_cache_at: str | None = None
    """Folder for what is kept; by default beside the shards, which for `data/shards` is
    `data/shards.frozen`, or `~/.cache/cdpo/frozen` for shards behind a URL."""
    prompt_cache_mib: NonNegativeInt = 256
    """Memory on the device for encoded prompts, in MiB (Stable Diffusion in half precision 0.11 a
    prompt, XL 0.3); those not used for longest make room and are encoded again when they return."""

    @model_validator(mode="after")
    def _a_place_is_for_something(self) -> Speed:
        if self.frozen_cache_at is not None and not self.frozen_cache:
            raise ValueError(
                f"frozen_cache_at={self.frozen_cache_at} has no effect with frozen_cache=0: give "
                "that the number of draws a pair, e.g. 4"
            )
        return self


class Checkpoint(Section):
    """Committed snapshots a run resumes from by itself."""

    every: PositiveInt = 500
    """Optimiser steps between checkpoints; the last step always makes one."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; beside them, while batches are skipped since, the last one that was
    taken after a finite step."""


class Monitor(Section):
    """DeepSpeed's own monitors, beside metrics.jsonl which is always written."""

    tensorboard: bool = False
    """Event files in `<run>/tensorboard`."""
    csv: bool = False
    """One CSV a metric in `<run>/csv`."""
    wandb_project: str | None = None
    """Project on Weights & Biases (needs the `wandb` package and its login)."""
