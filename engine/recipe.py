"""The schema of a recipe: one YAML file is one run, and every knob is declared here.

A recipe only *chooses*; what the choices do lives in the modules that take them. Fields without a
default must be given. Unknown keys are errors (see :mod:`cdpo.engine.recipe_file`, which reads the
file, applies ``dotted.key=value`` overrides and words the errors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .recipe_adapter import Adapter, Export, check_exports, check_growth
from .recipe_cluster import Cluster
from .recipe_compare import Compare
from .recipe_data import Data
from .recipe_prompts import Prompts
from .recipe_reward import Reward, check_reward
from .recipe_source import Generate, Source, check_source
from .recipe_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Sampler,
    Section,
)


class Model(Section):
    """The text-to-image model to align."""

    backbone: Literal["sd", "sdxl", "lcm"] = "sd"
    """Model family: decides text encoders, conditioning and noise process."""
    path: str
    """Folder in diffusers format, or hub id, e.g. `stable-diffusion-v1-5/stable-diffusion-v1-5`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for a run others should repeat."""
    variant: str | None = None
    """Weight variant on the hub, e.g. `fp16`."""
    vae: str | None = None
    """Another VAE (folder or hub id) in place of the model's own, e.g. an fp16-safe SDXL VAE."""
    unet: str | None = None
    """Another UNet (folder or hub id) in place of the model's own, e.g.
    `latent-consistency/lcm-sdxl`."""
    lcm_lora: str | None = None
    """`backbone: lcm` only: an LCM-LoRA (folder, file or hub id) that makes `path` an LCM."""
    teacher: str | None = None
    """`backbone: lcm` only: the diffusion model the LCM was distilled from; where `unet` or
    `lcm_lora` turned `path` into an LCM, `path` as it was."""
    solver_steps: PositiveInt = 50
    """`backbone: lcm` only: steps of the teacher's DDIM solver the LCM was distilled with."""
    guidance_range: tuple[NonNegativeFloat, NonNegativeFloat] = (5.0, 15.0)
    """`backbone: lcm` only: range of the weight w that guides the teacher in training; a sampler's
    `guidance` is w + 1."""
    resolution: tuple[PositiveInt, PositiveInt] = (512, 512)
    """Height and width in pixels of what is sampled: multiples of 8 x the UNet's downsampling."""

    @model_validator(mode="after")
    def _consistency_keys_are_for_consistency_models(self) -> Model:
        if self.backbone != "lcm":
            given = [key for key in ("lcm_lora", "teacher") if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} belongs to backbone=lcm, not {self.backbone}"
                )
        if self.unet is not None and self.lcm_lora is not None:
            raise ValueError("unet and lcm_lora both make an LCM of path: give one of them")
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range=[{low:g}, {high:g}] runs from high to low: swap them")
        return self


class Prepare(Section):
    """Stage 1: candidates, scores, pairs, shards."""

    source: Source = Generate()
    """Where images and preferences come from: sampled, or a data set that is already there."""
    candidates_per_prompt: Annotated[int, Field(ge=2)] = 50
    """Images ranked for each prompt (M in the papers, 500 there, 50 reported about equal)."""
    sampler: Sampler = Sampler()
    """Sampling of candidates."""
    batch_size: PositiveInt = 16
    """Images in one denoiser call (guidance doubles the rows); bounds memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the denoiser in sampling; the VAE always works in float32."""
    contact_sheet_prompts: NonNegativeInt = 4
    """Prompts shown in contact_sheet.png, with ranked candidates and one pair of each tier."""


class Curriculum(Section):
    """Which pairs are formed, how hard each is, and when each tier opens."""

    tiers: PositiveInt = 5
    """Number of difficulty tiers B; 1 is the easiest (3, 5 and 7 work in the papers)."""
    difficulty: Literal["rank_gap", "score_gap"] = "rank_gap"
    """What makes a pair easy: a large gap in rank (as published) or in reward."""
    binning: Literal["equal_width", "quantile"] = "equal_width"
    """Tiers of equal width in the gap (as published) or of equal pair count, per prompt."""
    min_score_gap: NonNegativeFloat = 0.0
    """Pairs whose rewards differ by less never form; exact ties never do."""
    pairs_per_prompt_per_tier: PositiveInt = 16
    """Pair budget: all O(M^2) pairs would repeat each image up to M-1 times."""
    order: Literal["easy_to_hard", "hard_to_easy", "random"] = "easy_to_hard"
    """`random` trains on the same pairs without order: plain DPO."""
    cumulative: bool = True
    """Stage k trains on the union of tiers 1..k (as published); false: on tier k alone."""
    steps_per_tier: PositiveInt = 400
    """Optimiser steps before the next tier opens (K); the last stage takes the rest."""


