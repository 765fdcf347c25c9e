"""What fastmae finds on this machine and what it will use: the text of ``fastmae env``, made for a bug report.

Finding a broken library is a line of the report, never an exception. Libraries that warn or are slow to import are
asked in a process of their own, or only for their version.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

import fastmae

_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
_PACKAGES = (
    *("torchvision", "triton", "numpy", "pillow", "safetensors", "tyro", "scikit-image"),
    *(*_DALI, "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
    *("xformers", "timm", "transformers", "wandb"),
)
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
    """Versions, devices, the path of the kernels on each device, attention backends, optimizers, loaders, decoders."""
    text = []
    for section in (_versions, _devices, _kernels, _attention, _optimizers, _data):
        rows = section()
        width = max(len(name) for name, _ in rows) + 2
        lines = (f"  {name:<{width}}{value}".rstrip() for name, value in rows)
        text.append("\n".join([section.__name__.strip("_").capitalize(), *lines]))
    return "\n\n".join(text)


def _versions() -> list[tuple[str, str]]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    rows = [
        ("fastmae", f"{fastmae.__version__} ({Path(fastmae.__file__).parent})"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for {build}"),
    ]
    found = {package: _version(package) for package in _PACKAGES}
    rows += [(package, number) for package, number in found.items() if number]
    missing = [package for package in ("triton", "xformers", "timm", "transformers") if not found[package]]
    return [*rows, ("not installed", ", ".join(missing))] if missing else rows


def _devices() -> list[tuple[str, str]]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = (
        f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {memory:.0f} GiB, {usable} of {os.cpu_count()} "
        f"logical cores usable, torch uses {torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        why = "torch finds no device or driver" if torch.version.cuda or torch.version.hip else "torch has no CUDA"
        return [("cpu", cpu), ("cuda", f"none: {why}")]
    rows = [("cpu", cpu)]
    for index, device in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))):
        capability = f"compute capability {device.major}.{device.minor}, {device.multi_processor_count} multiprocessors"
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, {capability}"))
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
    try:
        rows = [*import_module("fastmae.ops.attention").describe_backends()]
    except Exception as error:
        rows = [("fastmae.ops", f"does not import: {_brief(error)}")]
    return rows + ([("xformers itself", _ask(_XFORMERS_PROBE))] if find_spec("xformers") else [])


def _optimizers() -> list[tuple[str, str]]:
    rows = [("torch.optim.AdamW", "fused, the default")]
    apex = _ask(_APEX_PROBE) if find_spec("apex") else "not installed"
    if apex == "loads":
        return [*rows, ("apex FusedAdam", "found")]
    return [*rows, ("apex FusedAdam", f"{apex}; optional"), ("", _APEX_HOW)]


def _data() -> list[tuple[str, str]]:
    dali = next((f"{package} {_version(package)}" for package in _DALI if _version(package)), None)
    if dali and not torch.cuda.is_available():
        dali += ", on the CPU"
    missing = 'not installed: pip install "fastmae[dali-cuda13]" (or dali-cuda12)'
    return [("loader dali", dali or missing), ("loader torch", _torchvision_decoders())]


def _torchvision_decoders() -> str:
    """Which formats torchvision decodes, found by decoding one image of each."""
    found = []
    for name in ("JPEG", "PNG", "WEBP"):
        try:
            from torchvision.io import decode_image

            buffer = BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, name)
            decode_image(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
            found.append(name)
        except Exception as error:
            found.append(f"not {name} ({_brief(error)})")
    return f"torchvision.io decodes {', '.join(found)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ask(code: str) -> str:
    """The last line that some code prints, run on its own so that its warnings, crashes and globals stay there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer: {_brief(error)}"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[-1]
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return f"does not load ({last[0][:160]})"


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:160]}"
