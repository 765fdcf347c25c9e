"""The most valuable results of one GPU in nine minutes, in an order that makes a cut at any second cheap.

    python benchmarks/gpu.py --out FOLDER             # the first nine minutes
    python benchmarks/gpu.py --out FOLDER --second    # the rest: all GPU tests, levers, ViT-H, compile modes, loaders
    python benchmarks/gpu.py --out FOLDER --dry-run   # every line of it, on the CPU, with tiny shapes

Each stage runs in processes of its own with a time to end, so that a crash, a hang, an import that fails or memory that
is not enough is a line of the results and no more. The processes of a stage import what they need while the one before
it runs. FOLDER gets ``results.jsonl`` (a line for each competitor as soon as it is measured), ``log.txt``, and, after
each stage, ``results.tar.gz`` and ``caches.tar.gz``, both under 16 MB. The first one unpacks into a folder of
``benchmarks/results``; the second holds what Triton and Inductor compiled, for the next run's ``--caches``.

Needs PyTorch and Triton; what else is missing is recorded. No network, no git.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gpu_results import JsonLines, pack_caches, pack_results, read_lines, unpack_caches

ROOT = Path(__file__).resolve().parent.parent
NO_DEVICE = 3
"""Exit code of a stage that finds no GPU."""


@dataclass(frozen=True)
class Stage:
    """A function of ``gpu_stages.py``, or a file of tests.

    Attributes:
        until: seconds from the start at which it is ended, so that it takes no time from those behind it.
        parts: processes that share its work.
        limit: seconds that it may run, if that is earlier.
        compiles: whether the compilers' caches are worth packing after it.
    """

    name: str
    until: float
    parts: int = 1
    limit: float = 600.0
    compiles: bool = False


FIRST = (
    Stage("ceilings", 32, parts=2),  # the environment beside the measurements
    Stage("numerics", 95, parts=12, compiles=True),
    Stage("attention", 125),
    Stage("large", 175),
    Stage("compilation", 290, parts=4, compiles=True),
    Stage("comparison", 350),
    Stage("graph", 395),
    Stage("base", 440),
    Stage("end_to_end", 520),
)
# Those of ops first; what takes most of the memory or compares timings is among them, which is why they run in turn.
_OPS = ("masking", "gather_patches", "gather_tokens", "restore_tokens", "masked_patch_mse", "norm_linear",
        "gelu_linear", "attention", "attention_triton")  # fmt: skip
SECOND_STAGES = (
    Stage("levers", 345),
    Stage("huge", 385),
    Stage("modes", 460, compiles=True),
    Stage("loaders", 500),
    Stage("ops", 525, compiles=True),
)


def gpu_tests() -> list[str]:
    """Files with tests for GPUs, those of the ops first."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    names = [path.relative_to(ROOT).as_posix() for path in marked]
    first = [f"tests/ops/test_{stem}.py" for stem in _OPS]
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def second(dry_run: bool) -> tuple[Stage, ...]:
    files = gpu_tests()[: 1 if dry_run else None]
    return (*(Stage(file, 285, limit=60) for file in files), *SECOND_STAGES)


