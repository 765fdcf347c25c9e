"""``fastmae ablate`` runs a table of variants; ``fastmae fit-target`` fits what some of them predict."""

from __future__ import annotations

import csv
import json
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastmae.cli.commands import AblateConfig, FitTargetConfig
from fastmae.cli.output import replacing
from fastmae.data import create_loader, open_dataset
from fastmae.errors import UsageError, usage_errors
from fastmae.model import create_model
from fastmae.train.config import flatten
from fastmae.train.liveness import EXIT_PREEMPTED
from fastmae.train.run_folder import replace_text
from fastmae.train.targets import fit_codebook, fit_pca, patches_of, save_target

_COLUMNS = ("variant", "seed", "protocol", "features", "top1", "loss", "seconds", "images_per_second", "run")
_TRAINING = ("finetune", "partial", "scratch")
"""Protocols of ``fastmae evaluate`` that are runs: each has a folder inside that of the pretraining."""


def ablate(config: AblateConfig) -> int:
    """Run what is missing, then write the table.

    Raises:
        UsageError: the specification does not fit, a command failed, or a result in ``--out`` has other flags.
    """
    spec, rows = _read(config.spec), []
    command = shlex.split(spec.get("command", "")) or [sys.executable, "-m", "fastmae"]
    varied = list(dict.fromkeys(flag for changes in spec["variants"].values() for flag in flatten(changes)))
    for name, changes in spec["variants"].items():
        for seed in spec.get("seeds", [0]):
            run = config.out / f"{_slug(name)}-seed{seed}"
            flags = flatten(spec["pretrain"]) | flatten(changes) | {"train.seed": seed}
            if code := _pretrain(command, run, flags, name):
                return code
            summary = json.loads((run / "summary.json").read_text())
            known = {"variant": name, "seed": seed, "run": run.name, "loss": summary["last_loss"]}
            known |= {key: summary[key] for key in ("seconds", "images_per_second")}
            defaults = flatten(json.loads((run / "config.json").read_text()))
            known |= {f"--{flag}": flags.get(flag, defaults.get(flag.replace("-", "_"))) for flag in varied}
            for protocol, options in spec.get("evaluate", {}).items():
                common = {"data.path": flags.get("data.path")}
                if protocol in _TRAINING:
                    common["train.seed"] = seed
                if code := _evaluate(command, run, protocol, common | flatten(options), name):
                    return code
                found = json.loads((run / f"{protocol}.json").read_text())
                rows.append(known | {key: found[key] for key in ("protocol", "features", "top1")})
            if not spec.get("evaluate"):
                rows.append(known)
            _write(config.out, rows, [*_COLUMNS, *(f"--{flag}" for flag in varied)])
    print(_table(rows))
    return 0


