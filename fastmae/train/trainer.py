"""The training loop. It reads top to bottom: set up, fit, one step, log, save, resume."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from fastmae.train.autotune import StepFit, divide_batch, loss_weights, measured_batch_size, with_length
from fastmae.train.bad_files import BadFiles
from fastmae.train.callbacks import Callback
from fastmae.train.checkpoint import Checkpoint, CheckpointManager, open_checkpoint, open_latest, state
from fastmae.train.checkpoint.format import MANIFEST, discard, reading, set_aside_after
from fastmae.train.config import PretrainConfig
from fastmae.train.guard import Guard, LossScale, SamplePositions, all_finite, remedies, step_unless_non_finite
from fastmae.train.liveness import Agreement, StopRequest, Watchdog
from fastmae.train.loggers import Row
from fastmae.train.metrics import Reporter
from fastmae.train.optim import create_optimizer, create_schedule, set_learning_rate
from fastmae.train.parallel import DTYPES, Parallelism, no_sync, parallelize
from fastmae.train.ranks import CheckpointError, LostRankError, Ranks
from fastmae.train.run_folder import RunFolder
from fastmae.train.step_graph import StepGraph
from fastmae.train.task import Task

Status = Literal["finished", "preempted"]


class Trainer:
    """Trains a task's model, and saves what it takes to continue exactly. Every process of a run makes a trainer.

    Args:
        config: a validated configuration, its precision settled.
        task: its model is on the device to train on, or where :func:`parallel.construct` made it.
        run: the run folder, locked.
        ranks: the processes of ``parallelism``, for what has to be agreed on and is not the device's.
        callbacks: the same on all ranks.
        stop: signals, while something else than :meth:`fit` watches for them; None for the time of :meth:`fit`.
        watchdog: of this rank, started by its owner; None for none.

    Raises:
        ValueError: if the warm-up is not shorter than the run, or there are more image sizes than epochs.
    """

    def __init__(
        self,
        config: PretrainConfig,
        task: Task,
        run: RunFolder,
        *,
        console: Console | None = None,
        parallelism: Parallelism | None = None,
        ranks: Ranks | None = None,
        callbacks: Sequence[Callback] = (),
        stop: StopRequest | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        train = config.train
        model, dataset = task.model, task.dataset
        self.parallelism = parallelism or Parallelism(device=next(model.parameters()).device)
        self.ranks = ranks or Ranks()
        self.config, self.task, self.model, self.dataset, self.run = config, task, model, dataset, run
        self.console = console or Console()
        self.device, self.dtype = self.parallelism.device, DTYPES[train.precision]
        # Compiled, sharded or replicated before anything holds on to a parameter: sharding replaces parameters.
        self.forward = parallelize(model, self.parallelism, train)
        if train.batch_size == "auto":
            batch, text = measured_batch_size(train, task, self.forward, self.ranks)
            self.console.print(text)
            train = replace(train, batch_size=batch)  # the checkpoint keeps the number
            self.config = config = replace(config, train=train)
        total, masks = train.global_batch_size, train.masks_per_image
        self.batch_size, self.accumulation = divide_batch(total, self.ranks.size, train.batch_size, masks)
        self.loss_weights = loss_weights(total, self.batch_size, self.ranks, masks)
        self.loss_scale = LossScale(self.device) if train.precision == "fp16" else None
        self.schedule = create_schedule(train, len(dataset))
        task.begin(self.schedule.total_steps)
        self.optimizer = create_optimizer(task.parameter_groups(), train)
        self.step_graph = StepGraph(self._update, self.parallelism) if train.cuda_graph else None
        self.step, self.learning_rate = 0, 0.0
        self.positions = SamplePositions(task.samples_per_step, dataset.order(train.seed))
        self.guard = Guard(train.rollback_after, self.positions)
        main = self.parallelism.is_main
        self.bad_files = BadFiles(run.path / "bad_files.jsonl", dataset, self.positions.step_of, writes=main)
        self.reporter = Reporter(
            config,
            run,
            self.console,
            self.parallelism,
            self.ranks,
            step_flops=lambda: task.flops(self.batch_size) * total // self.batch_size,
            passes=self.accumulation,
            check=self.guard.observe,
        )
        self.callbacks, self._stop = callbacks, stop
        self.stage: Any = self.reporter.stages  # entered around each stage of a step
        self.watchdog = watchdog or Watchdog()
        self.saves = CheckpointManager(
            run.checkpoints,
            self.ranks,
            keep=train.keep_checkpoints,
            keep_every=train.keep_every_steps,
            background=self.device.type == "cuda" if train.background_save is None else train.background_save,
        )
        self.saves.on_failed = self._note_failed_save
        # Whatever has state beside model and optimiser, by the name that checkpoints know it by.
        self.stateful: dict[str, Any] = {
            "metrics": self.reporter.values,
            "positions": self.positions,
            "guard": self.guard,
            "bad_files": self.bad_files,
        }
        if self.loss_scale:
            self.stateful["loss_scale"] = self.loss_scale
        for callback in callbacks:
            callback.attach(self)
            if callback.state_name:
                self.stateful[callback.state_name] = callback

    @property
    def samples(self) -> int:
        """Images consumed so far, including those that a rollback left out; what follows depends on it alone."""
        return self.positions.after(self.step)

    def fit(
        self, on_log: Callable[[Row], None] | None = None, on_checkpoint: Callable[[Path], None] | None = None
    ) -> Status:
        """Train to the end of the schedule, or until a signal or the time limit; save; return how it ended.

        ``on_log`` is called with each row of metrics, ``on_checkpoint`` with each checkpoint's folder, between two
        steps, once it is there.

        Raises:
            CheckpointError: if the first checkpoint cannot be written, the last, or three in a row.
            DataError: if the images cannot be read, or too many are bad.
            FloatingPointError: after many steps in a row without a finite gradient, if going back does not help.
        """
        train = self.config.train
        if on_checkpoint:
            self.saves.on_saved = on_checkpoint
        deadline = time.monotonic() + 60 * train.max_minutes if train.max_minutes else math.inf
        fit = StepFit(deadline)
        self.reporter.open(self.step, self.schedule.total_steps, deadline, on_log)
        with ExitStack() as stack:  # closed in reverse: the loader and a pending save before the rows' files
            stack.callback(self.task.end)
            stack.callback(self.reporter.close)
            stack.enter_context(self.run.failure_noted(lambda: self.step))
            stop = self._stop or stack.enter_context(StopRequest())
            self.loader = self.loader_at(self.samples)
            self.console.print(f"Images: {self.loader.describe()}")
            stack.callback(lambda: self.loader.close())
            stack.enter_context(self.saves)
            stack.enter_context(self.watchdog.explaining(lambda reason: self.run.note_failure(self.step, reason)))
            self.run.write_json("status.json", {"status": "running", "step": self.step})
            self.bad_files.begin()
            clock = train.checkpoint_every_seconds
            self.agreement = Agreement(self.ranks, stop, deadline, clock, lambda: self.saves.saving)
            if self.saves.newest is None:
                self.save()  # a disk that cannot be written is found now, and a rollback has somewhere to go
            for callback in self.callbacks:
                stack.callback(callback.end)
                callback.begin(self)
            self.model.train()
            self.reporter.start(self.step)
            self.agreement.saved()
            frozen = False
            while self.step < self.schedule.total_steps and not self.agreement.must_leave():
                self.train_step()
                if not frozen:
                    # What exists after the first step lives as long as the run: collections need not look at it.
                    gc.collect()
                    gc.freeze()
                    stack.callback(gc.unfreeze)
                    frozen = True
                if self.config.train.fit_steps:
                    fit.after_step(self)  # may shorten the run, once, and turns itself off
                self._between_steps()
            self.reporter.flush()
            self.saves.wait()  # before it is asked what the newest checkpoint holds
            if not self.saves.holds(self.step):
                self.save(last=True)
            signal, total = self.agreement.signal, self.schedule.total_steps
            status: Status = "preempted" if signal and self.step < total else "finished"
            if not signal and self.step < total:
                reached = f"at step {self.step:,} of {total:,}"
                self.console.print(f"Time limit of {train.max_minutes:g} minutes reached {reached}")
            for callback in self.callbacks if status == "finished" else ():
                callback.finish(self)
        reason = signal or ("all steps done" if self.step == total else "time limit")
        self.run.write_json("status.json", {"status": status, "step": self.step, "reason": reason})
        return status

    def set_length(self, steps: int) -> None:
        """Give a run another number of steps, from here on; its checkpoints say so."""
        self.config = with_length(self.config, steps, self.schedule.warmup_steps)
        self.schedule = create_schedule(self.config.train, len(self.dataset))
        self.task.begin(steps)
        self.reporter.total_steps = steps

    def train_step(self) -> None:
        """One optimiser step on the next batches.

        Nothing waits for the device: loss, gradient norm and whether the step was skipped stay there, and reach the
        host with the row of their interval. The host runs ahead by as many steps as the device's queue holds.
        """
        self.learning_rate = self.schedule(self.step)
        set_learning_rate(self.optimizer, self.learning_rate)
        # A generator: the loader is asked for a micro-batch once the one before is on its way to the device.
        inputs = (self._next_inputs() for _ in range(self.accumulation))
        self.reporter.add(*(self.step_graph or self._update)(inputs))
        self.step += 1

    def _next_inputs(self) -> tuple[Any, ...]:
        self.watchdog.at("waiting for images", self.step)
        with self.stage("data"):
            batch = next(self.loader)
        self.watchdog.at("computing")
        with self.stage("masking"):
            return self.task.prepare(batch)

    def _update(self, inputs: Iterable[tuple[Any, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulate gradients over the global batch, then update: loss, gradient norm, 1.0 if the step was skipped.

        A CUDA graph captures all of it, so no value that changes from step to step may be a Python number here.
        Weights of losses may: each micro-batch has the same size in every step.
        """
        train, losses = self.config.train, []
        low_precision, caches = self.dtype != torch.float32, self.step_graph is None
        with self.model.cast_weights(self.dtype) if low_precision else nullcontext():
            for number, (weight, one) in enumerate(zip(self.loss_weights, inputs, strict=True), 1):
                autocast = torch.autocast(self.device.type, self.dtype, low_precision, cache_enabled=caches)
                with no_sync(self.forward, number == self.accumulation, train.reduce_every):
                    with self.stage("forward"), autocast:
                        loss = self.task.loss(self.forward, *one) * weight
                    with self.stage("backward"):
                        (loss * self.loss_scale.value if self.loss_scale else loss).backward()
                losses.append(loss.detach())
        with self.stage("optimizer"):
            norm, skipped = step_unless_non_finite(self.optimizer, train.clip_grad, self.loss_scale)
            self.optimizer.zero_grad(set_to_none=True)
        return sum(losses[1:], losses[0]), norm, skipped

    def _between_steps(self) -> None:
        train, every = self.config.train, self.config.train.checkpoint_every_steps
        self.watchdog.at("evaluating" if self.callbacks else "between steps", self.step)
        for callback in self.callbacks:
            callback.after_step(self)
        self.watchdog.at("between steps")
        if self.agreement.all_saved:
            self.saves.wait()  # done on every rank, so nobody waits; all of them take notice at the same step
        if self.step % train.log_every_steps == 0 or self.step == self.schedule.total_steps:
            self.log()
        if self.step == self.schedule.total_steps:
            self.reporter.flush()
        if self.guard.due:
            self.roll_back()
        elif self.agreement.save_due or (every and self.step % every == 0):
            self.save()

    def log(self) -> None:
        """A row of metrics. Rates and epochs count masked images, as the flags do; ``samples`` counts decoded ones."""
        self._note_bad_files()
        batch_size = self.config.train.global_batch_size
        row: Row = {
            "step": self.step,
            "samples": self.samples,
            "epoch": self.step * batch_size / len(self.dataset),
            "lr": self.learning_rate,
            "bad_files": len(self.bad_files),
            "failed_saves": self.saves.failed,
        }
        self.reporter.log(row | self.task.row(), batch_size)

    def save(self, *, last: bool = False) -> None:
        """Save a checkpoint of the state after ``step`` steps, or begin to."""
        self.watchdog.at("saving", self.step)
        self.reporter.flush()  # the guard must know all steps up to this one, and the rows be on the disk before it
        self._note_bad_files()
        tensors, manifest = self.state_dict()
        interval = self.reporter.values.copy_of(tensors["metrics.interval"])
        taken = self.guard.newest_taken(self.step, interval)
        self.saves.save(self.step, tensors, manifest, last=last, protect=taken)
        self.agreement.saved()

    def _note_failed_save(self, values: dict[str, Any]) -> None:
        with suppress(OSError):  # the disk may be full
            self.run.write_json("status.json", {"status": "running", "step": self.step, **values})

    def roll_back(self) -> None:
        """Go back to the newest good checkpoint, and on with later images; every rank calls it once ``guard.due``.

        The images of the steps since the checkpoint are left out: on the same ones the same weights would fail again.
        Nothing is saved: a run that ends before its next checkpoint resumes from this one, and comes back here.

        Raises:
            FloatingPointError: on all ranks alike, after ``max_rollbacks``, or if no good checkpoint is left.
            CheckpointError: on all ranks alike, if the run folder cannot be written.
        """
        self.watchdog.at("rolling back", self.step)
        # Before a checkpoint is loaded, which replaces what guard and positions know of the steps since it.
        failure, train = self.guard.failure(), self.config.train
        done = len(failure.earlier)
        if done >= train.max_rollbacks:
            raise FloatingPointError(
                f"{failure}. The run has rolled back {done} times, the limit of --train.max-rollbacks. To continue, "
                f"--resume with a higher limit and {remedies(train)}"
            )
        # Before later checkpoints are set aside: a pending save would publish one afterwards.
        self.saves.wait()
        self.loader.close()
        saved = self._load_good_checkpoint()
        if saved is None:
            raise FloatingPointError(
                f"{failure}. There is no good checkpoint of an earlier step. What may help: {remedies(train)}, and "
                "checkpoints more often"
            )

        def begin_there() -> None:
            if self.parallelism.is_main:  # checkpoints abandoned last time are as large as any
                for old in self.run.checkpoints.glob("step-*.abandoned"):
                    discard(old)
            self._continue_from(saved, "abandoned")
            # After the checkpoint's state, which knows neither this rollback nor those between.
            first, last = self.guard.roll_back(self.step, failure)["positions_left_out"]
            self.bad_files.begin()  # its list of files goes back as well
            self.console.print(
                f"ROLLED BACK TO STEP {self.step} ({done + 1} of at most {train.max_rollbacks} times): {failure}. "
                f"Images {first:,} to {last:,} of the run's order are left out"
            )
            self.loader = self.loader_at(self.samples)

        self.ranks.gather("rolling back", begin_there)
        self.reporter.go_back(self.step)  # after the rows were cut: it opens their files

    def _load_good_checkpoint(self) -> Checkpoint | None:
        """Load the newest undamaged checkpoint before the failure whose weights and moments are finite, if any."""
        newest = self.guard.newest_good()
        while True:
            try:
                saved = open_latest(self.run.path, ranks=self.ranks, newest=newest)
            except LostRankError:
                raise
            except CheckpointError:
                return None
            self._load_tensors(saved)
            if not self.ranks.any(not all_finite(state.collect(self.model, self.optimizer).values())):
                return saved
            self.console.print(f"{saved.path} is not used: its weights or moments are not all finite")
            newest = saved.manifest["step"] - 1

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: tensors by name, and JSON-able values for its manifest."""
        tensors, values = state.collect(self.model, self.optimizer), {}
        for name, part in self.stateful.items():
            for key, value in part.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
                else:
                    values.setdefault(name, {})[key] = value
        return tensors, values | self._describe() | {"samples_consumed": self.samples}

    def _describe(self) -> dict[str, Any]:
        return state.describe_run(self.config, self.model, self.dataset, self.ranks.size)

    def resume(self, saved: Path | Checkpoint) -> list[str]:
        """Continue from a checkpoint of any number of processes; return what makes the continuation inexact, in words.

        Raises:
            CheckpointError: if the checkpoint is damaged, of another architecture, or needs another seed or batch.
        """
        saved = open_checkpoint(saved, ranks=self.ranks) if isinstance(saved, Path) else saved
        differences = state.compare(saved.manifest, self._describe(), type(self.config))
        self._load_tensors(saved)
        self._continue_from(saved)
        return differences

    def _load_tensors(self, saved: Checkpoint) -> None:
        """Restore weights, optimiser, and the tensors of whatever else has state."""
        self.watchdog.at("reading a checkpoint", self.step)
        if self.step_graph:
            self.step_graph.reset()  # it knows tensors by their place, and the optimiser's are about to be replaced
        found = state.restore(saved, self.model, self.optimizer, self.ranks, tuple(self.stateful))
        for name, part in self.stateful.items():
            tensors = {key.removeprefix(f"{name}."): t for key, t in found.items() if key.startswith(f"{name}.")}
            if tensors:
                part.load_state_dict(tensors)

    def _continue_from(self, saved: Checkpoint, suffix: str = "damaged") -> None:
        """Take over a checkpoint's manifest, and have the run folder know of no later step: later checkpoints are
        renamed to ``step-N.<suffix>``."""
        manifest = state.of_this_version(saved.manifest)
        self.step, self.saves.newest = manifest["step"], saved.path
        with reading(saved.path / MANIFEST):
            for name, part in self.stateful.items():
                same_files = manifest["dataset"]["hash"] == self.dataset.hash  # else its sample ids mean other files
                if name in manifest and (same_files or name != "bad_files"):
                    part.load_state_dict(manifest[name])
        if self.parallelism.is_main:
            set_aside_after(self.run.checkpoints, self.step, suffix)
        self.run.cut_metrics(self.step)

    def loader_at(self, position: int) -> Any:
        """A loader of this rank's batches from a position in the order of images on."""
        return self.task.open_loader(
            position, self.batch_size, ranks=self.ranks, device=self.device, known_bad=self.bad_files.late
        )

    def _note_bad_files(self) -> None:
        """Exchange the files found bad since the last time, and judge all of them, on every rank at the same step."""
        new = self.bad_files.unknown(self.loader.late_bad, self.samples)
        if self.ranks.any(bool(new)):
            found = self.ranks.gather("collecting bad files", lambda: new)
            self.bad_files.update([bad for late in found for bad in late], self.samples)
            self.dataset.check_bad_fraction({bad.sample_id: bad.reason for bad in self.bad_files.late})