class Run:
    """One run of a plan.

    Attributes:
        script: what runs a stage.
        out: folder of the results.
        caches: where Triton and Inductor keep what they compiled: always the same folder, since Triton notes absolute
            paths.
    """

    script = ROOT / "benchmarks" / "gpu_stages.py"

    def __init__(self, arguments: argparse.Namespace):
        self.begun = time.monotonic()
        self.out, self.dry_run = arguments.out.resolve(), arguments.dry_run
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = JsonLines(self.out / "results.jsonl", "plan")
        if not arguments.second:  # the second part is added to the first
            self.results.path.unlink(missing_ok=True)
        self.log = (self.out / "log.txt").open("ab" if arguments.second else "wb")
        self.caches = self.out / ".caches" if self.dry_run else Path(tempfile.gettempdir()) / "fastmae-gpu-caches"
        self.paths = [str(ROOT)]
        self.running: list[subprocess.Popen] = []
        self.bad: list[str] = []
        self.packing = threading.Thread()
        if arguments.caches:
            self._try("caches", lambda: unpack_caches(arguments.caches, self.caches))
        if arguments.wheels:
            self._try("wheels", lambda: self._install(arguments.wheels))

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def _try(self, what: str, action: Callable[[], object]) -> None:
        try:
            found = action()
            if found is not None:
                self.results.write("stage", name=what, end="done", found=found)
        except Exception as error:
            self._ended_badly(what, f"{type(error).__name__}: {error}", getattr(error, "stderr", None))

    def _install(self, wheels: Path) -> list[str]:
        """Install a folder's wheels where the stages find them; return their names."""
        files = sorted(wheels.glob("*.whl"))
        if files:
            target = tempfile.mkdtemp(prefix="fastmae-wheels-")
            flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", target]
            command = [sys.executable, "-m", "pip", "install", *flags, *map(str, files)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            self.paths.append(target)
        return [file.name for file in files]

    def _ended_badly(self, name: str, end: str, text: str | None = None) -> None:
        self.bad.append(name)
        self.results.write("stage", name=name, end=end, error=text, seconds=round(self.seconds(), 1))
        print(f"[{self.seconds():5.0f} s] {name}: {end}", flush=True)

    def start(self, stage: Stage) -> list[subprocess.Popen]:
        """The stage's processes, which import all they need and then wait for a line on their standard input."""
        parts = 1 if self.dry_run else stage.parts
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*self.paths, os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
        }
        command = [sys.executable, str(self.script), stage.name, str(self.out)]
        command += ["--parts", str(parts), *(["--dry-run"] if self.dry_run else [])]
        # A session of its own: what it starts itself (compilers, loaders) is ended with it.
        started = [
            subprocess.Popen(
                [*command, "--part", str(part)], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=self.log,
                stderr=self.log, start_new_session=True,
            )
            for part in range(parts)
        ]  # fmt: skip
        self.running += started
        return started

    def finish(self, stage: Stage, processes: list[subprocess.Popen]) -> None:
        """Let the waiting processes run, to their end or to their time."""
        log, begun = self.out / "log.txt", self.seconds()
        where = log.stat().st_size
        deadline = float("inf") if self.dry_run else min(stage.until, begun + stage.limit)
        for process in processes:
            _tell(process)
        while self.seconds() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.02)
        end = "done"
        for process in processes:
            if process.poll() is None:
                end = f"ended at its time, {deadline - begun:.0f} s after it began"
            elif process.returncode:
                end = f"exit code {process.returncode}"
        self.stop(processes)
        if any(process.returncode == NO_DEVICE for process in processes):
            sys.exit("make gpu: PyTorch finds no CUDA device on this machine; --dry-run needs none")
        if end != "done":
            with log.open("rb") as file:
                file.seek(max(where, log.stat().st_size - 3000))
                self._ended_badly(stage.name, end, file.read().decode(errors="replace"))
        else:
            self.results.write("stage", name=stage.name, end=end, seconds=round(self.seconds(), 1))
            print(f"[{self.seconds():5.0f} s] {stage.name}: done in {self.seconds() - begun:.1f} s", flush=True)

    def stop(self, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be waited for
                process.wait(5)
            with suppress(BrokenPipeError):
                process.stdin.close()
            self.running.remove(process)

    def plan(self, stages: tuple[Stage, ...]) -> None:
        waiting = self.start(stages[0])
        for stage, following in zip(stages, (*stages[1:], None), strict=True):
            processes = waiting
            waiting = self.start(following) if following else []
            if self.seconds() >= stage.until and not self.dry_run:
                self.stop(processes)
                self._ended_badly(stage.name, "left out: its time was gone")
                continue
            self.finish(stage, processes)
            if stage.compiles and not self.packing.is_alive():
                self.packing = threading.Thread(target=self._pack_caches, daemon=True)
                self.packing.start()
            self._pack_results()

    def _pack_results(self) -> None:
        self._try("results.tar.gz", lambda: pack_results(self.out))

    def _pack_caches(self) -> None:
        self._try("caches.tar.gz", lambda: pack_caches(self.out, self.caches))

    def end(self) -> None:
        self.stop(list(self.running))
        self._pack_results()
        if self.packing.is_alive():
            self.packing.join()


def _tell(process: subprocess.Popen) -> None:
    with suppress(BrokenPipeError):  # it has ended already, and its exit code says how
        process.stdin.write(b"go\n")
        process.stdin.flush()


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of results")
    parser.add_argument("--second", action="store_true", help="what does not fit into the first nine minutes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages of the plan and no others")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes; measures nothing")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run only")
    parser.add_argument("--caches", type=Path, help="caches.tar.gz of an earlier run, to compile less")
    arguments = parser.parse_args()
    stages = second(arguments.dry_run) if arguments.second else FIRST
    unknown = set(arguments.only or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"--only: expected some of {', '.join(s.name for s in stages)}, got {', '.join(sorted(unknown))}")
    stages = tuple(stage for stage in stages if not arguments.only or stage.name in arguments.only)
    signal.signal(signal.SIGTERM, _terminated)
    run = Run(arguments)
    try:
        run.plan(stages)
    finally:
        run.end()
    failed = sum(line["kind"] == "failed" for line in read_lines(run.out / "results.jsonl"))
    print(f"results in {run.out} after {run.seconds():.0f} s; {failed} measurements failed", flush=True)
    if run.bad:
        print(f"make gpu: not complete: {', '.join(run.bad)}; results.jsonl says why", file=sys.stderr)
    return 1 if run.bad else 0


if __name__ == "__main__":
    sys.exit(main())
