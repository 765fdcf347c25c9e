"""The training loop. It reads top to bottom: set up, fit, one step, log, save, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from fastmae import ops
from fastmae.data import Augment, Batch
from fastmae.data.agree import check_agreement
from fastmae.train import checkpoint, state
from fastmae.train.bad_files import BadFiles
from fastmae.train.config import PretrainConfig, to_json
from fastmae.train.metrics import Row
from fastmae.train.optim import create_optimizer, create_schedule, step_unless_non_finite
from fastmae.train.reporter import Reporter, deadline_after
from fastmae.train.resolution import create_resolution
from fastmae.train.run_folder import RunFolder
from fastmae.train.signals import StopRequest

Status = Literal["finished", "preempted"]


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
        ValueError: if the warm-up is not shorter than the run, or there are more image sizes than epochs.
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
        self.resolution = create_resolution(config, self.schedule.total_steps, len(dataset))
        self.optimizer = create_optimizer(model, train)
        self.step = 0
        self.samples_per_step = train.global_batch_size // train.masks_per_image
        self.bad_files = BadFiles(run.path / "bad_files.jsonl", dataset, self.samples_per_step)
        images = "" if config.data.path is None else f" --data.path {config.data.path}"
        advice = f"fastmae bench --recipe {config.recipe}{images} says what would help"
        self.reporter = Reporter(run, self.console, self.device, train.log_every_steps, advice)
        self._create_loader = create_loader
        self._saved_step: int | None = None

    @property
    def num_threads(self) -> int:
        """CPU threads of PyTorch, which the bits of a sum hang on."""
        return torch.get_num_threads()

    @property
    def samples(self) -> int:
        """Images decoded and consumed so far: all that the order of the following ones hangs on."""
        return self.step * self.samples_per_step

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
            DataError: if the images cannot be read, too many are bad, or ranks see different ones.
            FloatingPointError: after many steps in a row without a finite gradient.
        """
        train, total = self.config.train, self.schedule.total_steps
        self._on_checkpoint = on_checkpoint
        deadline = deadline_after(train.max_minutes)
        self.reporter.open(self.step, total, deadline, on_log)
        try:
            check_agreement(self.dataset)
            with StopRequest() as stop, self._open_loader() as self.loader:
                self.run.write_json("status.json", {"status": "running", "step": self.step})
                self.bad_files.begin()
                if self._saved_step is None:
                    self.save()
                self.model.train()
                self.reporter.start(self.step)
                self._saved_at = time.monotonic()
                while self.step < total and not stop.requested and time.monotonic() < deadline:
                    self.train_step()
                    if self.step % train.log_every_steps == 0 or self.step == total:
                        self.log()
                    if self._checkpoint_due():
                        self.save()
                self.reporter.flush()
                if self._saved_step != self.step:
                    self.save()
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide what went wrong
                self.run.write_json("status.json", {"status": "failed", "step": self.step, "reason": repr(error)})
            raise
        finally:
            self.reporter.close()
            self.model.set_input_size()
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
        self.reporter.add(sum(losses[1:], losses[0]), norm, skipped)
        self.step += 1

    def log(self) -> None:
        """Close an interval of steps: a row of metrics.

        Rates and epochs count masked images, as the configuration does; ``samples`` counts decoded ones.
        """
        self._note_bad_files()
        batch_size = self.config.train.global_batch_size
        row: Row = {
            "step": self.step,
            "samples": self.samples,
            "epoch": self.step * batch_size / len(self.dataset),
            "lr": self.optimizer.param_groups[0]["lr"],
            "bad_files": len(self.bad_files),
        }
        if self.config.data.progressive_sizes:
            row["input_height"], row["input_width"] = self.model.input_size
        self.reporter.log(row, batch_size)

    def save(self) -> None:
        """Save a checkpoint of the state after ``step`` steps."""
        self.reporter.flush()
        self._note_bad_files()
        tensors = state.collect_tensors(self.model, self.optimizer)
        tensors["metrics.interval"] = self.reporter.values.state()
        manifest = state.describe_run(self.config, self.model, self.optimizer, self.dataset) | {
            "samples_consumed": self.samples,
            "world_size": 1,
            "num_threads": self.num_threads,
            "late_bad": self.bad_files.state(),
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
        self.reporter.values.restore(tensors["metrics.interval"], self.step)
        if manifest["dataset"]["hash"] == self.dataset.hash:  # else its sample ids mean other files
            self.bad_files.restore(manifest.get("late_bad", []))
        checkpoint.set_aside_after(self.run.checkpoints, self.step)
        self.run.cut_metrics(self.step)
        return differences

    def _open_loader(self) -> Any:
        data = self.config.data
        names = ("crop", "scale", "ratio", "hflip", "vflip", "color_jitter")
        loader = self._create_loader(
            self.dataset,
            loader=data.loader,
            batch_size=self.batch_size // self.config.train.masks_per_image,
            img_size=self.resolution if data.progressive_sizes else self.config.img_size,
            seed=self.config.train.seed,
            position=self.samples,
            device=self.device,
            augment=Augment(**{name: getattr(data, name) for name in names}),
            num_threads=data.num_threads,
            prefetch=data.prefetch,
            timeout=data.timeout,
            known_bad=self.bad_files.late,
            samples_per_step=self.samples_per_step,
        )
        self.console.print(f"Images: {loader.describe()}")
        return loader

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
        with self.reporter.clock.waiting():
            batch = next(self.loader)
        size = tuple(batch.images.shape[-2:])
        if size != self.model.input_size:
            self.model.set_input_size(size)
        return batch

    def _note_bad_files(self) -> None:
        self.bad_files.update(self.loader.late_bad, self.samples)

    def _checkpoint_due(self) -> bool:
        train = self.config.train
        by_step = train.checkpoint_every_steps and self.step % train.checkpoint_every_steps == 0
        seconds = train.checkpoint_every_seconds
        return bool(by_step or (seconds and time.monotonic() - self._saved_at >= seconds))
