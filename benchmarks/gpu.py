"""The most valuable results of one GPU in nine minutes, in an order that makes a cut at any second cheap.

    python benchmarks/gpu.py --out FOLDER             # the first nine minutes
    python benchmarks/gpu.py --out FOLDER --second    # the rest: other GPU tests, single changes, ViT-H, modes, loaders
    python benchmarks/gpu.py --out FOLDER --dry-run   # every stage, on the CPU, with tiny models

A stage is a few commands of pytest that run at the same time, in processes of their own and with a time limit: a crash,
a hang, a failed import or a lack of memory costs that stage and no more. Its processes import and collect what they
need while the stage before it runs. FOLDER gets ``results.jsonl``, a line for each time as soon as it is measured,
``results.json``, which is made of them after each stage and belongs into a folder of ``benchmarks/results``, and
``log.txt``. Needs PyTorch, Triton and pytest-benchmark, end to end all of fastmae's dependencies. No network, no git.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from results import append, collect

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time.

    Attributes:
        name: for results and log.
        until: seconds from the start at which it is ended, so that it takes no time from those behind it.
        commands: arguments of Python. Those with --wait start early, and wait for a line on their standard input.
        limit: seconds that it may run, if that is earlier.
    """

    name: str
    until: float
    commands: tuple[str, ...]
    limit: float = 600.0

    def dry(self) -> Stage:
        """The first command, on the CPU."""
        compiles = "" if "--no-compile" in self.commands[0] else " --compile"
        command = re.sub(r"--model \S+", f"--model tiny-test:4{compiles}", self.commands[0])
        command = re.sub(r"--part \S+", "", command).replace("fastmae/ops/", "{out}/")
        command = command.replace("bench_attention.py", "bench_attention.py -k 50-32")
        return replace(self, commands=(command + " --tiny" * ("benchmarks/bench" in command),), until=float("inf"))


def test(arguments: str) -> str:
    return f"-m pytest -s -q -p no:cacheprovider --wait {arguments}"


def bench(arguments: str) -> str:
    return test(f"-p no:hypothesispytest --results {{out}}/results.jsonl benchmarks/bench_{arguments}")


def steps(model: str, competitors: str, rounds: int = 20) -> str:
    return bench(f"step.py --model {model} --only {competitors} --rounds {rounds}")


EAGER, COMPILED = "fastmae,facebookresearch-sdpa", "fastmae-compile,reference-compile"
MODES = "fastmae,fastmae-compile,fastmae-compile-graph,fastmae-compile-reduce-overhead,fastmae-compile-max-autotune"
RESIDUAL = "fastmae-bf16-residual,fastmae-graph-bf16-residual"
OPS = " benchmarks/bench_".join(
    f"{stem}.py"
    for stem in ("block", "norm_linear", "gelu_linear", "masked_patch_mse", "gather_patches", "gather_tokens",
                 "restore_tokens", "masking")
)  # fmt: skip
FIRST = (
    Stage("ceilings", 32, (bench("ceilings.py --rounds 5"),)),
    # At training shapes, then the tests of each op.
    Stage("numerics", 95, (
        *(test(f"tests/benchmarks/test_op_benchmarks.py --part {i}/4") for i in range(4)),
        *(test(f"-m gpu tests/ops --part {i}/8") for i in range(8)),
    )),
    Stage("attention", 135, (bench("attention.py"),)),
    Stage("choices", 140, (
        "benchmarks/report.py choices {out}/results.jsonl --out fastmae/ops/attention_choices.json",
    )),
    Stage("large", 185, (steps("large:256", EAGER),)),
    # Each compiles one model for the stages behind it.
    Stage("compilation", 290, tuple(
        f"{steps(model, name)} --benchmark-disable"
        for model in ("large:256", "base:256")
        for name in COMPILED.split(",")
    )),
    Stage("large-compiled", 350, (steps("large:256", f"fastmae,{COMPILED}"),)),
    Stage("graph", 375, (steps("large:253", RESIDUAL, 15),)),
    Stage("graph-1024", 395, (steps("large:1024", "fastmae-graph-bf16-residual", 5),)),
    Stage("base", 440, (steps("base:256", f"{EAGER},fastmae-graph,{COMPILED}"),)),
    Stage("end-to-end", 520, (bench("end_to_end.py -k large"),)),
)  # fmt: skip
SECOND = (
    Stage("changes", 345, (bench("step.py --model large:256 --changes --no-compile --rounds 10"),)),
    Stage("huge", 385, (steps("huge:128", f"{EAGER},fastmae-graph"),)),
    Stage("modes", 460, (steps("base:256 --changes", MODES, 10),)),
    Stage("loaders", 500, (bench("end_to_end.py -k base"),)),
    Stage("ops", 525, (bench(f"{OPS} --no-compile"),)),
)