def fit_target(config: FitTargetConfig) -> int:
    """Fit a target on patches of random crops.

    Raises:
        UsageError: too few images, or values that do not fit.
    """
    with usage_errors():
        names = ("img_size", "patch_size", "in_chans", "mean", "std")
        model = create_model("mae_vit_tiny_patch16", depth=1, **{name: getattr(config, name) for name in names})
        dataset = open_dataset(config.path, channels=config.in_chans)
        batch_size = min(256, config.images, len(dataset))
        options = {"batch_size": batch_size, "img_size": model.img_size, "seed": config.seed}
        ids = torch.arange(model.num_patches).expand(batch_size, -1)
        with create_loader(dataset, **options) as loader:
            batches = islice(loader, -(-config.images // batch_size))
            patches = (patches_of(model, batch.images, ids).flatten(0, 1) for batch in batches)
            if config.kind == "pca":
                target, share = fit_pca(patches, config.size)
                about = f"{config.size} coefficients with {share:.2%} of the variance"
            else:
                target, about = fit_codebook(patches, config.size, config.seed), f"{config.size} tokens"
    save_target(target, config.out)
    print(f"{about}: {config.out}; use it with --model.target {config.out}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"SPEC.toml: expected a TOML file, got {path}: {error}") from error
    known = {"command", "seeds", "pretrain", "variants", "evaluate"}
    if unknown := sorted(spec.keys() - known):
        raise UsageError(f"{path}: expected {', '.join(sorted(known))}, got {unknown[0]}")
    tables = [spec.get("variants", {}), spec.get("evaluate", {})]
    if not spec.get("variants") or not all(isinstance(v, dict) for table in tables for v in table.values()):
        raise UsageError(f"{path}: expected a table of flags for each entry of [variants] and [evaluate]")
    if len({_slug(name) for name in spec["variants"]}) < len(spec["variants"]):
        raise UsageError(f"{path}: expected variants that differ in letters or digits, got {list(spec['variants'])}")
    return {"pretrain": {}} | spec


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags as words of a command line."""
    for name, value in flags.items():
        if isinstance(value, bool):
            section, _, last = name.rpartition(".")
            yield f"--{section}{'.' if section else ''}{'' if value else 'no-'}{last}"
        elif value is not None:
            yield f"--{name}"
            yield from map(str, value if isinstance(value, list) else [value])


def _pretrain(command: list[str], run: Path, flags: dict[str, Any], variant: str) -> int:
    """Pretrain or resume a run; nothing to do if it has finished."""
    asked, status = run.with_name(f"{run.name}.flags.json"), run / "status.json"
    if asked.exists() and (was := json.loads(asked.read_text())) != flags:
        differ = next(name for name in {**was, **flags} if was.get(name) != flags.get(name))
        raise UsageError(
            f"variant {variant}: {run} was run with --{differ} {was.get(differ)}, the specification says "
            f"{flags.get(differ)}; delete {asked} and the folder, or choose another --out"
        )
    if status.exists() and json.loads(status.read_text())["status"] == "finished":
        return 0
    run.parent.mkdir(parents=True, exist_ok=True)
    replace_text(asked, json.dumps(flags))
    resume = ["--resume"] if (run / "config.json").exists() else []
    return _call([*command, "pretrain", *_words(flags), "--out", str(run), *resume], variant)


def _evaluate(command: list[str], run: Path, protocol: str, flags: dict[str, Any], variant: str) -> int:
    """Write the result of a protocol beside the weights; nothing to do if it is there."""
    result, options = run / f"{protocol}.json", list(_words(flags))
    if result.exists():
        was = json.loads(result.read_text())["command"]
        if shlex.join(options) not in was:
            raise UsageError(
                f"variant {variant}: {result} was written by {was}, the specification says {shlex.join(options)}; "
                f"delete it, or choose another --out"
            )
        return 0
    words = ["evaluate", protocol, *([] if protocol == "scratch" else [str(run)])]
    if protocol in _TRAINING:
        folder = run / protocol
        words += ["--run-folder", str(folder), *(["--resume"] if (folder / "config.json").exists() else [])]
    return _call([*command, *words, *options, "--out", str(result)], variant)


def _call(words: list[str], variant: str) -> int:
    """Run a command and return 0, or ``EXIT_PREEMPTED`` if it was stopped and can resume."""
    print(f"\n[{variant}] {shlex.join(words)}", flush=True)
    code = subprocess.run(words).returncode
    if code not in (0, EXIT_PREEMPTED):
        raise UsageError(f"variant {variant}: exit code {code} of {shlex.join(words)}")
    return code


def _write(out: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    with replacing(out / "results.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    replace_text(out / "table.md", _table(rows) + "\n")


def _table(rows: list[dict[str, Any]]) -> str:
    """A row per variant: means over seeds, with the standard deviation of several."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows if "protocol" in row))
    lines = [["variant", *(f"{name} (top-1, %)" for name in protocols), "last loss", "pretraining (s)"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = [[100 * row["top1"] for row in own if row.get("protocol") == name] for name in protocols]
        first = list({row["seed"]: row for row in own}.values())
        cells += [[row[key] for row in first] for key in ("loss", "seconds")]
        lines.append([variant, *map(_cell, cells, ["{:.1f}"] * len(protocols) + ["{:.4f}", "{:.0f}"])])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[float], form: str) -> str:
    if not values:
        return "-"
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread
