"""The schema of a recipe: one YAML file is one run, and every knob is declared here.

A recipe only *chooses*; what the choices do lives in the modules that take them. Fields without a
default must be given. Unknown keys are errors (see :mod:`.reading`, which reads the file, applies
``dotted.key=value`` overrides and words the errors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from .adapter import Adapter, Export, check_exports, check_growth, check_start
from .compare import Compare
from .data import Curriculum, Data
from .evaluate import Evaluate
from .model import Model
from .prepare import Prepare, check_source
from .prompts import Prompts
from .reward import Reward, check_reward
from .rounds import Rounds
from .section import Sampler, Section
from .train import Checkpoint, Cluster, Monitor, Objective, Speed, Train


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
    deepspeed: str = "zero2"
    """A plain DeepSpeed JSON file; what the recipe decides is filled in. One that is shipped by its
    name, such as `zero3_offload`; your own by its path, with a slash or `.json`."""
    checkpoint: Checkpoint = Checkpoint()
    """Snapshots."""
    evaluate: Evaluate = Evaluate()
    """Validation while training."""
    rounds: Rounds = Rounds()
    """New candidates from the tuned model."""
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

    @property
    def samplers(self) -> dict[str, Sampler]:
        """How images are drawn, by section: candidates, if any are, evaluations, comparisons."""
        samplers = {"compare": self.compare.sampler}
        if self.prepare.source.type in ("generate", "masked"):
            samplers = {"prepare": self.prepare.sampler, **samplers}
        if self.evaluate.sampler is not None:
            samplers["evaluate"] = self.evaluate.sampler
        return samplers

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
        if (self.model.backbone == "lcm") != self.objective.is_consistency:
            raise ValueError(
                f"model.backbone={self.model.backbone} does not go with "
                f"objective.type={self.objective.type}: lcm is trained with consistency_dpo or "
                "consistency_sft, the others with diffusion_dpo or sft"
            )
        model = self.model
        taught = self.objective.needs_teacher
        if taught and not (model.teacher or model.unet or model.lcm_lora):
            raise ValueError(
                f"model.teacher is not given: objective.target={self.objective.target} needs the "
                f"diffusion model that model.path={model.path} was distilled from; if that is the "
                "diffusion model itself, make an LCM of it with model.unet or model.lcm_lora"
            )
        check_source(
            self.prepare.source,
            self.curriculum.difficulty,
            self.curriculum.tiers,
            self.prompts.train,
            self.prompts.heldout,
        )
        check_reward(self.reward, self.prepare.source)
        self._check_objective()
        check_exports(self.adapter, self.export, has_kohya=self.model.family.kohya)
        check_start(self.adapter, self.objective.reference_ema)
        self._check_quantization()
        pacing = self.curriculum
        stages = 1 if pacing.order == "random" else pacing.tiers
        check_growth(self.adapter, stages, self.train.optimizer.weight_decay)
        self._check_frozen_cache()
        self._check_rounding()
        self._check_evaluation()
        own = not self.compare.runs
        if own and self.compare.weights == "ema" and self.adapter.ema is None:
            raise ValueError("compare.weights=ema needs an average: set adapter.ema, e.g. 0.999")
        return self

    def _check_objective(self) -> None:
        spec = self.objective
        of_time = f"objective.timestep_weighting={spec.timestep_weighting}"
        if self.model.is_flow and spec.timestep_weighting != "uniform":
            raise ValueError(
                f"{of_time} does not go with model.backbone={self.model.backbone}, whose noise has "
                "no fixed schedule: use objective.time_weight"
            )
        if not self.model.is_flow and spec.time_weight != "constant":
            raise ValueError(
                f"objective.time_weight={spec.time_weight} is for flow models, not "
                f"model.backbone={self.model.backbone}: use objective.timestep_weighting"
            )
        if spec.reference_ema and self.adapter.type == "full":
            raise ValueError(
                f"objective.reference_ema={spec.reference_ema:g} does not go with "
                "adapter.type=full: the average is one of adapters; use adapter.type=lora, or 0"
            )
        if spec.pair_weighting == "rank":
            source = self.prepare.source.type
            if source != "generate":
                raise ValueError(
                    f"objective.pair_weighting=rank does not go with prepare.source.type={source}, "
                    "whose pairs are not of one ranking of a prompt's candidates: use uniform"
                )

    def _check_quantization(self) -> None:
        if self.model.quantization is None:
            return
        given = f"model.quantization={self.model.quantization}"
        if self.adapter.type == "full":
            raise ValueError(
                f"{given} does not go with adapter.type=full, which trains the weights themselves: "
                "use adapter.type=lora, or leave quantization out"
            )
        if self.speed.compile != "off":
            raise ValueError(
                f"{given} does not go with speed.compile={self.speed.compile}, whose backward pass "
                "would keep the weights whole: use compile=off, or leave quantization out"
            )

    def _check_frozen_cache(self) -> None:
        if not self.speed.frozen_cache:
            return
        given = f"speed.frozen_cache={self.speed.frozen_cache}"
        if self.objective.type.endswith("sft"):
            raise ValueError(
                f"{given} has no effect with objective.type={self.objective.type}: it is for "
                "diffusion_dpo and consistency_dpo, which compare with a frozen reference"
            )
        if self.objective.reference_ema:
            raise ValueError(
                f"{given} does not go with objective.reference_ema: what a reference that moves "
                "says of a draw is never the same again; use frozen_cache=0"
            )

    def _check_rounding(self) -> None:
        """Where policy and reference would be rounded apart: a fresh policy must have no margin."""
        if self.speed.rounding == "fixed":
            return
        if self.speed.frozen_cache:
            raise ValueError(
                "speed.rounding=free does not go with "
                f"speed.frozen_cache={self.speed.frozen_cache}, which keeps what was rounded as at "
                "another start: use rounding=fixed, or frozen_cache=0"
            )
        # cuDNN's convolutions are chosen by the alignment of weights, too: DeepSpeed lays those
        # that train end to end, and those of a copy lie as they were loaded.
        if self.adapter.type == "full" and not self.objective.type.endswith("sft"):
            raise ValueError(
                "speed.rounding=free does not go with adapter.type=full, whose reference is a copy "
                "for which other convolutions may be the fastest: use rounding=fixed, or "
                "adapter.type=lora"
            )

    def _check_evaluation(self) -> None:
        if not self.evaluate.every:
            if self.evaluate.stop or self.export.of == "best":
                key = "evaluate.stop" if self.evaluate.stop else "export.of=best"
                raise ValueError(f"{key} needs evaluations: set evaluate.every, e.g. 100")
        elif self.prompts.validation is None:
            raise ValueError(
                f"evaluate.every={self.evaluate.every} needs prompts to evaluate on, apart from "
                "those that are trained on and those that compare reports: set "
                "prompts.validation, e.g. to {fraction: 0.1}"
            )
