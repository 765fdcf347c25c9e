"""``fastmae data shard``, ``index``, ``verify`` and ``stats``."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastmae.cli.commands import ImagesConfig, IndexConfig, ShardConfig, StatsConfig, VerifyConfig
from fastmae.data import DataError, Dataset, open_dataset
from fastmae.data.dataset import printable
from fastmae.data.index import Accepts, publish_index
from fastmae.data.inspect import QUANTILES, Statistics, good_ids, measure, suggest_range, verify_images
from fastmae.data.open import check_accepts
from fastmae.data.processes import in_processes
from fastmae.data.shards import ShardOptions, write_shards
from fastmae.data.sources import find_source, index_shard
from fastmae.errors import UsageError, usage_errors

EXIT_TOO_MANY_BAD, EXIT_INTERRUPTED = 1, 130
_LISTED = 20
_SECONDS_BETWEEN_LINES = 60.0
"""In the log of a batch job, which cannot show a bar."""
_QUANTILE_NAMES = ["min", "5 %", "25 %", "median", "75 %", "95 %", "max"]


def run(command: ShardConfig | IndexConfig | VerifyConfig | StatsConfig) -> int:
    """Run one of the commands; return its exit code."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    commands = {ShardConfig: shard, IndexConfig: index, VerifyConfig: verify, StatsConfig: stats}
    workers = command.images.num_workers
    if workers is not None and workers < 1:
        raise UsageError(f"--num-workers: expected at least 1, got {workers}")
    try:
        return commands[type(command)](command, console)
    except DataError as error:  # the data room's errors name flags of ``fastmae pretrain``; here they are shorter
        raise UsageError(str(error).replace("--data.", "--").replace("--model.in-chans", "--channels")) from error


def shard(config: ShardConfig, console: Console) -> int:
    """``fastmae data shard``."""
    if config.path.is_dir() and config.out.resolve().is_relative_to(config.path.resolve()):
        raise UsageError(f"OUT: expected a folder outside of {config.path}, got {config.out}")
    number, _, count = config.part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--part: expected i/n with 1 <= i <= n, such as 2/4, got {config.part}")
    part = int(number), int(count)
    with usage_errors():
        options = ShardOptions(**{field.name: getattr(config, field.name) for field in fields(ShardOptions)})
    dataset = _open(config.path, config.images, config.max_bad_fraction)
    total, workers = (len(dataset) - len(dataset.bad_ids)) // part[1], config.images.num_workers
    try:
        with _counted_warnings(), _progress("Packing", total) as advance:
            packed = write_shards(dataset, config.out, options, part=part, num_workers=workers, progress=advance)
    except KeyboardInterrupt:
        console.print(f"Complete shards stay in {config.out}; the same command resumes from there", style="bold")
        raise
    console.print(
        f"{packed.images:,} images in {packed.shards:,} shards in {packed.folder}: {packed.bytes / 1e6:,.1f} MB, "
        f"{packed.bytes / max(packed.source_bytes, 1):.1%} of the images' {packed.source_bytes / 1e6:,.1f} MB; "
        f"{packed.encoded:,} re-encoded, {packed.images - packed.encoded:,} with their bytes as they were"
    )
    if packed.missing:
        console.print(f"Part {config.part} is complete; {packed.missing:,} shards of other parts are not yet")
    elif packed.bad:
        console.print(f"{packed.bad:,} left out: {packed.folder / 'bad_files.jsonl'}")
    return 0


def index(config: IndexConfig, console: Console) -> int:
    """``fastmae data index``."""
    images, path = config.images, config.path.expanduser()
    with usage_errors():
        accepts = check_accepts(images.channels, images.value_range, images.channels_first, images.max_pixels)
    home = images.index and images.index.expanduser()
    try:
        with usage_errors(), _terminable():
            with _progress("Listing", None) as advance:
                source = find_source(path, images.num_workers, advance)
            if source.shards:
                paths = [source.root / name for name in source.shards]
                with _progress("Indexing shards", len(paths)) as advance:
                    written = 0
                    for new in in_processes(index_shard, paths, images.num_workers, alone=1):
                        written += new
                        advance(1)
                console.print(
                    f"{written:,} indexes written beside {len(paths):,} shards, {len(paths) - written:,} were there"
                )
            with _progress("Reading headers", len(source)) as advance:
                options = {"home": home, "workers": images.num_workers, "progress": advance}
                published = publish_index(source, path, accepts, verify=True, **options)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command continues from there", style="bold")
        raise
    dataset = _open(path, replace(images, index=published.folder))
    console.print(
        f"{len(dataset):,} images, {len(dataset.bad_ids):,} of them unusable, {len(dataset.classes):,} named classes\n"
        f"Hash:  {dataset.hash}\nIndex: {dataset.index.folder or 'not cached'}"
    )
    return 0


def verify(config: VerifyConfig, console: Console) -> int:
    """``fastmae data verify``."""
    dataset = _open(config.path, config.images)
    if not 0 <= config.start < len(dataset):
        raise UsageError(f"--start: expected a number from 0 to {len(dataset) - 1}, got {config.start}")
    known, found, damaged, checked, interrupted = len(dataset.bad_ids), {}, {}, 0, False
    total = len(dataset) - config.start - int((dataset.bad_ids >= config.start).sum())
    next_id = config.start
    with usage_errors():
        file = config.out.open("w") if config.out else nullcontext()
    with file as out:

        def note(path: str, reason: str, bad: bool = True) -> None:
            if out is not None:
                out.write(json.dumps({"path": path, "bad": bad, "reason": reason}) + "\n")
                out.flush()

        for bad in dataset.bad:
            note(*bad)
        try:
            with _terminable(), DecoderWarnings() as said, _progress("Decoding", total) as advance:
                options = {"num_threads": config.images.num_workers, "take_warnings": said.take}
                for verdict in verify_images(dataset, good_ids(dataset, config.start), **options):
                    checked, next_id = checked + 1, verdict.sample_id + 1
                    if reason := verdict.reason or verdict.warning:
                        is_bad = config.strict or verdict.reason is not None
                        (found if is_bad else damaged)[verdict.sample_id] = reason
                        note(dataset.path(verdict.sample_id), reason, is_bad)
                    advance(1, verdict.size)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # Whatever ended the verification, the index keeps what it found.
            stored = dataset.index.keeps_verdicts
            if found:
                dataset.mark_bad(found)
    _list(found, dataset, console)
    if damaged:
        console.print(f"{len(damaged):,} images are damaged but decode; --strict counts them as bad:")
        _list(damaged, dataset, console)
    bad = known + len(found)
    console.print(
        f"{checked:,} of {total:,} images decoded, {len(found):,} of them bad; "
        f"{known:,} were known to be bad. Bad together: {bad / len(dataset):.3%}"
        + (f"\nRemembered in {dataset.index.folder}" if found and stored else "")
        + ("\nNot remembered, since the index cannot be written" if found and not stored else "")
    )
    if interrupted:
        console.print(f"Interrupted before the end; continue with --start {next_id}", style="bold")
        return EXIT_INTERRUPTED
    return EXIT_TOO_MANY_BAD if bad > config.max_bad_fraction * len(dataset) else 0


def _list(reasons: Mapping[int, str], dataset: Dataset, console: Console) -> None:
    for sample_id in islice(reasons, _LISTED):
        console.print(f"{printable(dataset.path(sample_id))}: {printable(reasons[sample_id])}")
    if len(reasons) > _LISTED:
        console.print(f"and {len(reasons) - _LISTED:,} more")


def stats(config: StatsConfig, console: Console) -> int:
    """``fastmae data stats``."""
    if config.sample < 0:
        raise UsageError(f"--sample: expected at least 0, got {config.sample}")
    images = _with_range(config)
    dataset = _open(config.path, images)
    sampled = min(config.sample, len(dataset) - len(dataset.bad_ids))
    with _counted_warnings(), _progress("Decoding a sample", sampled) as advance:
        statistics = measure(
            dataset, sample=config.sample, seed=config.seed, num_threads=config.images.num_workers, progress=advance
        )
    print_statistics(statistics, dataset, console, as_json=config.json)
    if images != config.images and not config.json:
        console.print(
            "The value range holds 99.8 % of each channel's values in a sample; give another with --value-range."
        )
    return 0


def _with_range(config: StatsConfig) -> ImagesConfig:
    """The reading options, with a suggested value range if most images need one and none is given."""
    images = config.images
    if images.value_range is not None:
        return images
    try:
        index = _open(config.path, images).index
        need = sum("--data.value-range" in reason for reason in index.bad.values())
        if 2 * need < len(index.table) and not index.modes <= {"I", "I;16"}:
            return images
    except DataError as error:
        if "--data.value-range" not in str(error):
            raise
    dataset = _open(config.path, replace(images, value_range=(0.0, 1.0)))  # any range, since its values are not used
    found = suggest_range(dataset, sample=config.sample, seed=config.seed, num_threads=images.num_workers)
    return replace(images, value_range=found or None)


def _open(path: Path, images: ImagesConfig, max_bad_fraction: float = 1.0) -> Dataset:
    with usage_errors():
        return open_dataset(
            path,
            channels=images.channels,
            value_range=images.value_range,
            channels_first=images.channels_first,
            max_pixels=images.max_pixels,
            max_bad_fraction=max_bad_fraction,
            index=images.index,
        )