class Objective(Section):
    """What is optimised."""

    type: Literal["diffusion_dpo", "consistency_dpo", "sft", "consistency_sft"] = "diffusion_dpo"
    """`diffusion_dpo` for eps/v models, `consistency_dpo` for LCM (two scales of beta); `sft` and
    `consistency_sft` train either on the winners alone: the baselines."""
    beta: PositiveFloat = 5000
    """Strength of the pull towards the reference (published: diffusion 5000, consistency 200)."""
    distance: Literal["mse", "pseudo_huber"] = "mse"
    """Error of a prediction: mean square (diffusion) or pseudo-Huber (consistency)."""
    huber_c: PositiveFloat = 1e-3
    """Bend of the pseudo-Huber distance; unused for mse."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of a margin: DPO's log-sigmoid, or IPO's square, which stops at a margin instead of
    widening it for ever."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose label is taken to be wrong (cDPO); for `loss=sigmoid`."""
    timestep_weighting: Literal["uniform", "min_snr"] = "uniform"
    """How much a timestep counts: all the same (as published), or min-SNR-5 with a mean of 1."""
    loser_gradient: Fraction = 1.0
    """Share of the loser's gradient that is kept; below 1 it holds back the failure in which the
    errors of winner and loser rise together."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Objective:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing} needs loss=sigmoid; loss={self.loss} has "
                "no labels to smooth"
            )
        without_pairs = {"loss": "sigmoid", "label_smoothing": 0, "loser_gradient": 1}
        given = [name for name, off in without_pairs.items() if getattr(self, name) != off]
        if self.type.endswith("sft") and given:
            raise ValueError(
                f"{', '.join(given)} has no effect with type={self.type}, which compares nothing"
            )
        if self.type.startswith("consistency") and self.timestep_weighting != "uniform":
            raise ValueError(
                "timestep_weighting=min_snr is for diffusion models: a consistency model always "
                "predicts x0"
            )
        return self


class Optimizer(Section):
    """AdamW."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate, reached after warm-up and constant from there."""
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
    """Pairs in one optimiser step, over all ranks and accumulation; fixes what the run computes."""
    micro_batch: PositiveInt = 4
    """Most pairs in one forward on one rank: memory only. Accumulation follows from it."""
    optimizer: Optimizer = Optimizer()
    """Optimiser settings."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up of the learning rate."""
    gradient_clip: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; optimiser states and errors are float32 in any case."""
    reference: Literal["copy", "offload"] = "copy"
    """Where full fine-tuning keeps its frozen reference: `copy` on the device (under ZeRO-3 divided
    among the ranks like the policy), `offload` in host memory, streamed to the device layer by
    layer at each use. Adapters need neither: their reference is the frozen weights."""
    caption_dropout: Fraction = 0.0
    """Share of pairs trained with the empty caption (winner and loser together)."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """`auto`: Triton on CUDA, PyTorch elsewhere; on a CPU `triton` wants TRITON_INTERPRET=1."""
    threads: NonNegativeInt = 0
    """CPU threads a rank computes with; 0 divides the machine's cores among its ranks. Fix it
    where float32 results should repeat to the last bit on other machines."""
    max_skipped: PositiveInt = 5
    """Stop after so many non-finite steps in a row."""
    log_every: PositiveInt = 10
    """Optimiser steps between transfers of metrics to the host."""
    sample_every: NonNegativeInt = 500
    """Optimiser steps between sample grids; 0 turns them off."""
    sample_prompts: PositiveInt = 4
    """Prompts shown in each sample grid."""


class Speed(Section):
    """Memory and speed of the networks; what is computed stays the same up to rounding."""

    channels_last: Literal["auto", "on", "off"] = "auto"
    """Order of images in memory: channels next to each other, as tensor cores want them. `auto`:
    on a GPU."""
    fused_kernels: Literal["auto", "on", "off"] = "auto"
    """GroupNorm with SiLU, and GEGLU, as one Triton kernel each: fewer passes over memory, fewer
    saved activations. `auto`: on a GPU."""
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    """Attention kernel of the denoiser: PyTorch's, or that of a package. `auto` takes the first of
    flash, xformers and sdpa that imports and works on the device, and says which."""
    compile: Literal["off", "regional", "full"] = "off"
    """torch.compile for training: minutes at the start for faster steps. `regional` compiles each
    kind of block once, `full` the whole denoiser. Not with ZeRO-3; step-0 loss within 1e-3."""
    activation_checkpointing: bool = False
    """Keep the inputs of the policy's blocks alone and compute the rest again in the backward pass:
    a quarter of the activations, for a third more operations with adapters, a quarter without."""
    encoders: Literal["device", "offload"] = "device"
    """Where frozen text encoders and VAE wait. `offload`: in host memory, on the GPU only while
    they encode a new prompt or draw a sample."""
    prompt_cache_mib: NonNegativeInt = 256
    """Memory on the device for encoded prompts, in MiB (Stable Diffusion in half precision 0.11 a
    prompt, XL 0.3); those not used for longest make room and are encoded again when they return."""


class Checkpoint(Section):
    """Committed snapshots a run resumes from by itself."""

    every: PositiveInt = 500
    """Optimiser steps between checkpoints; the last step always makes one."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Monitor(Section):
    """DeepSpeed's own monitors, beside metrics.jsonl which is always written."""

    tensorboard: bool = False
    """Event files in `<run>/tensorboard`."""
    csv: bool = False
    """One CSV a metric in `<run>/csv`."""
    wandb_project: str | None = None
    """Project on Weights & Biases (needs the `wandb` package and its login)."""


