"""``fastmae data shard``, ``index``, ``verify`` and ``stats``."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastmae.cli.commands import ImagesConfig, IndexConfig, ShardConfig, StatsConfig, VerifyConfig
from fastmae.data import DataError, Dataset, open_dataset
from fastmae.data.dataset import printable
from fastmae.data.index import Accepts, publish_index
from fastmae.data.inspect import QUANTILES, Statistics, measure, suggest_range, verify_images
from fastmae.data.processes import in_processes
from fastmae.data.records import source_at
from fastmae.data.shards import ShardOptions, write_shards
from fastmae.data.sources import ShardSource, index_shard
from fastmae.data.storage import as_url
from fastmae.errors import UsageError, usage_errors

EXIT_TOO_MANY_BAD, EXIT_INTERRUPTED = 1, 130
_LISTED = 20
_SECONDS_BETWEEN_LINES = 60.0
"""In the log of a batch job, which cannot show a bar."""
_QUANTILE_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")


def run(command: ShardConfig | IndexConfig | VerifyConfig | StatsConfig) -> int:
    """Run one of the commands; return its exit code."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    commands = {ShardConfig: shard, IndexConfig: index, VerifyConfig: verify, StatsConfig: stats}
    workers = command.images.num_workers
    if workers is not None and workers < 1:
        raise UsageError(f"--num-workers: expected at least 1, got {workers}")
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems send it: as Ctrl-C
    try:
        return commands[type(command)](command, console)
    except DataError as error:  # the data room's errors name flags of ``fastmae pretrain``; here they are shorter
        raise UsageError(str(error).replace("--data.", "--").replace("--model.in-chans", "--channels")) from error
    finally:
        signal.signal(signal.SIGTERM, terminate)


def shard(config: ShardConfig, console: Console) -> int:
    """``fastmae data shard``."""
    if url := as_url(config.out):
        raise UsageError(f"OUT: expected a folder of a mounted file system, got {url}; write to a disk, then copy")
    if config.path.is_dir() and config.out.resolve().is_relative_to(config.path.resolve()):
        raise UsageError(f"OUT: expected a folder outside of {config.path}, got {config.out}")
    number, _, count = config.part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--part: expected i/n with 1 <= i <= n, such as 2/4, got {config.part}")
    part, workers = (int(number), int(count)), config.images.num_workers
    with usage_errors():
        options = ShardOptions(**{field.name: getattr(config, field.name) for field in fields(ShardOptions)})
    dataset = _open(config.path, config.images, config.max_bad_fraction)
    try:
        total = (len(dataset) - len(dataset.bad_ids)) // part[1]
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
        console.print(f"Part {config.part} is complete; {packed.missing:,} shards of other parts are still missing")
    elif packed.bad:
        console.print(f"{packed.bad:,} left out: {packed.folder / 'bad_files.jsonl'}")
    return 0


def index(config: IndexConfig, console: Console) -> int:
    """``fastmae data index``."""
    images, path, workers = config.images, config.path.expanduser(), config.images.num_workers
    try:
        with usage_errors():
            accepts = Accepts(images.channels, images.value_range, images.max_pixels, images.channels_first)
            with _progress("Listing", None) as advance:
                source = source_at(path, workers, advance)
            if isinstance(source, ShardSource) and source.is_local:
                paths, written = source.places, 0
                with _progress("Indexing shards", len(paths)) as advance:
                    for new in in_processes(index_shard, paths, workers, alone=1):
                        written += new
                        advance(1)
                there = f"{len(paths) - written:,} were there"
                console.print(f"{written:,} indexes written beside {len(paths):,} shards, {there}")
            with _progress("Reading headers", len(source)) as advance:
                options = {"home": images.index and images.index.expanduser(), "workers": workers, "progress": advance}
                published = publish_index(source, path, accepts, verify=True, **options)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command continues from there", style="bold")
        raise
    dataset = _open(path, replace(images, index=published.folder))
    console.print(
        f"{len(dataset):,} images, {len(dataset.bad_ids):,} of them unusable, {len(dataset.classes):,} named classes\n"
        f"Hash:  {dataset.hash}\nIndex: {published.folder or 'not cached'}"
    )
    return 0


