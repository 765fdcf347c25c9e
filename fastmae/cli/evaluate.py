"""``fastmae evaluate``, ``features`` and ``inspect``: what weights are, and how good their representation is."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

import fastmae
from fastmae.cli.commands import (
    AttentiveConfig,
    EncodingConfig,
    FeaturesConfig,
    InspectConfig,
    KnnConfig,
    LabelledConfig,
    LinearConfig,
    ProbeConfig,
    RobustnessConfig,
)
from fastmae.cli.output import replacing
from fastmae.data import Augment, Dataset, create_loader, open_dataset, open_once
from fastmae.data.loader import physical_bytes
from fastmae.data.sampler import batch_positions
from fastmae.data.subset import subset
from fastmae.errors import UsageError, usage_errors
from fastmae.evaluate.attentive import evaluate_attentive
from fastmae.evaluate.features import ImageFeatures, encode_images, extract_features, pool_tokens, to_device
from fastmae.evaluate.frozen import Split, accuracies, split_of
from fastmae.evaluate.knn import evaluate_knn
from fastmae.evaluate.labelled import LabelledImages, choose_labelled, hold_out, match_classes, number_labels
from fastmae.evaluate.linear import evaluate_logistic, fit_linear_probe
from fastmae.evaluate.robustness import (
    classify,
    corruption_folders,
    mean_corruption_error,
    number_classes,
    read_class_names,
    read_reference,
)
from fastmae.loading import WeightsInfo, load
from fastmae.train.launcher import place
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import read_json

_VERSIONS = ("torch", "torchvision", "timm", "numpy")


def run(command: InspectConfig | FeaturesConfig | ProbeConfig | RobustnessConfig) -> int:
    """Run one of the commands; return its exit code."""
    if isinstance(command, InspectConfig):
        return inspect(command)
    with usage_errors():
        if isinstance(command, FeaturesConfig):
            return features(command)
        if place()[0] > 0:  # of the processes that torchrun started, the first one does all
            return 0
        return robustness(command) if isinstance(command, RobustnessConfig) else evaluate(command)


# ---------------------------------------------------------------------------------------------------------------------
# fastmae inspect


def inspect(config: InspectConfig) -> int:
    """Print what is known of weights."""
    model, info = load(config.weights, return_info=True)
    found = describe(info)
    found["parameters"] = sum(p.numel() for n, p in model.named_parameters() if info.has_decoder or "decoder" not in n)
    if config.json:
        print(json.dumps(found, indent=1))
        return 0
    width = max(map(len, found)) + 2
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def describe(info: WeightsInfo) -> dict[str, Any]:
    """What is known of weights, JSON-able."""
    size = info.architecture
    uses = ["features", "evaluate", "create_classifier", "convert"]
    outputs = size.get("num_outputs")
    uses += ["reconstruct", "init-from"] if info.has_decoder and not outputs else []
    target = {True: "normalised pixels", False: "pixels", None: "unknown"}[info.norm_pix_loss]
    target = f"{outputs} values per patch" if outputs else target
    return {
        "path": str(info.path),
        "source": info.source,
        "encoder": f"{size['depth']} blocks of {size['embed_dim']}, {size['num_heads']} heads",
        "decoder": f"{size['decoder_depth']} blocks of {size['decoder_embed_dim']}" if info.has_decoder else "none",
        "head": f"{info.num_classes} classes, pool {size['pool']}" if info.num_classes else "none",
        "image_size": size["img_size"],
        "patch_size": size["patch_size"],
        "channels": size["in_chans"],
        "mean": size.get("mean") or "unknown (ImageNet's are used)",
        "std": size.get("std") or "unknown (ImageNet's are used)",
        "predicts": target if info.has_decoder else "nothing",
        "steps": "unknown" if info.step is None else info.step,
        "assumed": list(info.assumed) or "nothing",
        "usable_for": uses,
    }


# ---------------------------------------------------------------------------------------------------------------------
# fastmae features


def features(config: FeaturesConfig) -> int:
    """Write features of images to a file."""
    if config.out.suffix not in (".npy", ".parquet"):
        raise UsageError(f"OUT: expected a .npy or .parquet file, got {config.out}")
    if config.out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise UsageError(f"OUT: {config.out} needs pyarrow: pip install pyarrow") from error
    with _processes() as ranks:
        model, info, options = _encoder(config.weights, config.encoding)
        dataset = open_once(partial(_open, config.path, info), partial(ranks.first_in_hours, "opening the images"))
        begun, own = time.monotonic(), []
        options |= {"pool": config.pool, "rank": ranks.rank, "world_size": ranks.size}
        if ranks.rank == 0:
            options["on_batch"] = _bar("Encoding", -(-len(dataset) // ranks.size), options)
        ranks.gather("encoding images", lambda: own.append(extract_features(model, dataset, **options)))
        seconds = time.monotonic() - begun
        if found := _joined(own[0], ranks):
            _write_features(config.out, found, dataset.labels(found.ids))
            lost = len(dataset) - len(found.ids)
            print(
                f"{len(found.ids):,} features of {found.features.shape[1]} numbers in {config.out}, "
                f"{len(dataset) / seconds:,.1f} images/s" + (f"; {lost:,} images could not be read" if lost else "")
            )
    return 0


@contextmanager
def _processes() -> Iterator[Ranks]:
    """The processes that torchrun started, on a group that waits a day for the slowest; or this one alone."""
    day, several = timedelta(days=1), place()[1] > 1
    owns_group = several and not dist.is_initialized()
    if owns_group:
        dist.init_process_group("gloo", timeout=day)
    try:
        with Ranks.create(day.total_seconds()) as ranks:
            yield ranks
    finally:
        if owns_group:
            dist.destroy_process_group()


def _joined(own: ImageFeatures, ranks: Ranks) -> ImageFeatures | None:
    """The features of all ranks on rank 0, in the order of the images; None on the others."""
    if ranks.size == 1:
        return own
    parts: Any = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(own, parts, group=ranks.group, group_dst=0)
    if parts is None:
        return None
    ids = np.concatenate([part.ids for part in parts])
    order, paths = np.argsort(ids), [path for part in parts for path in part.paths]
    features = np.concatenate([part.features for part in parts])[order]
    return ImageFeatures(ids[order], [paths[i] for i in order.tolist()], features)


def _write_features(out: Path, found: ImageFeatures, labels: np.ndarray) -> None:
    if out.suffix == ".npy":
        with replacing(out) as partial_file, replacing(out.with_suffix(".paths.txt")) as partial_paths:
            with partial_file.open("wb") as file:
                np.save(file, found.features)
            partial_paths.write_text("".join(f"{path}\n" for path in found.paths))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = pa.FixedSizeListArray.from_arrays(pa.array(found.features.ravel()), found.features.shape[1])
    with replacing(out) as partial_file:
        pq.write_table(pa.table({"path": found.paths, "label": labels, "feature": features}), partial_file)


# ---------------------------------------------------------------------------------------------------------------------
# fastmae evaluate


def evaluate(config: ProbeConfig) -> int:
    """Run a protocol on a frozen encoder, print its figures, and write them where ``--out`` says."""
    begun = time.monotonic()
    model, info, options = _encoder(config.weights, config.encoding)
    known, tests = labelled_images(config.data, info)
    if isinstance(config, KnnConfig):
        split = _cached(model, known, tests, config.pool, options)
        result = {"protocol": "knn", "features": config.pool}
        result |= evaluate_knn(split, k=config.k, temperature=config.temperature, seed=config.seed)
    elif isinstance(config, AttentiveConfig):
        rows, width = math.prod(model.grid_size), model.pos_embed.shape[-1]
        cached = 2 * rows * width * (len(known.labels) + len(tests.labels))  # float16
        if 2 * cached > physical_bytes():  # twice while the batches are put together
            raise UsageError(
                f"--data.limit: the patch tokens of all images take {cached / 1e9:,.0f} GB, for which "
                f"{physical_bytes() / 1e9:,.0f} GB of memory are too little; expected fewer images"
            )
        split = _cached(model, known, tests, "tokens", options)
        result = {"protocol": "attentive", "features": "patch tokens"}
        result |= evaluate_attentive(
            split, lr=config.lr, epochs=config.epochs, num_queries=config.queries, seed=config.seed
        )
    elif config.solver == "logistic":
        split = _cached(model, known, tests, config.pool, options)
        result = {"protocol": "linear", "solver": "logistic", "features": config.pool}
        result |= evaluate_logistic(split, l2=config.l2, seed=config.seed)
    else:
        result = {"protocol": "linear", "solver": config.solver, "features": config.pool}
        result |= _trained_linear(config, model, known, tests, options)
    report(result, config, len(known.labels), len(tests.labels), time.monotonic() - begun)
    return 0


def report(result: dict[str, Any], config: Any, train_images: int, val_images: int, seconds: float) -> None:
    """Print a result, and write it where ``--out`` says."""
    result |= {"train_images": train_images, "val_images": val_images}
    settings = [f"{name} {value:g}" for name, value in result.items() if name in ("k", "temperature", "l2", "lr")]
    top5 = f", top-5 {result['top5']:.2%}" if "top5" in result else ""
    print(
        f"{result['protocol']} on {result['features']}: top-1 {result['top1']:.2%}{top5} of {val_images:,} images, "
        f"learned from {train_images:,}" + (f" ({', '.join(settings)})" if settings else "")
    )
    write_result(result, config, seconds)


def write_result(result: dict[str, Any], config: Any, seconds: float) -> None:
    """Write a result as one JSON object where ``--out`` says, with what it was made by."""
    result |= {"seconds": round(seconds, 1), "weights": str(config.weights)}
    result |= {"command": shlex.join(["fastmae", *sys.argv[1:]]), "versions": {"fastmae": fastmae.__version__}}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            result["versions"][name] = version(name)
    if config.out is not None:
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# fastmae evaluate robustness


def class_names(config: RobustnessConfig, info: WeightsInfo) -> list[str]:
    """The names of the outputs: from ``--classes``, a finished run's summary, or the folder that it was trained on."""
    if config.classes is not None:
        return read_class_names(config.classes)
    summary = read_json(config.weights / "summary.json") or {}
    if "classes" in summary:
        return summary["classes"]
    trained = info.config.get("data", {}).get("path")
    if not trained or not Path(trained).is_dir():
        raise UsageError("--classes: expected a file of names or the training folder, since the weights do not say")
    return read_class_names(Path(trained))