@contextmanager
def _counted_warnings() -> Iterator[None]:
    """Count decoders' warnings, which name no file, instead of letting them break the progress bar."""
    with DecoderWarnings() as said:
        yield
        count = len(said.take())
    if count:
        print(f"Decoders warned {count:,} times of damage; fastmae data verify names the files", file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr; the yielded function advances it by a number of images and of bytes."""
    size, console = TextColumn("{task.fields[size]}"), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), size, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task, images_done, bytes_done, said = bar.add_task(title, total=total, size=""), 0, 0, time.monotonic()

        def advance(images: int, size: int = 0) -> None:
            nonlocal images_done, bytes_done, said
            images_done, bytes_done = images_done + images, bytes_done + size
            bar.update(task, advance=images, size=f"{bytes_done / 1e6:,.0f} MB" if bytes_done else "")
            if not console.is_terminal and time.monotonic() >= said + _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                of = "" if total is None else f" of {total:,}"
                print(f"{title}: {images_done:,}{of}", file=sys.stderr)

        yield advance


# ---------------------------------------------------------------------------------------------------------------------
# What data stats prints


def pretrain_flags(statistics: Statistics, dataset: Dataset) -> str:
    """Flags of ``fastmae pretrain`` for this data set: mean and standard deviation, and how its images are read."""
    flags = []
    if statistics.sampled:
        # A constant channel has no deviation to divide by.
        for name, values in (("mean", statistics.mean), ("std", [value or 1.0 for value in statistics.std])):
            numbers = (f"{value:.3f}" if value >= 0.1 else f"{value:.3g}" for value in values)
            flags.append(f"--model.{name} {' '.join(numbers)}")
    if dataset.channels != 3:
        flags.append(f"--model.in-chans {dataset.channels}")
    if dataset.value_range is not None:
        flags.append(f"--data.value-range {' '.join(f'{value:.9g}' for value in dataset.value_range)}")
    if dataset.accepts.channels_first:
        flags.append("--data.channels-first")
    if dataset.accepts.max_pixels != Accepts.max_pixels:
        flags.append(f"--data.max-pixels {dataset.accepts.max_pixels}")
    return " ".join(flags)


def print_statistics(statistics: Statistics, dataset: Dataset, console: Console, *, as_json: bool) -> None:
    """Print what was measured, for people or as one JSON object."""
    flags = pretrain_flags(statistics, dataset)
    if as_json:
        values = {"path": str(dataset.root), "hash": dataset.hash, **asdict(statistics)}
        console.print(json.dumps(values | {"quantiles_at": QUANTILES, "pretrain_flags": flags}, indent=1))
        return
    bad = sum(statistics.bad.values())
    console.print(
        f"{printable(dataset.name)}: {statistics.images:,} images, {statistics.bytes / 1e6:,.1f} MB, {bad:,} unusable; "
        f"{statistics.labelled:,} labelled; {statistics.rotated:,} turned or mirrored by EXIF\n"
    )
    quantiles = (
        (name, *(f"{value:,.{2 if name == 'megapixels' else 0}f}" for value in values))
        for name, values in statistics.quantiles.items()
    )
    console.print(_table(["", *_QUANTILE_NAMES], quantiles))
    for title, counts in (("Format", statistics.formats), ("Mode", statistics.modes), ("Unusable", statistics.bad)):
        if counts:
            rows = ((printable(name), f"{count:,}") for name, count in counts.items())
            console.print(_table([title, "images"], rows))
    if statistics.sampled:
        columns = (statistics.mean, statistics.std, statistics.std_within)
        rows = ((str(n), *(f"{v:.4f}" for v in values)) for n, values in enumerate(zip(*columns, strict=True)))
        console.print(_table(["Channel", "mean", "std", "std within"], rows))
        console.print(
            f"In [0, 1], of {statistics.sampled:,} images, each weighing the same. std: over the pixels of all images; "
            "within: the mean of each image's own, which is what ImageNet's usual 0.229 0.224 0.225 are.\n"
        )
    if flags:
        console.print(f"For fastmae pretrain:\n{flags}")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Warnings of decoders


class DecoderWarnings:
    """Context that collects what C libraries write to stderr; what Python writes still goes there.

    libjpeg reports damage that it can decode around only there, without the file's name. Only one thread at a time may
    use this. If an exception leaves the context, lines that were not taken are printed.
    """

    def __enter__(self) -> Self:
        self._python = sys.stderr
        self._python.flush()
        self._real = os.dup(2)
        self._file = tempfile.TemporaryFile()
        self._at = 0
        if _descriptor(self._python) == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(self._file.fileno(), 2)
        return self

    def take(self) -> list[str]:
        """The lines since the last call."""
        size = os.fstat(self._file.fileno()).st_size
        text = os.pread(self._file.fileno(), size - self._at, self._at).decode(errors="replace")
        self._at = size
        return text.splitlines()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.dup2(self._real, 2)
        os.close(self._real)
        if sys.stderr is not self._python:
            sys.stderr.close()
            sys.stderr = self._python
        if kind is not None:
            self._python.writelines(f"{line}\n" for line in self.take())
        self._file.close()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, io.UnsupportedOperation, AttributeError):
        return None
