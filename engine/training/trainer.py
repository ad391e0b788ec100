"""The trainer: one for all backbones and objectives; a recipe only chooses among them.

One optimiser step reads the next pairs of every lane, corrupts winner and loser alike, asks the
reference and the policy what they predict, and lets DeepSpeed take the step. Where the run stands
is a cursor of integers (steps taken, batches skipped); everything else is a function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import torch
from torch import nn

from ..basics import keyed
from ..basics.errors import CdpoError, NumericsError, StopRequested
from ..basics.failpoints import failpoint
from ..basics.keyed import Stream
from ..basics.phases import phase
from ..curriculum.pacing import Cursor, Pacing, Stage
from ..display.terminal import Terminal
from ..models import Backbone, load_backbone
from ..models.compilation import compilation_told
from ..models.few_steps import check_guidance, describe_few_steps
from ..models.quantization import describe_quantized
from ..models.tuning import order_weights, rounding, uncompiled
from ..objectives import Loss, build_objective
from ..ranks import Ranks
from ..ranks.launch import bound_waits
from ..recipe import Recipe
from ..recipe.identity import save_resolved
from ..shards.batch import PairBatch
from ..shards.manifest import Manifest, manifest_hash
from ..shards.remote.store import open_store
from ..shards.store import ShardStore
from ..shards.stream import PairStream, WaitInterrupted
from .batch import (
    BatchMaker,
    describe_beta,
    describe_moving,
    describe_pairs,
    describe_stages,
    open_stored_prompts,
    open_stream,
    ranked_candidates,
    refuse_foreign_shards,
    trained_parts,
)
from .checkpoint.partitions import read_partitions, write_partitions
from .checkpoint.store import CheckpointStore
from .cuda_graph import CapturedLoss, hindrance
from .deepspeed_config import build_deepspeed_config, plan_batches, refuse_missing_trackers
from .deepspeed_engine import keep_settings, release, start_engine
from .evaluation import Evaluation
from .exports import Exports
from .finite import advice
from .frozen.cache import FrozenCache
from .frozen.place import close_cache, make_place, open_cache
from .growth import Growth
from .log import RunLog
from .micro_batch import settle_micro_batch
from .moving import Moving
from .networks import build_networks, started_parts
from .samples import TrainingSamples
from .starts import Starts

# Skipped steps in which dynamic loss scaling finds its scale from 2**16: no fault of the data.
SCALE_SEARCH = 16


class Trainer:
    """A run from its newest checkpoint, or from the start, to its last step."""

    # what is trained
    recipe: Recipe
    backbone: Backbone
    engine: deepspeed.DeepSpeedEngine
    pacing: Pacing
    growth: Growth
    moving: Moving
    captured: CapturedLoss | None
    # on what, while there are steps to take
    shards: ShardStore | None
    manifest: Manifest
    candidates: int | None
    stream: PairStream
    batch_maker: BatchMaker
    cache: FrozenCache | None
    # where the run stands
    cursor: Cursor
    came_from: Cursor
    skipped_in_a_row: int
    # what it leaves behind
    checkpoints: CheckpointStore
    starts: Starts
    log: RunLog
    samples: TrainingSamples
    evaluation: Evaluation
    exports: Exports

    def __init__(
        self,
        ranks: Ranks,
        recipe: Recipe,
        terminal: Terminal,
        allow_change: Sequence[str] = (),
    ) -> None:
        """In the keys of ``allow_change`` the recipe may differ from the checkpoint's."""
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.run_dir = Path(recipe.run_dir)
        refuse_missing_trackers(build_deepspeed_config(recipe, ranks.world_size, self.run_dir))

        self.pacing = Pacing(recipe.curriculum, recipe.train.steps)
        self.cursor = self.came_from = Cursor.start(self.pacing)
        self.skipped_in_a_row = 0
        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints", ranks, recipe, keep=recipe.checkpoint.keep
        )
        self.checkpoints.allowed = tuple(allow_change)
        self.starts = Starts(ranks, recipe)
        self.starts.refuse_if_stuck()
        self.shards = self.cache = None
        has_steps_left = self.checkpoints.newest_step() < recipe.train.steps
        if has_steps_left:  # absent shards are found early
            self._open_shards()
        started = started_parts(recipe.adapter)
        prompts = open_stored_prompts(recipe, ranks)

        recipe, self.note = settle_micro_batch(
            recipe, ranks, self.checkpoints.last_batches(), trains=has_steps_left
        )
        self.recipe = self.checkpoints.recipe = recipe
        self.batches = plan_batches(recipe, ranks.world_size)
        config = build_deepspeed_config(recipe, ranks.world_size, self.run_dir)

        failpoint("train.start")
        check_guidance(recipe)
        precision = recipe.train.precision
        self.backbone = load_backbone(recipe.model, ranks.device, precision, prompts)
        self.backbone.fingerprints()  # as it was loaded: a policy is made of it next
        if has_steps_left:
            self._match_shards()
        objective = build_objective(recipe.objective)
        networks = build_networks(recipe, self.backbone, objective)
        self.checkpoints.speed = str(networks.tuning)
        self.engine = start_engine(
            networks, config, recipe.train.optimizer, ranks.device, ema=recipe.adapter.ema
        )
        parts = trained_parts(self.backbone)
        self.checkpoints.parts = parts | started
        self.growth = Growth(networks.policy, recipe.adapter, self.pacing, ranks.device)
        self.moving = Moving(
            recipe.objective,
            networks.policy,
            networks.reference,
            ranks.device,
            ranks.world_size,
        )
        bound_waits(recipe.cluster.timeout_minutes)
        order_weights(networks.tuning, networks.policy, *networks.frozen)
        self.captured, self.hindrance = None, None
        if recipe.speed.cuda_graph == "auto":
            self.hindrance = hindrance(recipe, ranks.device, config["zero_optimization"])
            if self.hindrance is None:
                self.captured = CapturedLoss(networks, networks.loss, terminal)
                networks.captured = self.captured
        if has_steps_left:
            self._open_cache()

        self.log = RunLog(
            self.run_dir,
            window=recipe.train.log_every,
            global_batch=recipe.train.global_batch,
            num_timesteps=self.backbone.noise.num_timesteps,
            world_size=ranks.world_size,
            device=ranks.device,
            terminal=terminal,
            guarded=recipe.objective.loser_safeguard is not None,
            write_events=self.engine.monitor.write_events if self.engine.monitor.enabled else None,
        )
        self.samples = TrainingSamples(recipe, self.backbone, ranks)
        self.evaluation = Evaluation(recipe, self.backbone, networks.base, ranks, terminal)
        self.exports = Exports(recipe, self.backbone, self.engine, networks.policy, ranks, parts)

    def _open_shards(self) -> None:
        """Find all shards, and start to read the pairs of this rank.

        A finished run has no use for them: it may be exported anew where they are gone.
        """
        recipe, ranks = self.recipe, self.ranks
        self.shards = open_store(recipe.shards_at, recipe.data, ranks.local_size)
        self.manifest = ranks.on_first(self.shards.manifest)
        self.candidates = ranked_candidates(recipe, self.manifest)
        self.checkpoints.data_hash = manifest_hash(self.manifest)
        self.stream = open_stream(recipe, ranks, self.shards, self.manifest, self.pacing)
        if recipe.speed.frozen_cache:
            ranks.on_first(lambda: make_place(recipe))

    def _match_shards(self) -> None:
        """Make batches of the shards, which must be of the model that is loaded."""
        recipe, manifest = self.recipe, self.manifest
        refuse_foreign_shards(recipe, manifest, self.backbone)
        self.batch_maker = BatchMaker(
            recipe,
            self.backbone,
            manifest.resolution,
            self.ranks.device,
            manifest.kind,
            self.candidates,
        )

    def _open_cache(self) -> None:
        """Read what is kept of the frozen passes, if the recipe wants it, now that all parts that
        decide them are known.
        """
        if self.recipe.speed.frozen_cache:
            tuning, manifest = self.engine.module.tuning, self.manifest
            self.cache = open_cache(self.recipe, self.backbone, tuning, manifest, self.ranks)
            self.batch_maker.cache = self.cache

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        recipe, spec = self.recipe, self.recipe.train
        trainable = sum(
            getattr(p, "ds_numel", p.numel())
            for p in self.engine.module.policy.parameters()
            if p.requires_grad
        )
        rows = [
            (
                "train",
                f"{spec.steps} steps x {spec.global_batch} pairs, {trainable:,} parameters, "
                f"{spec.precision}, ZeRO-{self.engine.zero_optimization_stage()}, "
                f"{self.ranks.world_size} x {self.ranks.device.type}",
            ),
            (
                "forward",
                f"{self.batches.micro_batch} pairs on each rank, {self.batches.accumulation} a "
                "step",
            ),
            *describe_quantized(self.backbone.quantized),
            ("speed", str(self.engine.module.tuning)),
            *self._describe_capture(),
            *self._describe_rounding(),
            *self.evaluation.describe(),
            *self.exports.describe(),
            *describe_few_steps(
                recipe, self.backbone.denoiser.config, self.backbone.pipeline.config
            ),
        ]
        if self.shards is not None:
            rows += describe_pairs(recipe, self.manifest, self.pacing)
            rows += describe_beta(recipe, self.backbone.latent_shape(self.manifest.resolution))
        if self.cache is not None:
            found = f"{len(self.cache)} draws of pairs are kept in {self.cache.folder}"
            rows.append(("cache", f"{found}, {self.cache.draws} a pair are used"))
        return [
            *rows,
            *describe_moving(recipe.objective),
            *describe_stages(self.pacing),
            *self.growth.describe(),
        ]

    def _describe_capture(self) -> list[tuple[str, str]]:
        if self.recipe.speed.cuda_graph == "off":
            return []
        graphs = "the networks of a micro-batch, and the gradients, are captured and replayed"
        return [("graph", f"none: {self.hindrance}" if self.captured is None else graphs)]

    def _describe_rounding(self) -> list[tuple[str, str]]:
        if self.recipe.speed.rounding == "fixed":
            return []
        free = "free: convolutions are timed at each start, products of float32 are TF32"
        on_gpu = self.ranks.device.type == "cuda"
        return [("rounding", free if on_gpu else "as ever: there is no CUDA device")]

    # The run

    def resume(self) -> bool:
        """Go to the newest checkpoint, if there is one; whether there was."""
        cursor = self.checkpoints.load_newest(self._read_checkpoint)
        if self.shards is None and (cursor is None or cursor.step < self.recipe.train.steps):
            # The last checkpoint is damaged: there are steps to take again.
            self._open_shards()
            self._match_shards()
            self._open_cache()
            cursor = self.checkpoints.load_newest(self._read_checkpoint)
        for problem in self.checkpoints.passed_over:
            self.terminal.warn(f"checkpoint {problem}; it is passed over")
        self._tell_changes()
        if self.note is not None:
            self.terminal.line(self.note)
        if cursor is not None:
            self.cursor = self.came_from = cursor
        self.evaluation.start_after(self.cursor.step)
        return cursor is not None

    def _tell_changes(self) -> None:
        """What has changed in the middle of the run, and what was allowed to and has not."""
        for change in self.checkpoints.changes:
            self.terminal.line(f"changed {change}")
        changed = {change.key for change in self.checkpoints.changed}
        for key in self.checkpoints.allowed:
            if key not in changed:
                self.terminal.warn(f"--allow-change {key}: it is as it was, nothing is changed")

    def _read_checkpoint(self, folder: Path, saved_ranks: int) -> None:
        note = read_partitions(self.engine, self.ranks, folder, saved_ranks)
        self.moving.read(folder)
        keep_settings(self.engine, self.recipe.train.optimizer, self.recipe.train.gradient_clip)
        if note is not None:
            self.terminal.line(note)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end and the result is exported."""
        if not self._is_at_end:
            return False
        # Evaluations of the end may count no more, as they were made of other prompts or scorers.
        if self.evaluation.is_due(self.cursor.step):
            return False
        # The run may have been extended and killed before its last export.
        return self.exports.is_published(self.checkpoints.folder_of(self._exported_step))

    @property
    def _is_at_end(self) -> bool:
        """Whether every step is taken, or evaluation has ended the run."""
        return self.cursor.step >= self.recipe.train.steps or self.evaluation.is_over

    @property
    def _exported_step(self) -> int:
        """Whose weights are exported: those of the last step, or of the best."""
        of_best = self.recipe.export.of == "best" or self.evaluation.is_over
        return self.evaluation.best if of_best and self.evaluation.rows else self.cursor.step

    def run(self, after_step: Callable[[], object] = lambda: None) -> None:
        """Train to the last step; NumericsError and StopRequested end it early, checkpoint made.

        ``after_step`` is called when a step is taken and logged, before its checkpoint.
        """
        told = compilation_told(self.engine.module.tuning.pieces, self.terminal.line)
        with self.starts.watched(self.cursor.step), told:
            self._run(after_step)

    def close(self) -> None:
        """Give back the memory of the networks; nothing can be done with the run any more."""
        release(self.engine)

    def _run(self, after_step: Callable[[], object]) -> None:
        self.log.start_after(self.cursor.step)
        if self.ranks.is_first:
            save_resolved(self.recipe, self.run_dir / "recipe.yaml", self.checkpoints.changes)
            self.samples.start_after(self.cursor.step)
        self._keep_best()
        steps = self.recipe.train.steps
        label = "train" if self.cursor.step == 0 else "train (resumed)"
        progress = self.terminal.progress(label, steps, self.cursor.step, "steps")
        with progress as self.progress:
            while not self._is_at_end:
                self._sample_if_due()
                if self._evaluate_if_due():
                    continue  # it may have been the end
                pairs = self._next_pairs()
                if self._take_step(pairs):
                    after_step()
                    self._checkpoint_if_due()
            self._sample_if_due()
            self._evaluate_if_due()
        if self.ranks.asked_to_stop():
            self._stop()
        if self.cursor == self.came_from and self.cursor.step:
            self._save()  # the save of the last step may have been cut short when it was committed
        self._close_cache()
        self.starts.reached("the exports")
        self._export()
        if self.shards is not None:
            self.stream.close()

    def _close_cache(self) -> None:
        """Write down what the frozen networks have said last; what the cache was good for."""
        if self.cache is None:
            return
        served, asked, _, damaged = close_cache(self.cache, self.ranks, self.terminal)
        if asked:
            self.terminal.line(
                f"frozen passes: {served} of {asked} pairs were served from the cache "
                f"({served / asked:.1%}), {asked - served} asked for and kept; {damaged} damaged"
            )

    def _stop(self) -> None:
        if self.cursor != self.came_from:
            self._save()
        raise StopRequested(
            f"stopped on request after step {self.cursor.step}; the same command goes on from "
            "there",
            kind="stopped",
        )

    def _next_pairs(self) -> PairBatch:
        """The pairs of the next step; all ranks learn here that one cannot go on, or is to stop."""
        failure: CdpoError | None = None
        stop = False
        try:
            with phase("data"):
                step, skips = self.cursor.step, self.cursor.skips
                pairs = self.stream.next(step, skips, self.ranks.hear_of_stop)
        except CdpoError as error:
            failure = error
        except WaitInterrupted:  # without pairs, but in time for the others, who wait below
            stop = True
        stop = stop or self.ranks.stop.requested
        failed, stopping = self.ranks.any_is(failure is not None, stop)
        if failed:
            # The launcher ends the other ranks when the first has left: all must know the reason.
            self.ranks.agree(failure)
        if stopping:
            self._stop()
        return pairs

    def _take_step(self, pairs: PairBatch) -> bool:
        """One optimiser step; whether it was taken (all ranks skip together)."""
        stage = self.pacing.stage_at(self.cursor.step)
        self.growth.enter(stage)
        lr = self._set_learning_rate()
        self.starts.reached(f"step {self.cursor.step + 1}")
        failpoint("train.step")
        with rounding(self.engine.module.tuning):
            for index, part in enumerate(pairs.split(self.batches.micro_batch)):
                self._seed_dropout(index)
                self._forward_backward(part)
        if self.engine.optimizer.overflow:
            self._skip()
            return False
        self._finish_step(stage, lr)
        return True

    def _forward_backward(self, pairs: PairBatch) -> None:
        batch = self.moving.weighted(self.batch_maker.make(pairs))
        loss: Loss = self.engine(batch)
        with phase("backward"):
            if failpoint("train.loss") == "nan":
                loss.loss.data.fill_(float("nan"))
                self.engine.backward(loss.loss * float("nan"))
            else:
                self.engine.backward(loss.loss)
        with phase("log"):
            self.moving.add(loss)
            self.log.add(loss, batch.draw.timesteps)
        # At the last micro-batch of a step this reduces, clips and updates; or, where the norm of
        # the gradient is not finite on any rank, drops the gradients on all of them.
        with phase("optimizer"):
            self.engine.step()

    def _seed_dropout(self, micro_batch: int) -> None:
        """Adapter dropout draws from torch's own generator: make it a function of the step."""
        if self.recipe.adapter.dropout:
            batch = self.cursor.step + sum(self.cursor.skips)
            item = (batch << 16 | self.ranks.rank) << 16 | micro_batch
            keys = keyed.make_keys(self.recipe.seed, Stream.ADAPTER_DROPOUT, [item])
            torch.manual_seed(int(keyed.integers(keys, 2**31)))

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
            **self.growth.row,
            "lr": lr,
            "skipped": sum(self.cursor.skips),
        }
        moved = self.moving.step()
        if self.cache is not None:
            host["cached"] = self.cache.served_since()
        if self.captured is not None:
            host["captures"] = self.captured.captures
        with phase("log"):
            self.log.close_step(host, self.engine.get_global_grad_norm(), moved)
        shown: dict[str, float | str] = {
            "stage": f"{stage.index + 1}/{len(self.pacing.stages)}",
            **{name: str(count) for name, count in self.growth.row.items()},
            **self.log.latest,
            **self.evaluation.shown,
        }
        self.progress.advance(1, **shown)

    def _skip(self) -> None:
        """Count a non-finite step; it advances neither schedule nor curriculum."""
        self.log.discard_step()
        self.moving.skip()
        if self.cache is not None:
            self.cache.served_since()
        self.cursor = self.cursor.skipped(self.pacing)
        self.skipped_in_a_row += 1
        searching = SCALE_SEARCH if self.recipe.train.precision == "fp16" else 0
        if self.skipped_in_a_row > searching:
            self.terminal.warn(
                f"step {self.cursor.step + 1}: loss or gradients not finite; batch skipped on all "
                "ranks"
            )
        if self.skipped_in_a_row >= self.recipe.train.max_skipped + searching:
            self._save()
            self.starts.reached(f"step {self.cursor.step + 1}")
            raise NumericsError(
                f"{self.skipped_in_a_row} batches in a row gave non-finite loss or gradients after "
                f"step {self.cursor.step}, whose state is saved: {advice(self.recipe)}; or give "
                "another run_dir and a wider train.precision",
                f"step {self.cursor.step + 1}",
                "non-finite",
            )

    # What the run leaves behind

    def _sample_if_due(self) -> None:
        if self.samples.is_due(self.cursor.step):
            self.starts.reached(f"the picture of step {self.cursor.step}")
            with self._drawing() as policy:
                try:
                    self.samples.draw(policy, self.cursor.step)
                except NumericsError as error:  # a missing picture is no reason to stop training
                    self.terminal.warn(f"no sample picture of step {self.cursor.step}: {error}")

    def _evaluate_if_due(self) -> bool:
        """Whether there was an evaluation; the best so far, and the last, get a checkpoint."""
        step, evaluation = self.cursor.step, self.evaluation
        if not evaluation.is_due(step):
            return False
        self.starts.reached(f"the evaluation of step {step}")
        with self._drawing() as policy:
            try:
                row = evaluation.run(policy, step)
            except NumericsError as error:
                self.terminal.warn(f"no evaluation of step {step}: {error}")
                return False
        if row is None:  # asked to stop: where pairs are fetched all ranks do
            return False
        self.log.tell_evaluation(row)
        self._keep_best()
        if evaluation.chooses_weights and (step == evaluation.best or evaluation.is_over):
            self._save()
        if evaluation.is_over:
            self.terminal.line(
                f"the score on validation prompts has fallen for {evaluation.spec.stop} "
                f"evaluations since step {evaluation.best}: the run ends, and that step is exported"
            )
        return True

    def _keep_best(self) -> None:
        if self.evaluation.chooses_weights and self.evaluation.rows:
            self.checkpoints.best = self.evaluation.best

    @contextmanager
    def _drawing(self) -> Iterator[nn.Module]:
        """The policy as it draws images; what that takes is no time of training."""
        policy = self.engine.module.policy
        policy.eval()
        # All networks: an evaluation draws with the reference, too.
        with self.log.clock_stopped(), uncompiled(self.engine.module):
            yield policy
        policy.train()

    def _export(self) -> None:
        step = self._exported_step
        chosen_by = self.evaluation.chooses if self.evaluation.chooses_weights else None
        folder = self.checkpoints.folder_of(step)
        if step != self.cursor.step:
            self.checkpoints.load(step, self._read_checkpoint)
        self.exports.publish(folder, chosen_by)

    def _checkpoint_if_due(self) -> None:
        step = self.cursor.step
        if step == self.recipe.train.steps or step % self.recipe.checkpoint.every == 0:
            self._save()

    def _save(self) -> None:
        self.log.flush()  # so that metrics.jsonl always reaches the newest checkpoint
        self.starts.reached(f"the checkpoint of step {self.cursor.step}")
        with self.log.clock_stopped():
            if self.cache is not None:
                self.ranks.together(self.cache.write)
            self.checkpoints.save(
                self.cursor, self._write_checkpoint, after_skips=self.skipped_in_a_row > 0
            )
        self.starts.committed(self.cursor.step)

    def _write_checkpoint(self, folder: Path) -> None:
        """Both parts on every rank, whatever fails: each of them meets the other ranks."""
        errors: list[OSError | RuntimeError] = []
        partitions = partial(write_partitions, self.engine, rank=self.ranks.rank)
        for write in (partitions, self.exports.write_adapters, self._write_moving):
            try:
                write(folder)
            except (OSError, RuntimeError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _write_moving(self, folder: Path) -> None:
        if self.ranks.is_first:
            self.moving.write(folder)
