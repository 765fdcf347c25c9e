"""What fastmae finds on this machine and what it will use: the text of ``fastmae env``, made for a bug report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch

import fastmae

_PACKAGES = (
    "torchvision",
    "triton",
    "numpy",
    "pillow",
    "safetensors",
    "tyro",
    "scikit-image",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvimgcodec-cu13",
    "xformers",
    "timm",
    "transformers",
    "wandb",
)
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_APEX_HOW = (
    "build NVIDIA's apex from its GitHub source with "
    "`APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .` (PyPI's package of that name is another)"
)
_APEX_PROBE = "import amp_C; from apex.optimizers import FusedAdam; print('loads')"
_XFORMERS_PROBE = """
from xformers.ops import fmha
names = [op.NAME for op in fmha.ALL_FW_OPS if op.is_available()]
print('forward operators that load: ' + (', '.join(names) or 'none'))
"""


def report() -> str:
    """Versions, devices, the path of the kernels on each device, attention backends, optimizers, loaders, decoders.

    Takes a few seconds: libraries that warn or are slow to import are asked in a process of their own, or only for
    their version. Finding a broken library is a line of the report, never an exception.
    """
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Kernels": _kernels(),
        "Attention": _attention(),
        "Optimizers": _optimizers(),
        "Data": _data(),
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections.items())


def _table(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"  {name:<{width}}{text}".rstrip() for name, text in rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    if torch.version.hip:
        build = f"for ROCm {torch.version.hip}"
    rows = [
        ("fastmae", f"{fastmae.__version__} ({Path(fastmae.__file__).parent})"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, built {build}"),
    ]
    found = {package: _version(package) for package in _PACKAGES}
    rows += [(package, number) for package, number in found.items() if number]
    missing = [package for package in ("triton", "xformers", "timm", "transformers") if not found[package]]
    return [*rows, ("not installed", ", ".join(missing))] if missing else rows


def _devices() -> list[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    cpu = (
        f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}{memory}, {usable} of {os.cpu_count()} logical "
        f"cores usable, torch uses {torch.get_num_threads()} threads"
    )
    rows = [("cpu", cpu)]
    if not torch.cuda.is_available():
        why = "torch finds no device or driver" if torch.version.cuda or torch.version.hip else "torch has no CUDA"
        return [*rows, ("cuda", f"none: {why}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability "
                f"{device.major}.{device.minor}, {device.multi_processor_count} multiprocessors",
            )
        )
    return rows


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _kernels() -> list[tuple[str, str]]:
    if find_spec("triton") is None:
        return [("all devices", "plain PyTorch: Triton is not installed")]
    try:
        interpreted = import_module("fastmae.ops._dispatch").is_interpreted()
    except Exception as error:
        return [("all devices", f"the Triton kernels do not import: {_brief(error)}")]
    if interpreted:
        return [("all devices", "Triton's interpreter (TRITON_INTERPRET is set): for tests, very slow")]
    rows = [("cpu", "plain PyTorch: Triton kernels run on GPUs")]
    return rows + [(f"cuda:{index}", "Triton") for index in range(torch.cuda.device_count())]


def _attention() -> list[tuple[str, str]]:
    rows = []
    try:
        rows += import_module("fastmae.ops.attention").describe_backends()
    except Exception as error:
        rows.append(("fastmae.ops", f"does not import: {_brief(error)}"))
    if find_spec("xformers") is not None:
        rows.append(("xformers itself", _ask(_XFORMERS_PROBE)))
    return rows


def _optimizers() -> list[tuple[str, str]]:
    apex = _ask(_APEX_PROBE) if find_spec("apex") is not None else "not installed"
    rows = [("torch.optim.AdamW", "fused, the default")]
    if apex == "loads":
        return [*rows, ("apex FusedAdam", "found")]
    return [*rows, ("apex FusedAdam", f"{apex}; optional"), ("", _APEX_HOW)]


def _data() -> list[tuple[str, str]]:
    dali = next((f"{package} {_version(package)}" for package in _DALI if _version(package)), None)
    if dali and not torch.cuda.is_available():
        dali += ", on the CPU"
    return [
        ("loader dali", dali or 'not installed: pip install "fastmae[dali-cuda13]" (or dali-cuda12)'),
        ("loader torch", _torchvision_decoders()),
        ("Pillow", _pillow_decoders()),
    ]


def _torchvision_decoders() -> str:
    """Which formats torchvision decodes, found by decoding one image of each."""
    try:
        from PIL import Image
        from torchvision.io import decode_image
    except Exception as error:
        return f"torchvision does not import: {_brief(error)}"
    formats, errors = [], []
    for name in ("JPEG", "PNG", "WEBP"):
        buffer = BytesIO()
        try:
            Image.new("RGB", (8, 8)).save(buffer, name)
            decode_image(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
            formats.append(name)
        except Exception as error:
            errors.append(f"{name} fails ({_brief(error)})")
    return f"torchvision.io decodes {', '.join([', '.join(formats) or 'nothing', *errors])}"


def _pillow_decoders() -> str:
    from PIL import features

    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    rows = {"jpg": turbo, "zlib": "PNG", "webp": "WebP"}
    return ", ".join(f"{label}{'' if features.check(key) else ' missing'}" for key, label in rows.items())


def _ask(code: str) -> str:
    """The last line that some code prints, run on its own so that its warnings, crashes and globals stay there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be asked: {_brief(error)}"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[-1]
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return f"does not load ({last[0][:160]})"


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
