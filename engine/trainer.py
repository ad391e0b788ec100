"""The trainer: one for all backbones and objectives; a recipe only chooses among them.

One optimiser step reads the next pairs of every lane, corrupts winner and loser alike, asks the
reference and the policy what they predict, and lets DeepSpeed take the step. Where the run stands
is a cursor of integers (steps taken, batches skipped); everything else is a function of it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ..kernels import use as use_kernels
from . import keyed
from .adapters import LORA_FILE, add_lora, export_lora, twin_of
from .backbones import Backbone, load_backbone
from .checkpoint import CheckpointStore
from .curriculum.pacing import Cursor, Pacing, Stage
from .deepspeed_config import build_deepspeed_config, plan_batches
from .errors import DataError, NumericsError, StopRequested
from .failpoints import failpoint
from .keyed import Stream
from .launch import Ranks, StopSignal
from .objectives import Loss, Objective, TrainingBatch, build_objective
from .recipe import Recipe
from .recipe_file import save_resolved
from .reporting.console import Terminal
from .run_log import RunLog
from .shards.batch import PairBatch
from .shards.lanes import LanePlan
from .shards.manifest import Manifest, load_manifest, manifest_hash
from .shards.reader import ShardReaders
from .shards.stream import PairStream
from .training_samples import TrainingSamples
from .zero_checkpoint import read_partitions, write_partitions


class PolicyAndReference(nn.Module):
    """Both networks as children of the one module DeepSpeed gets, so ZeRO-3 gathers for both."""

    def __init__(
        self, policy: nn.Module, reference: nn.Module, backbone: Backbone, objective: Objective
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self._predict = backbone.predict
        self._objective = objective

    def forward(self, batch: TrainingBatch) -> Loss:
        return self._objective(
            partial(self._predict, self.policy), partial(self._predict, self.reference), batch
        )


class Trainer:
    """A run from its newest checkpoint, or from the start, to its last step."""

    # what is trained, and on what
    recipe: Recipe
    manifest: Manifest
    backbone: Backbone
    engine: deepspeed.DeepSpeedEngine
    stream: PairStream
    pacing: Pacing
    # where the run stands
    cursor: Cursor
    skipped_in_a_row: int
    # what it leaves behind
    checkpoints: CheckpointStore
    log: RunLog
    samples: TrainingSamples

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.run_dir = Path(recipe.run_dir)
        shards_dir = Path(recipe.data.path) if recipe.data.path else self.run_dir / "shards"
        self.batches = plan_batches(recipe, ranks.world_size)
        config = build_deepspeed_config(recipe, ranks.world_size, self.run_dir)
        use_kernels(recipe.train.kernels)

        self.manifest = ranks.on_first(lambda: load_manifest(shards_dir))
        self.pacing = Pacing(recipe.curriculum, recipe.train.steps)
        self.cursor = Cursor.start(self.pacing)
        self.skipped_in_a_row = 0
        self.stream = self._open_stream(shards_dir)

        self.backbone = load_backbone(recipe.model, ranks.device, recipe.train.precision)
        self._refuse_foreign_shards()
        objective = build_objective(recipe.objective)
        reference = twin_of(self.backbone.denoiser)
        policy = add_lora(self.backbone.denoiser, recipe.adapter, recipe.seed)
        module = PolicyAndReference(policy.train(), reference.eval(), self.backbone, objective)
        self.engine = self._initialise(module, config)

        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints",
            ranks,
            recipe,
            data_hash=manifest_hash(self.manifest),
            keep=recipe.checkpoint.keep,
        )
        self.log = RunLog(
            self.run_dir,
            window=recipe.train.log_every,
            global_batch=recipe.train.global_batch,
            num_timesteps=self.backbone.noise.num_timesteps,
            world_size=ranks.world_size,
            device=ranks.device,
            terminal=terminal,
            write_events=self.engine.monitor.write_events if self.engine.monitor.enabled else None,
        )
        self.samples = TrainingSamples(recipe, self.backbone, ranks)

    def _open_stream(self, shards_dir: Path) -> PairStream:
        """The pairs of this rank; absent shards are found here, before a model is loaded."""
        plan = LanePlan(
            self.manifest,
            seed=self.recipe.seed,
            world_size=self.ranks.world_size,
            rank=self.ranks.rank,
            global_batch=self.recipe.train.global_batch,
            shuffle_shards=self.recipe.data.shuffle_shards,
        )
        readers = ShardReaders(shards_dir, self.manifest)
        stream = PairStream(plan, readers, self.pacing, workers=self.recipe.data.workers)
        stream.check_present()
        return stream

    def _refuse_foreign_shards(self) -> None:
        own = self.backbone.fingerprints()["vae"]
        made_with = self.manifest.vae
        if made_with.fingerprint != own:
            raise DataError(
                f"the shards were made with another VAE ({made_with.path}, "
                f"{made_with.fingerprint[:12]}) than the model's own ({own[:12]}): run prepare "
                "again with this model, or name that VAE as model.vae"
            )

    def _initialise(self, module: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
        spec = self.recipe.train.optimizer
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=self.ranks.device.type == "cuda",
        )
        _skip_shared_memory_build(self.ranks.device)
        _fit_bucket(config, sum(p.numel() for p in module.parameters() if p.requires_grad))
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        return engine

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        recipe, spec = self.recipe, self.recipe.train
        trainable = sum(
            getattr(p, "ds_numel", p.numel())
            for p in self.engine.module.policy.parameters()
            if p.requires_grad
        )
        stages = f"{len(self.pacing.stages)} stages, {recipe.curriculum.order}"
        rows = [
            (
                "train",
                f"{spec.steps} steps x {spec.global_batch} pairs, {trainable:,} parameters, "
                f"{spec.precision}, ZeRO-{self.engine.zero_optimization_stage()}, "
                f"{self.ranks.world_size} x {self.ranks.device.type}",
            ),
            ("pairs", f"{self.manifest.num_pairs} in {self.manifest.tiers} tiers; {stages}"),
        ]
        if self.pacing.unreached:
            never = ", ".join(str(stage.index + 1) for stage in self.pacing.unreached)
            rows.append(("note", f"stages {never} never open: train.steps ends before them"))
        return rows

    # The run

    def resume(self) -> bool:
        """Go to the newest checkpoint, if there is one; whether there was."""
        cursor = self.checkpoints.load_newest(partial(read_partitions, self.engine))
        if cursor is not None:
            self.cursor = cursor
        return cursor is not None

    @property
    def is_finished(self) -> bool:
        """Whether every step is taken and the adapter is exported."""
        exported = self.ranks.from_first((self.run_dir / "lora" / LORA_FILE).exists())
        return exported and self.cursor.step >= self.recipe.train.steps

    def run(self) -> None:
        """Train to the last step; NumericsError and StopRequested end it early, checkpoint made."""
        if self.ranks.is_first:
            save_resolved(self.recipe, self.run_dir / "recipe.yaml")
            self.log.start_after(self.cursor.step)
        steps = self.recipe.train.steps
        label = "train" if self.cursor.step == 0 else "train (resumed)"
        progress = self.terminal.progress(label, steps, self.cursor.step, "steps")
        with StopSignal() as stop, progress as self.progress:
            while self.cursor.step < steps:
                self._sample_if_due()
                self._take_step()
                self._checkpoint_if_due()
                if self._any_rank(stop.requested):
                    self._stop()
        self._sample_if_due()
        self._export(self.run_dir / "lora")
        self.stream.close()

    def _stop(self) -> None:
        self._save()
        raise StopRequested(
            f"stopped on request after step {self.cursor.step}; the same command goes on from there"
        )

    def _take_step(self) -> None:
        stage = self.pacing.stage_at(self.cursor.step)
        lr = self._set_learning_rate()
        failpoint("train.step")
        pairs = self.stream.next(self.cursor.step, self.cursor.skips)
        for part in pairs.split(self.batches.micro_batch):
            self._forward_backward(part)
        if self.engine.optimizer.overflow:
            self._skip()
        else:
            self._finish_step(stage, lr)

    def _forward_backward(self, pairs: PairBatch) -> None:
        batch = self._corrupt(pairs)
        loss: Loss = self.engine(batch)
        if failpoint("train.loss") == "nan":
            loss.loss.data.fill_(float("nan"))
            self.engine.backward(loss.loss * float("nan"))
        else:
            self.engine.backward(loss.loss)
        self.log.add(loss, batch.draw.timesteps)
        # At the last micro-batch of a step this reduces, clips and updates; or, where the norm of
        # the gradient is not finite on any rank, drops the gradients on all of them.
        self.engine.step()

    def _corrupt(self, pairs: PairBatch) -> TrainingBatch:
        """Noise, target and conditioning of a micro-batch, the same for winner and loser."""
        device, seed = self.ranks.device, self.recipe.seed
        pair_ids, visits = pairs.pair_ids.to(device), pairs.visits.to(device)
        latents = pairs.latents.to(device, torch.float32)
        noise = self.backbone.noise
        draw = noise.draw(seed, pair_ids, visits, latents.shape[1:])
        dropout_keys = keyed.make_keys(seed, Stream.CAPTION_DROPOUT, pairs.pair_ids, pairs.visits)
        dropped = (keyed.uniform(dropout_keys) < self.recipe.train.caption_dropout).tolist()
        prompts = ["" if drop else p for p, drop in zip(pairs.prompts, dropped, strict=True)]
        return TrainingBatch(
            noisy=noise.corrupt(latents, draw),
            target=noise.target(latents, draw),
            draw=draw,
            conditioning=self.backbone.encode_prompts(prompts).for_pairs(),
        )

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant; a function of the step, so a resume needs no scheduler."""
        spec = self.recipe.train
        warm = min(1.0, (self.cursor.step + 1) / max(1, spec.warmup_steps))
        lr = spec.optimizer.lr * warm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _finish_step(self, stage: Stage, lr: float) -> None:
        self.cursor = self.cursor.advanced()
        self.skipped_in_a_row = 0
        host = {
            "step": self.cursor.step,
            "stage": stage.index + 1,
            "tiers": list(stage.tiers),
            "lr": lr,
            "skipped": sum(self.cursor.skips),
        }
        self.log.close_step(host, self.engine.get_global_grad_norm())
        shown: dict[str, float | str] = {
            "stage": f"{stage.index + 1}/{len(self.pacing.stages)}",
            **self.log.latest,
        }
        self.progress.advance(1, **shown)

    def _skip(self) -> None:
        """Count a non-finite step; it advances neither schedule nor curriculum."""
        self.log.discard_step()
        self.cursor = self.cursor.skipped(self.pacing)
        if self.recipe.train.precision == "fp16" and self.engine.optimizer.loss_scale > 1:
            return  # how dynamic loss scaling finds its scale, not a fault of the data
        self.skipped_in_a_row += 1
        self.terminal.warn(
            f"step {self.cursor.step + 1}: loss or gradients not finite; batch skipped on all ranks"
        )
        if self.skipped_in_a_row >= self.recipe.train.max_skipped:
            self._save()
            raise NumericsError(
                f"{self.skipped_in_a_row} batches in a row gave non-finite loss or gradients after "
                f"step {self.cursor.step}, whose state is saved: lower train.optimizer.lr or "
                "objective.beta, or train in a wider precision"
            )

    # What the run leaves behind

    def _sample_if_due(self) -> None:
        if self.samples.is_due(self.cursor.step):
            policy = self.engine.module.policy
            policy.eval()
            self.samples.draw(policy, self.cursor.step)
            policy.train()

    def _checkpoint_if_due(self) -> None:
        step = self.cursor.step
        if step == self.recipe.train.steps or step % self.recipe.checkpoint.every == 0:
            self._save()

    def _save(self) -> None:
        self.log.flush()  # so that metrics.jsonl always reaches the newest checkpoint
        self.checkpoints.save(self.cursor, self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> None:
        """Both parts on every rank, whatever fails: each of them meets the other ranks."""
        errors: list[OSError | RuntimeError] = []
        for write in (partial(write_partitions, self.engine), self._export_into):
            try:
                write(folder)
            except (OSError, RuntimeError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _export_into(self, folder: Path) -> None:
        self._export(folder / "lora")

    def _export(self, folder: Path) -> None:
        export_lora(self.engine.module.policy, folder, write=self.ranks.is_first)

    def _any_rank(self, flag: bool) -> bool:
        if self.ranks.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32, device=self.ranks.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())


def _fit_bucket(config: dict[str, Any], trainable: int) -> None:
    """Cap ZeRO's reduction bucket at the gradients there are.

    It is allocated whole, and its default of 5e8 elements is more memory than all the training
    state of most adapters.
    """
    zero = config.setdefault("zero_optimization", {})
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", 5e8)), max(trainable, 1))


def _skip_shared_memory_build(device: torch.device) -> None:
    """Keep DeepSpeed from compiling its shared-memory helper for CPU ranks at first launch.

    It takes a C++ compiler and a minute, hangs on the lock of a build that was killed, and speeds
    up only large all-reduces among many ranks of one machine.
    """
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