class Recipe(Section):
    """One run, whole."""

    run_dir: str
    """Folder of everything this run writes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every random number of the run is a function of it."""
    model: Model
    """The model to align."""
    prompts: Prompts
    """Prompts, for training and held out."""
    reward: Reward
    """The reward that ranks candidates."""
    prepare: Prepare = Prepare()
    """Stage 1."""
    curriculum: Curriculum = Curriculum()
    """Pairs, tiers, pacing."""
    data: Data = Data()
    """Pair shards."""
    adapter: Adapter = Adapter()
    """What is trained."""
    objective: Objective = Objective()
    """The loss."""
    train: Train = Train()
    """Stage 2."""
    speed: Speed = Speed()
    """Memory and speed of the networks, in all stages."""
    deepspeed: str = "ds_configs/zero2.json"
    """A plain DeepSpeed JSON file; what the recipe decides is filled in."""
    checkpoint: Checkpoint = Checkpoint()
    """Snapshots."""
    cluster: Cluster = Cluster()
    """Waiting and leaving."""
    monitor: Monitor = Monitor()
    """Trackers."""
    export: Export = Export()
    """What users get."""
    compare: Compare = Compare()
    """Evidence."""

    @property
    def shards_dir(self) -> Path:
        """The folder `prepare` writes the pair shards to; no meaning where `data.path` is a URL."""
        return Path(self.shards_at.removeprefix("file://"))

    @property
    def shards_at(self) -> str:
        """The folder or URL that `train` reads the pair shards from."""
        return self.data.path or str(Path(self.run_dir) / "shards")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        streamed = self.adapter.type == "full" and self.train.reference == "offload"
        if streamed and self.speed.compile != "off":
            raise ValueError(
                f"speed.compile={self.speed.compile} does not go with train.reference=offload, "
                "whose layers come and go while they compute: use compile=off or reference=copy"
            )
        if self.train.global_batch % self.data.lanes:
            raise ValueError(
                f"train.global_batch={self.train.global_batch} is not a multiple of "
                f"data.lanes={self.data.lanes}: every lane gives equally many pairs to a batch"
            )
        if (self.model.backbone == "lcm") != self.objective.type.startswith("consistency"):
            raise ValueError(
                f"model.backbone={self.model.backbone} does not go with "
                f"objective.type={self.objective.type}: lcm is trained with consistency_dpo or "
                "consistency_sft, the others with diffusion_dpo or sft"
            )
        model = self.model
        if model.backbone == "lcm" and not (model.teacher or model.unet or model.lcm_lora):
            raise ValueError(
                "model.teacher is not given: training needs the diffusion model that "
                f"model.path={model.path} was distilled from; if that is the diffusion model "
                "itself, make an LCM of it with model.unet or model.lcm_lora"
            )
        check_source(
            self.prepare.source,
            self.curriculum.difficulty,
            self.curriculum.tiers,
            self.prompts.train,
            self.prompts.heldout,
        )
        check_reward(self.reward, self.prepare.source)
        check_exports(self.adapter, self.export)
        pacing = self.curriculum
        stages = 1 if pacing.order == "random" else pacing.tiers
        check_growth(self.adapter, stages, self.train.optimizer.weight_decay)
        own = not self.compare.runs
        if own and self.compare.weights == "ema" and self.adapter.ema is None:
            raise ValueError("compare.weights=ema needs an average: set adapter.ema, e.g. 0.999")
        return self
