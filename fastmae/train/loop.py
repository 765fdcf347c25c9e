"""The training loop. It reads top to bottom: set up, fit, one step, log, save, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from fastmae import ops
from fastmae.data import Augment, Batch
from fastmae.train import checkpoint, state
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.metrics import HostCopy, JsonLines, Row, Sink, StepValues, TensorBoard, Terminal, mean_of_finite
from fastmae.train.optim import create_optimizer, create_schedule, step_unless_non_finite
from fastmae.train.run_folder import RunFolder
from fastmae.train.signals import StopRequest

Status = Literal["finished", "preempted"]

MAX_SKIPPED = 20
"""Steps in a row without a finite gradient after which a run ends: skipping more will not mend it."""


@dataclass
class Clock:
    """Where the seconds of a log interval went, as the host sees them: a device that lags behind shows as waiting."""

    begun: float = 0.0
    step: int = 0
    data: float = 0.0


class Trainer:
    """Trains a model on a loader's batches, and saves all it takes to go on exactly.

    Args:
        config: a validated configuration.
        model: a ``MaskedAutoencoderViT`` on the device to train on.
        dataset: the images; its length and hash are recorded.
        run: the run folder, locked.
        create_loader: ``fastmae.data.create_loader`` or something of its signature.
        console: where progress is shown.

    Raises:
        ValueError: if the warm-up is not shorter than the run.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: nn.Module,
        dataset: Any,
        run: RunFolder,
        *,
        create_loader: Callable[..., Any],
        console: Console | None = None,
    ) -> None:
        train = config.train
        self.config, self.model, self.dataset, self.run = config, model, dataset, run
        self.console = console or Console()
        self.device = next(model.parameters()).device
        self.forward = torch.compile(model, dynamic=False) if train.compile else model
        self.batch_size = train.batch_size or train.global_batch_size
        self.accumulation = train.global_batch_size // self.batch_size
        self.schedule = create_schedule(train, len(dataset))
        self.optimizer = create_optimizer(model, train)
        self.step = 0
        self.values = StepValues(("loss", "grad_norm", "skipped"), train.log_every_steps, self.device)
        self.clock = Clock()
        self._create_loader = create_loader
        self._rows: list[tuple[Row, HostCopy]] = []
        self._sinks: list[Sink] = []
        self._saved_step: int | None = None
        self._skipped_in_a_row = 0

    @property
    def num_threads(self) -> int:
        """CPU threads of PyTorch, which the bits of a sum hang on."""
        return torch.get_num_threads()

    @property
    def samples(self) -> int:
        """Images decoded and consumed so far: all that the order of the following ones hangs on."""
        train = self.config.train
        return self.step * (train.global_batch_size // train.masks_per_image)

    def fit(
        self,
        on_log: Callable[[Row], None] | None = None,
        on_checkpoint: Callable[[Path], None] | None = None,
    ) -> Status:
        """Train to the end of the schedule, or until a signal or the time limit; save; return how it ended.

        Args:
            on_log: called with each row of metrics.
            on_checkpoint: called with each checkpoint's folder.

        Raises:
            CheckpointError: if a checkpoint cannot be written.
            FloatingPointError: after ``MAX_SKIPPED`` steps in a row without a finite gradient.
        """
        train, total = self.config.train, self.schedule.total_steps
        self._on_log, self._on_checkpoint = on_log, on_checkpoint
        self._sinks = [JsonLines(self.run.metrics), TensorBoard(self.run.path, self.step)]
        deadline = time.monotonic() + 60 * train.max_minutes if train.max_minutes else math.inf
        self._sinks.append(Terminal(self.console, self.step, total, deadline))
        try:
            with StopRequest() as stop, self._open_loader() as self.loader:
                self.run.write_json("status.json", {"status": "running", "step": self.step})
                if self._saved_step is None:
                    self.save()
                self.model.train()
                self.clock = Clock(time.monotonic(), self.step)
                self._saved_at = time.monotonic()
                while self.step < total and not stop.requested and time.monotonic() < deadline:
                    self.train_step()
                    if self.step % train.log_every_steps == 0 or self.step == total:
                        self.log()
                    if self._checkpoint_due():
                        self.save()
                self._flush_rows()
                if self._saved_step != self.step:
                    self.save()
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide what went wrong
                self.run.write_json("status.json", {"status": "failed", "step": self.step, "reason": repr(error)})
            raise
        finally:
            for sink in self._sinks:
                sink.close()
        status: Status = "preempted" if stop.requested and self.step < total else "finished"
        reason = stop.requested or ("all steps done" if self.step == total else "time limit")
        self.run.write_json("status.json", {"status": status, "step": self.step, "reason": reason})
        return status

    def train_step(self) -> None:
        """One optimiser step: accumulate gradients over the global batch, then update."""
        train, losses = self.config.train, []
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        bf16 = train.precision == "bf16"
        with self.model.cast_weights(torch.bfloat16) if bf16 else nullcontext():
            for _ in range(self.accumulation):
                batch = self._next_batch()
                masking = self._mask(batch)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = self.forward(batch.images, masking=masking, full_pred=False).loss / self.accumulation
                loss.backward()
                losses.append(loss.detach())
        norm, skipped = step_unless_non_finite(self.optimizer, train.clip_grad)
        self.optimizer.zero_grad(set_to_none=True)
        self.values.add(sum(losses[1:], losses[0]), norm, skipped)
        self.step += 1

    def log(self) -> None:
        """Close an interval: its values begin their way to the host, and those of the interval before are written.

        Rates and epochs count masked images, as the configuration does; ``samples`` counts decoded ones.
        """
        now, clock = time.monotonic(), self.clock
        seconds = max(now - clock.begun, 1e-9)
        row: Row = {
            "step": self.step,
            "samples": self.samples,
            "epoch": self.step * self.config.train.global_batch_size / len(self.dataset),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": (self.step - clock.step) * self.config.train.global_batch_size / seconds,
            "data_share": clock.data / seconds,
        }
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._rows.append((row, self.values.take()))
        self.clock = Clock(now, self.step)
        self._flush_rows(pending=1 if self.device.type == "cuda" else 0)

    def save(self) -> None:
        """Save a checkpoint of the state after ``step`` steps."""
        self._flush_rows()
        tensors = state.collect_tensors(self.model, self.optimizer)
        tensors["metrics.interval"] = self.values.state()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        manifest = {
            "samples_consumed": self.samples,
            "world_size": 1,
            "num_threads": self.num_threads,
            "architecture": self.model.architecture,
            "config": to_json(self.config),
            "dataset": {"name": self.dataset.name, "hash": self.dataset.hash, "samples": len(self.dataset)},
            "param_groups": groups,
            "versions": state.versions(),
        }
        keep = self.config.train.keep_checkpoints
        path = checkpoint.save_checkpoint(self.run.checkpoints, self.step, tensors, manifest, keep=keep)
        self._saved_step, self._saved_at = self.step, time.monotonic()
        if self._on_checkpoint:
            self._on_checkpoint(path)

    def resume(self, path: Path) -> list[str]:
        """Go on from a checkpoint folder.

        Returns:
            What differs from the run that was saved, in words, where it makes the continuation inexact.

        Raises:
            CheckpointError: if the checkpoint is damaged, of another architecture, or needs another seed or batch.
        """
        manifest = checkpoint.verify_checkpoint(path)
        state.check_architecture(manifest["architecture"], self.model.architecture)
        differences = state.compare_configs(manifest["config"], to_json(self.config))
        differences += state.compare_circumstances(manifest, self.num_threads, self.dataset.hash)
        tensors, _ = checkpoint.load_checkpoint(path, verify=False)
        state.restore_tensors(tensors, self.model, self.optimizer)
        self.step = self._saved_step = manifest["step"]
        self.values.restore(tensors["metrics.interval"], self.step)
        checkpoint.set_aside_after(self.run.checkpoints, self.step)
        self.run.cut_metrics(self.step)
        return differences

    def _open_loader(self) -> Any:
        data = self.config.data
        return self._create_loader(
            self.dataset,
            loader=data.loader,
            batch_size=self.batch_size // self.config.train.masks_per_image,
            img_size=self.config.img_size,
            seed=self.config.train.seed,
            position=self.samples,
            device=self.device,
            augment=Augment(scale=data.scale, ratio=data.ratio, hflip=data.hflip, vflip=data.vflip),
            num_threads=data.num_threads,
        )

    def _mask(self, batch: Batch) -> ops.Masking:
        """The masks of a batch, those of an image adjacent: a pure function of the seed and of what the batch says."""
        model, train = self.config.model, self.config.train
        return ops.random_masking(
            len(batch.images),
            self.model.num_patches,
            model.mask_ratio,
            seed=train.seed,
            epoch=batch.epochs,
            sample_ids=batch.sample_ids,
            strategy=model.mask_strategy,
            grid_size=self.model.grid_size,
            masks_per_image=train.masks_per_image,
        )

    def _next_batch(self) -> Batch:
        begun = time.monotonic()
        batch = next(self.loader)
        self.clock.data += time.monotonic() - begun
        return batch

    def _checkpoint_due(self) -> bool:
        train = self.config.train
        by_step = train.checkpoint_every_steps and self.step % train.checkpoint_every_steps == 0
        seconds = train.checkpoint_every_seconds
        return bool(by_step or (seconds and time.monotonic() - self._saved_at >= seconds))

    def _flush_rows(self, pending: int = 0) -> None:
        """Write the rows whose values have been given time to arrive; all but the newest ``pending``."""
        while len(self._rows) > pending:
            row, copy = self._rows.pop(0)
            values = copy.wait()
            row["loss"], row["grad_norm"] = mean_of_finite(values["loss"]), mean_of_finite(values["grad_norm"])
            row["skipped_steps"] = int(sum(values["skipped"]))
            for sink in self._sinks:
                sink.write(row)
            if self._on_log:
                self._on_log(row)
            self._end_if_hopeless(values["skipped"], row["step"])

    def _end_if_hopeless(self, skipped: list[float], step: int) -> None:
        for one in skipped:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if one else 0
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"no finite gradient in the last {self._skipped_in_a_row} steps up to step {step}; "
                "the weights are as they were before them"
            )