def gpu_tests() -> tuple[Stage, ...]:
    """Files with tests for GPUs beside those of the ops; in turn, since some take most of the memory."""
    paths = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text())
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.parent.name != "ops"]
    return tuple(Stage(name, 285, (test(f"-m gpu {name}"),), limit=60) for name in names)


class Plan:
    """Runs stages, each in its time; ``bad`` has the names of those that did not end well."""

    def __init__(self, out: Path, second: bool = False):
        self.begun, self.out = time.monotonic(), out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = self.out / "results.jsonl"
        if not second:
            self.results.unlink(missing_ok=True)
        self.log = (self.out / "log.txt").open("ab" if second else "wb")
        self.running: list[subprocess.Popen] = []
        self.bad: list[str] = []

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def run(self, stages: tuple[Stage, ...]) -> None:
        try:
            following: list[subprocess.Popen] = []
            for stage, after in zip(stages, (*stages[1:], None), strict=True):
                processes = following or self.start(stage)
                following = self.start(after) if after and "--wait" in after.commands[0] else []
                end = "left out: its time was gone"
                if self.seconds() < stage.until:
                    end = self.finish(stage, processes)
                self.stop(processes)
                self.bad += [stage.name] * (end != "done")
                append(self.results, "stage", name=stage.name, found=end)
                (self.out / "results.json").write_text(json.dumps(collect(self.results), indent=1) + "\n")
                print(f"[{self.seconds():5.0f} s] {stage.name}: {end}", flush=True)
        finally:
            self.stop(list(self.running))

    def start(self, stage: Stage) -> list[subprocess.Popen]:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
        # A session of its own: what it starts itself (compilers, loaders) is ended with it.
        options = {"cwd": ROOT, "env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
        commands = [[sys.executable, *shlex.split(command.format(out=self.out))] for command in stage.commands]
        started = [subprocess.Popen(command, stdout=self.log, stderr=self.log, **options) for command in commands]
        self.running += started
        return started

    def finish(self, stage: Stage, processes: list[subprocess.Popen]) -> str:
        """Let the waiting processes run, to their end or to their time; how that went."""
        begun = self.seconds()
        deadline = min(stage.until, begun + stage.limit)
        for process in processes:
            with suppress(BrokenPipeError):  # it has ended already, and its exit code says how
                process.stdin.write(b"go\n")
                process.stdin.flush()
        while self.seconds() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.02)
        codes = [process.poll() for process in processes]
        if any(codes):
            return f"exit code {next(filter(None, codes))}"
        return f"ended at its time, {deadline - begun:.0f} s after it began" if None in codes else "done"

    def stop(self, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be waited for
                process.wait(5)
            with suppress(BrokenPipeError):
                process.stdin.close()
            self.running.remove(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of results")
    parser.add_argument("--second", action="store_true", help="what does not fit into the first nine minutes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages of the plan and no others")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models; measures nothing")
    arguments = parser.parse_args()
    stages = {stage.name: stage for stage in ((*gpu_tests(), *SECOND) if arguments.second else FIRST)}
    if unknown := set(arguments.only or ()) - stages.keys():
        parser.error(f"--only: expected some of {', '.join(stages)}, got {', '.join(sorted(unknown))}")
    chosen = [stage for name, stage in stages.items() if not arguments.only or name in arguments.only]
    if arguments.dry_run:
        chosen = [stage.dry() for stage in chosen]
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("make gpu: PyTorch finds no CUDA device on this machine; --dry-run needs none")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = Plan(arguments.out, arguments.second)
    plan.run(tuple(chosen))
    print(f"results in {plan.out} after {plan.seconds():.0f} s", flush=True)
    if plan.bad:
        print(f"make gpu: not complete: {', '.join(plan.bad)}; log.txt says why", file=sys.stderr)
    return bool(plan.bad)


if __name__ == "__main__":
    sys.exit(main())