def robustness(config: RobustnessConfig) -> int:
    """Print and write a classifier's accuracy on each folder, and its error under each corruption."""
    begun = time.monotonic()
    if not config.images and config.corruptions is None:
        raise UsageError("--images: expected folders of images, or --corruptions, got neither")
    if config.reference is not None and config.corruptions is None:
        raise UsageError("--reference: expected --corruptions with it, got none")
    severities = corruption_folders(config.corruptions) if config.corruptions else {}
    reference = read_reference(config.reference, list(severities)) if config.reference else None
    model, info, options = _encoder(config.weights, config.encoding)
    if not info.num_classes:
        raise UsageError(f"WEIGHTS: expected a classifier, got {config.weights}, which has no head; fine-tune it first")
    names = class_names(config, info)
    if len(names) != info.num_classes:
        raise UsageError(f"--classes: expected {info.num_classes} names, one per output, got {len(names)}")

    def accuracy(folder: Path, **changed: Any) -> dict[str, Any]:
        images = number_classes(choose_labelled(_open(folder, info), sys.maxsize // 8), names)
        advance = _bar(f"Classifying {folder}", len(images.labels), options)
        return classify(model, images, **options | changed, on_batch=advance)

    result: dict[str, Any] = {"protocol": "robustness", "sets": {}, "corruptions": {}}
    for folder in config.images:
        found = result["sets"][str(folder)] = accuracy(folder)
        among = f"; {found['top1_all_classes']:.2%} among all {info.num_classes}"
        print(f"{folder}: top-1 {found['top1']:.2%} of {found['images']:,} images, {found['classes']} classes{among}")
    for name, folders in severities.items():
        errors = [1 - accuracy(folder, crop_ratio=1.0)["top1_all_classes"] for folder in folders]
        result["corruptions"][name] = float(np.mean(errors))
        print(f"{name}: error {result['corruptions'][name]:.2%}, mean of {len(folders)} severities")
    if severities:
        result["mean_error"] = float(np.mean(list(result["corruptions"].values())))
        text = f"mean error {result['mean_error']:.2%} of {len(severities)} corruptions"
        if reference:
            result["mean_corruption_error"] = mean_corruption_error(result["corruptions"], reference)
            text += f", mean corruption error {result['mean_corruption_error']:.1%} of the reference"
        print(text)
    write_result(result, config, time.monotonic() - begun)
    return 0


def labelled_images(config: LabelledConfig, info: WeightsInfo) -> tuple[LabelledImages, LabelledImages]:
    """The images to learn from, and those to test on.

    Raises:
        ValueError: no labels, a single class, or no class in common; names the flag.
    """
    count = config.limit or sys.maxsize // 8
    try:
        images = choose_labelled(_open(config.path, info), count)
        if len(np.unique(images.labels)) < 2:
            raise ValueError(f"expected images of at least two classes in {images.dataset.name}, got one")
        if config.val is None:
            return hold_out(images)
    except ValueError as error:
        raise ValueError(f"--data.path: {error}") from error
    try:
        return images, match_classes(images, choose_labelled(_open(config.val, info), count), strict=True)
    except ValueError as error:
        raise ValueError(f"--data.val: {error}") from error


def _encoder(weights: Path, config: EncodingConfig) -> tuple[nn.Module, WeightsInfo, dict[str, Any]]:
    """The model on its device, what is known of it, and the options of ``extract_features``."""
    model, info = load(weights, return_info=True)
    model = on_device(model, config.device)
    precision = config.precision
    if precision == "auto":  # GPUs without bfloat16 emulate it, slowly
        precision = "bf16" if model.mean.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    options = {"dtype": dtype, "batch_size": config.batch_size, "crop_ratio": config.crop_ratio}
    return model, info, options | {"num_threads": config.num_workers}


def on_device(model: nn.Module, name: str) -> nn.Module:
    """The model on the device that ``--device`` names, a GPU being this process's own from then on: without that, each
    of several processes may take memory of the first GPU too."""
    if name == "auto":
        name = f"cuda:{place()[2] % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        model = model.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        raise UsageError(f"--device: expected a device that is there, got {name}: {error}") from error
    if model.mean.is_cuda:
        torch.cuda.set_device(model.mean.device)
    return model


def _open(path: Path, info: WeightsInfo, index: Path | None = None) -> Dataset:
    """Images, read as those that the model was trained on."""
    trained = info.config.get("data", {})
    reading = {name: trained[name] for name in ("value_range", "channels_first") if trained.get(name)}
    return open_dataset(path, channels=info.architecture["in_chans"], max_bad_fraction=1.0, index=index, **reading)


def _bar(title: str, images: int, options: dict[str, Any]) -> Any:
    """A function that advances a progress bar on stderr by a batch."""
    batches = -(-images // min(options["batch_size"], images))
    bar = iter(track(range(batches), title, console=_stderr(), transient=True))
    return partial(next, bar, None)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _cached(
    model: nn.Module, known: LabelledImages, tests: LabelledImages, kind: str, options: dict[str, Any]
) -> Split:
    """Features, or patch tokens in float16, of all images."""
    found = []
    for title, images in (("Encoding images to learn from", known), ("Encoding images to test on", tests)):
        advance = _bar(title, len(images.labels), options)

        def reduce(tokens: Tensor) -> Tensor:
            return (
                tokens[:, model.num_prefix_tokens :].half().cpu()
                if kind == "tokens"
                else pool_tokens(model, tokens, kind)
            )

        rows = encode_images(model, images.dataset, images.sample_ids, reduce, **options, on_batch=advance)
        found += [rows[0], images.labels, rows[1]]
    return split_of(*found)


def _trained_linear(
    config: LinearConfig, model: nn.Module, known: LabelledImages, tests: LabelledImages, options: dict[str, Any]
) -> dict[str, Any]:
    """Table 10: a head trained on random crops."""
    device, batch_size, dtype = model.mean.device, config.encoding.batch_size, options["dtype"]
    classes, numbers = np.unique(known.labels, return_inverse=True)
    dataset = subset(known.dataset, known.sample_ids)  # neither unlabelled images nor those held out to test
    loader = {"batch_size": batch_size, "img_size": model.img_size, "seed": config.seed, "device": device}
    loader |= {"augment": Augment(scale=(0.08, 1.0)), "num_threads": options["num_threads"]}

    def crops() -> Iterator[tuple[Tensor, Tensor]]:
        order = dataset.order(config.seed)
        with create_loader(dataset, **loader) as batches:
            for number, batch in enumerate(batches):
                # What the loader brings, known on the host: asking the batch would wait for the device.
                ids, _ = order.ids(batch_positions(number, batch_size=batch_size))
                with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
                    tokens = model.encode(model.normalized(batch.images)).float()
                    pooled = pool_tokens(model, tokens, config.pool)
                yield pooled, to_device(numbers[ids], device)

    torch.manual_seed(config.seed)
    settings = {"epochs": config.epochs, "warmup_epochs": config.warmup_epochs, "base_lr": config.base_lr}
    images = len(known.labels)
    advance = _bar("Training the head", images * config.epochs, options)
    source = crops()
    head = fit_linear_probe(
        source, model.pos_embed.shape[-1], len(classes), images=images, device=device, optimizer=config.solver,
        on_batch=lambda loss: advance(), **settings,
    )  # fmt: skip
    source.close()
    pool = partial(pool_tokens, model, pool=config.pool)
    features, readable = encode_images(model, tests.dataset, tests.sample_ids, pool, **options)
    labels = torch.from_numpy(number_labels(classes, tests.labels)).to(device)[readable]
    split = Split(features[:0], labels[:0], features[readable], labels, len(classes))
    with torch.no_grad():
        return accuracies(head(split.tests), split) | settings