def verify(config: VerifyConfig, console: Console) -> int:
    """``fastmae data verify``."""
    dataset = _open(config.path, config.images)
    if not 0 <= config.start < len(dataset):
        raise UsageError(f"--start: expected a number from 0 to {len(dataset) - 1}, got {config.start}")
    known, found, damaged, checked, next_id = len(dataset.bad_ids), {}, {}, 0, config.start
    total = len(dataset) - config.start - int((dataset.bad_ids >= config.start).sum())
    interrupted, stored = False, dataset.index.keeps_verdicts
    with usage_errors():
        file = open(config.out or os.devnull, "w")  # noqa: PTH123, SIM115

    def note(path: str, reason: str, bad: bool = True) -> None:
        print(json.dumps({"path": path, "bad": bad, "reason": reason}), file=file, flush=True)

    with file:
        for bad in dataset.bad:
            note(*bad)
        try:
            with decoder_warnings() as take_warnings, _progress("Decoding", total) as advance:
                options = {"num_threads": config.images.num_workers, "take_warnings": take_warnings}
                for verdict in verify_images(dataset, start=config.start, **options):
                    checked, next_id = checked + 1, verdict.sample_id + 1
                    if reason := verdict.reason or verdict.warning:
                        is_bad = config.strict or verdict.reason is not None
                        (found if is_bad else damaged)[verdict.sample_id] = reason
                        note(dataset.path(verdict.sample_id), reason, is_bad)
                    advance(1)
        except KeyboardInterrupt:
            interrupted = True
        finally:  # however the verification ends, the index keeps its verdicts
            dataset.mark_bad(found)
    for title, reasons in (("", found), ("decode in spite of damage; --strict counts them as bad:", damaged)):
        if title and reasons:
            console.print(f"Images that {title}")
        for sample_id, reason in islice(reasons.items(), _LISTED):
            console.print(f"{printable(dataset.path(sample_id))}: {printable(reason)}")
        if len(reasons) > _LISTED:
            console.print(f"and {len(reasons) - _LISTED:,} more")
    bad = known + len(found)
    console.print(
        f"{checked:,} of {total:,} images decoded, {len(found):,} of them bad; "
        f"{known:,} were known to be bad. Bad together: {bad / len(dataset):.3%}"
    )
    if found:
        where = f"Remembered in {dataset.index.folder}"
        console.print(where if stored else "Not remembered, since the index cannot be written")
    if interrupted:
        console.print(f"Interrupted before the end; continue with --start {next_id}", style="bold")
        return EXIT_INTERRUPTED
    return EXIT_TOO_MANY_BAD if bad > config.max_bad_fraction * len(dataset) else 0


def stats(config: StatsConfig, console: Console) -> int:
    """``fastmae data stats``."""
    drawn = {"sample": config.sample, "seed": config.seed, "num_threads": config.images.num_workers}
    dataset = _open_with_range(config.path, config.images, drawn)
    sampled = min(config.sample, len(dataset) - len(dataset.bad_ids))
    with usage_errors({"sample": "--sample"}), _counted_warnings(), _progress("Decoding a sample", sampled) as advance:
        statistics = measure(dataset, progress=advance, **drawn)
    flags = pretrain_flags(statistics, dataset)
    if config.json:
        values = {"path": str(dataset.root), "hash": dataset.hash, **asdict(statistics)}
        console.print(json.dumps(values | {"quantiles_at": QUANTILES, "pretrain_flags": flags}, indent=1))
        return 0
    _print_statistics(statistics, printable(dataset.name), console)
    if flags:
        console.print(f"For fastmae pretrain:\n{flags}")
    if dataset.value_range is not None and config.images.value_range is None:
        console.print(
            "The value range holds 99.8 % of each channel's values in a sample; give another with --value-range."
        )
    return 0


def _open_with_range(path: Path, images: ImagesConfig, drawn: dict[str, int | None]) -> Dataset:
    """The data set, with a suggested value range if most images need one and none is given."""
    try:
        dataset = _open(path, images)
        need = sum("--data.value-range" in reason for reason in dataset.index.bad.values())
        if images.value_range is not None or (2 * need < len(dataset) and not dataset.index.modes <= {"I", "I;16"}):
            return dataset
    except DataError as error:
        if "--data.value-range" not in str(error):
            raise
    dataset = _open(path, replace(images, value_range=(0.0, 1.0)))  # any range, since its values are not used
    return _open(path, replace(images, value_range=suggest_range(dataset, **drawn) or None))


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


def _print_statistics(found: Statistics, name: str, console: Console) -> None:
    def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)

    console.print(
        f"{name}: {found.images:,} images, {found.bytes / 1e6:,.1f} MB, {sum(found.bad.values()):,} unusable; "
        f"{found.labelled:,} labelled; {found.rotated:,} turned or mirrored by EXIF\n"
    )
    digits = {"megapixels": 2}
    quantiles = ((name, *(f"{v:,.{digits.get(name, 0)}f}" for v in values)) for name, values in found.quantiles.items())
    print_table(["", *_QUANTILE_NAMES], quantiles)
    for title, counts in (("Format", found.formats), ("Mode", found.modes), ("Unusable", found.bad)):
        if counts:
            print_table([title, "images"], ((printable(name), f"{count:,}") for name, count in counts.items()))
    if found.sampled:
        values = zip(found.mean, found.std, found.std_within, strict=True)
        rows = ((str(channel), *(f"{v:.4f}" for v in three)) for channel, three in enumerate(values))
        print_table(["Channel", "mean", "std", "std within"], rows)
        console.print(
            f"In [0, 1], of {found.sampled:,} images, each weighing the same. std: over the pixels of all images; "
            "within: the mean of each image's own, which is what ImageNet's usual 0.229 0.224 0.225 are.\n"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share


def _open(path: Path, images: ImagesConfig, max_bad_fraction: float = 1.0) -> Dataset:
    options = {name: value for name, value in vars(images).items() if name != "num_workers"}
    with usage_errors():
        return open_dataset(path, max_bad_fraction=max_bad_fraction, **options)


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, or lines in a log; the yielded function advances it by a number of images."""
    console, said = Console(stderr=True), time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        number = bar.add_task(title, total=total)
        [task] = bar.tasks

        def advance(images: int, _bytes: int = 0) -> None:
            nonlocal said
            bar.advance(number, images)
            if not console.is_terminal and time.monotonic() >= said + _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                of = "" if total is None else f" of {total:,}"
                print(f"{title}: {task.completed:,}{of}", file=sys.stderr)

        yield advance


@contextmanager
def decoder_warnings() -> Iterator[Callable[[], list[str]]]:
    """Collect what C libraries write to stderr; the yielded function returns the lines since its last call.

    libjpeg reports damage that it can decode around only there, without the file's name. What Python writes still goes
    to stderr. Only one thread at a time may use this. If an exception leaves the context, lines that were not taken are
    printed.
    """
    real = os.dup(2)
    sys.stderr.flush()
    try:
        is_real = sys.stderr.fileno() == 2
    except (OSError, AttributeError):  # not a file, as in a notebook
        is_real = False
    with tempfile.TemporaryFile() as file, open(real, "w", buffering=1, errors="backslashreplace") as stderr:  # noqa: PTH123
        at = 0

        def take() -> list[str]:
            nonlocal at
            text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size - at, at)
            at += len(text)
            return text.decode(errors="replace").splitlines()

        os.dup2(file.fileno(), 2)
        try:
            with redirect_stderr(stderr) if is_real else nullcontext():
                yield take
        except BaseException:
            stderr.writelines(f"{line}\n" for line in take())
            raise
        finally:
            os.dup2(real, 2)


@contextmanager
def _counted_warnings() -> Iterator[None]:
    """Count decoders' warnings, which name no file, instead of letting them break the progress bar."""
    with decoder_warnings() as take_warnings:
        yield
        count = len(take_warnings())
    if count:
        print(f"Decoders warned {count:,} times of damage; fastmae data verify names the files", file=sys.stderr)
