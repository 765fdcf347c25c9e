"""The stages of ``gpu.py``, each run in a process of its own: what is measured, and on which shapes."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gpu import NO_DEVICE, ROOT
from gpu_results import JsonLines, as_files, describe, entry, read_lines, write_comparison

# The processes of a stage import this before their turn; what goes wrong is reported when it has come.
try:
    import bench_attention
    import bench_step
    import choose_attention
    import gpu_numerics
    import stand_in
    import torch
    import torch.nn.functional as F
    from comparison import Comparison, Unavailable, compare, table
    from measure import Meter, describe_machine
    from step_recipes import LEVERS, MODES, RECIPES, Recipe
    from torch import Tensor

    from fastmae import environment

    import_error = None
except Exception as error:
    import_error = describe(error)

OPS_OF_A_STEP = ("random_masking", "gather_patches", "gather_tokens", "restore_tokens", "masked_patch_mse",
                 "norm_linear", "gelu_linear", "linear", "attention")  # fmt: skip


@dataclass
class Run:
    """What a stage is given: where to write, what to measure with, and which part of the work is its own."""

    out: Path
    results: JsonLines
    meter: Meter
    dry: bool
    part: int
    parts: int

    @property
    def device(self) -> torch.device:
        return self.meter.device

    def write(self, kind: str, **values: object) -> None:
        self.results.write(kind, **values)

    @contextmanager
    def attempt(self, group: str, competitor: str) -> Iterator[None]:
        """What goes wrong inside is recorded, and does not end the stage."""
        try:
            yield
        except Exception as error:
            # Text, since the frames of the traceback hold on to memory.
            self.write("failed", group=group, competitor=competitor, error=describe(error))
            print(f"failed: {group}, {competitor}: {type(error).__name__}: {str(error)[:300]}", flush=True)

    def measure(self, group: str, competitor: str, call: Callable[[], object], flops: int = 0, **facts) -> None:
        """Five times ten calls in a row, the caches as the call before left them."""
        with self.attempt(group, competitor):
            call()
            queued = self.meter.queue_seconds(call)
            seconds = [
                self.meter.time(call, 10, flush=False, queue_seconds=queued) for _ in range(2 if self.dry else 5)
            ]
            if flops:
                facts["tflop_per_s"] = flops / sorted(seconds)[len(seconds) // 2] / 1e12
            self.write("benchmark", **entry(group, competitor, seconds, hidden=self.meter.covered, **facts))

    def comparison(self, comparison: Comparison, uses: tuple[str, ...], **facts: object) -> None:
        """All that can take part, round by round. Ours are marked where the numerics of an op that they use failed."""
        names = [name for name, one in comparison.competitors.items() if not isinstance(one, Unavailable)]
        for name in comparison.competitors.keys() - set(names):
            self.write("unavailable", group=comparison.group, competitor=name, reason=comparison.competitors[name])

        def report(name: str, found: float | str) -> None:
            kind, value = ("failed", "error") if isinstance(found, str) else ("round", "seconds")
            self.write(kind, group=comparison.group, competitor=name, **{value: found})

        found = compare(comparison, names, self.meter, 2 if self.dry else None, report=report)
        wrong = sorted(self.wrong_ops() & set(uses))
        for name, info in found.info.items():
            if wrong and name.startswith(("fastmae", "transformers-fastmae", "triton")):
                info["wrong_numerics"] = wrong
        write_comparison(self.results, comparison, found, **facts)
        print("\n".join(table(comparison, found)), flush=True)

    def wrong_ops(self) -> set[str]:
        lines = read_lines(self.results.path)
        return {line["op"] for line in lines if line["kind"] == "numerics" and not line["passed"]}

    def recipes(self, *names: str, **changes: object) -> dict[str, Recipe]:
        """Ways to train by name; nothing is generated for the CPU in a dry run."""
        changes |= {"backend": "eager"} if self.dry else {}
        return {name: replace((RECIPES | LEVERS | MODES)[name], **changes) for name in names}

    def model(self, name: str, batch: int) -> tuple[str, int]:
        return ("tiny-test", 4) if self.dry else (name, batch)

    def steps(self, model: tuple[str, int], recipes: dict[str, Recipe], job: str = "training step") -> Comparison:
        """A comparison of training steps, alone on the device."""
        gc.collect()
        self.meter.cuda.empty_cache()
        torch.compiler.reset()
        return bench_step.build(model, recipes, self.device, job, self.meter.cuda)


def ceilings(run: Run) -> None:
    """The device at its best, and the matrix products of the models at their sizes."""
    if run.part == 0:
        copies(run)
        products(run)
        fp8_products(run)
        linears(run)
    if run.part == run.parts - 1:
        run.write("environment", text=environment.report())


def copies(run: Run) -> None:
    for size in (1 << 16,) if run.dry else (1 << 26, 1 << 28, 1 << 30, 1 << 33):
        with run.attempt("copy", f"{size >> 20} MiB"):
            seconds = run.meter.copy_seconds(size)
            run.write("benchmark", **entry("copy", f"{size >> 20} MiB", [seconds], gb_per_s=size / seconds / 1e9))


def products(run: Run) -> None:
    size = 64 if run.dry else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
        run.measure("square matrix product", str(dtype), partial(torch.mm, a, b), 2 * size**3, size=size)


def fp8_products(run: Run) -> None:
    """One size for the ceiling, and ViT-L's first MLP product, with both accumulations, scales per tensor and row."""
    sizes = [(16, 32, 48)] if run.dry else [(8192, 8192, 8192), (12800, 1024, 4096), (12800, 4096, 1024)]
    for rows, inner, outer in sizes:
        group = f"fp8 product, {rows} x {inner} to {outer}"
        a, b = (torch.randn(n, inner, device=run.device) for n in (rows, outer))
        low = partial(torch.mm, a.bfloat16(), b.bfloat16().t())
        run.measure(group, "bf16", low, 2 * rows * inner * outer)
        for scales in ("tensor", "row"):
            for fast in (True, False):
                name = f"a scale per {scales}, {'fast' if fast else 'exact'} accumulation"
                call = partial(fp8_product, a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), scales, fast)
                run.measure(group, name, call, 2 * rows * inner * outer)


def fp8_product(a: Tensor, b: Tensor, scales: str, fast: bool) -> Tensor:
    """(rows, inner) and (outer, inner), both in float8, to bfloat16 (rows, outer)."""
    shapes = ((len(a), 1), (1, len(b))) if scales == "row" else ((), ())
    scale_a, scale_b = (torch.ones(shape, device=a.device) for shape in shapes)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def linears(run: Run) -> None:
    """``F.linear`` and its two gradients, ViT-L's widths first.

    12,800 rows are 256 images of 50 visible tokens, 12,650 are 253, 12,672 is the next multiple of 128, 51,200 are
    1,024 images; 50,432 rows are 256 images of a decoder's 197 tokens.
    """
    encoders = [(width, factor) for width in (1024, 768, 1280) for factor in (3, 1, 4, 0.25)]
    cases = [(rows, *case) for rows in (12650, 12672, 12800, 51200, 50432) for case in encoders]
    cases += [(rows, 512, factor) for rows in (50432, 49841) for factor in (3, 1, 4, 0.25)]
    cases.sort(key=lambda case: (1024, 512, 768, 1280).index(case[1]))
    for rows, width, factor in [(8, 16, 3)] if run.dry else cases:
        inner, outer = (4 * width, width) if factor == 0.25 else (width, factor * width)
        linear(run, rows, inner, outer)


def linear(run: Run, rows: int, inner: int, outer: int) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device).bfloat16()

    x, weight, bias, grad = random(rows, inner), random(outer, inner), random(outer), random(rows, outer)
    calls = {
        "forward": lambda: F.linear(x, weight),
        "forward with bias": lambda: F.linear(x, weight, bias),
        "input gradient": lambda: grad @ weight,
        "weight gradient, bf16": lambda: torch.mm(grad.t(), x),
        "weight gradient, fp32": lambda: torch.mm(grad.t(), x, out_dtype=torch.float32),
    }
    for name, call in calls.items():
        run.measure(f"F.linear, {rows} x {inner} to {outer}", name, call, 2 * rows * inner * outer)


def numerics(run: Run) -> None:
    """Every op at training shapes, against plain PyTorch; each process takes its share of the cases."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    cases = gpu_numerics.cases(run.device, tiny=run.dry)
    for case in cases[run.part :: run.parts]:
        torch.manual_seed(0)
        found = gpu_numerics.check(case)
        run.write("numerics", **found)
        if not found["passed"]:
            print(f"numerics: {found}")


def attention(run: Run) -> None:
    """All backends and each tile of ours, then the table of choices from what was measured."""
    cases = [(50, 64, None), (197, 32, None), (197, 32, 147), (65, 80, None), (257, 32, None), (257, 32, 192)]
    cases = [(5, 16, None), (5, 16, 3)] if run.dry else cases
    dtype = "float32" if run.dry else "bfloat16"
    for tokens, dim, queries in cases:
        # The table is of self-attention.
        facts = {} if queries else bench_attention.facts(dtype, tokens, dim, run.device)
        with run.attempt("attention", f"{queries or tokens} of {tokens} tokens of {dim}"):
            run.comparison(bench_attention.build(dtype, tokens, dim, run.device, queries), ("attention",), **facts)
    for tokens, dim, queries in cases[:3]:
        reason = bench_attention.missing("triton", run.device, torch.bfloat16, tokens, dim)
        for backward in (False, True):
            with run.attempt("attention tiles", f"{queries or tokens} of {tokens} tokens of {dim}"):
                comparison = bench_attention.build_tiles("bfloat16", tokens, dim, run.device, queries, backward)
                if reason:
                    run.write("unavailable", group=comparison.group, competitor="all", reason=reason)
                else:
                    run.comparison(comparison, ())
    with run.attempt("attention", "table of choices"):
        measured = json.loads(as_files(read_lines(run.results.path))["attention.json"])
        without = ("triton",) if "attention" in run.wrong_ops() else ()
        text = choose_attention.write(choose_attention.choices([measured, *choose_attention.committed()], without))
        run.write("choices", text=text)
        if not run.dry:
            choose_attention.TABLE.write_text(text)


def profiled(run: Run, comparison: Comparison, name: str) -> None:
    """One step's kernels by time."""
    with run.attempt(comparison.group, f"{name}, profiled"):
        kernels = run.meter.kernels(comparison.competitors[name]) or []
        rows = [kernel._asdict() for kernel in kernels[:60]]
        seconds, launches = sum(k.seconds for k in kernels), sum(k.launches for k in kernels)
        run.write("kernels", group=comparison.group, competitor=name, seconds=seconds, launches=launches, kernels=rows)


def large(run: Run) -> None:
    comparison = run.steps(
        run.model("large", 256), run.recipes("fastmae", "facebookresearch-sdpa"), "eager training step"
    )
    run.comparison(replace(comparison, seconds=12.0), OPS_OF_A_STEP)
    for name in comparison.competitors:
        profiled(run, comparison, name)


def compilation(run: Run) -> None:
    """Each process compiles one model, for the stages behind it, and says how long that took."""
    jobs = [(model, name) for model in ("large", "base") for name in ("fastmae-compile", "reference-compile")]
    for model, name in jobs[:2] if run.dry else jobs[run.part :: run.parts]:
        comparison = run.steps(run.model(model, 256), run.recipes(name), "compilation")
        with run.attempt(comparison.group, name):
            begun = time.perf_counter()
            comparison.competitors[name]()
            run.meter.synchronize()
            run.write("benchmark", **entry(comparison.group, name, [time.perf_counter() - begun]))
            # Other processes use the device too: a figure for the case that the stage behind this one fails.
            seconds = [run.meter.time(comparison.competitors[name], 2, flush=False) for _ in range(3)]
            run.write("benchmark", **entry(f"{comparison.group}, a step meanwhile", name, seconds))


def comparison(run: Run) -> None:
    names = ("fastmae", "fastmae-compile", "reference-compile")
    run.comparison(replace(run.steps(run.model("large", 256), run.recipes(*names)), seconds=12.0), OPS_OF_A_STEP)


def graph(run: Run) -> None:
    """Forward, backward, clipping and update as one CUDA graph, the residual stream in bfloat16."""
    recipe = Recipe(residual_dtype="bfloat16", clip_grad=1.0)
    recipes = {"fastmae-bf16-residual": recipe, "fastmae-graph-bf16-residual": replace(recipe, graph=True)}
    # What a graph holds cannot be used beside it: of 1,024 images there is room for one of them at a time.
    for batch, names in ((253, list(recipes)), *((1024, [name]) for name in recipes)):
        with run.attempt(f"training step with clipping, {batch} images", ", ".join(names)):
            chosen = {name: recipes[name] for name in names}
            comparison = run.steps(run.model("large", batch), chosen, "training step with clipping")
            run.comparison(replace(comparison, seconds=6.0), OPS_OF_A_STEP)
        comparison = None  # its memory is wanted for the next


def base(run: Run) -> None:
    names = ("fastmae", "facebookresearch-sdpa", "fastmae-graph", "fastmae-compile", "reference-compile")
    names = names[:3] if run.dry else names  # the CPU has had enough of compilation by now
    run.comparison(replace(run.steps(run.model("base", 256), run.recipes(*names)), seconds=10.0), OPS_OF_A_STEP)


_TINY_TRAINER = (
    "--count 16 --batch 4 --seconds 0.1 --train.num-threads 1 --data.num-threads 1 --train.device cpu "
    "--train.precision fp32 --model.img-size 32 --model.patch-size 16 --model.depth 1 --model.embed-dim 32 "
    "--model.num-heads 2 --model.decoder-embed-dim 32 --model.decoder-depth 1 --model.decoder-num-heads 2 "
    "--data.loader torch"
)


def trainer(run: Run, name: str, flags: str) -> None:
    """The trainer from JPEGs on a disk, as ``end_to_end.py`` measures it."""
    with run.attempt("end to end", name):
        import end_to_end  # the command line's packages may be missing

        found = end_to_end.measure([*flags.split(), *(_TINY_TRAINER.split() if run.dry else [])])
        run.write("end_to_end", name=name, found=found)


def end_to_end(run: Run) -> None:
    trainer(run, "large", "--recipe imagenet-vit-l --batch 256 --seconds 20")


# The second call.


def levers(run: Run) -> None:
    names = ["transformers", "transformers-fastmae", "facebookresearch-sdpa", "facebookresearch-plain-fp16", *LEVERS]
    names.remove("lever: torch.compile")
    names = names[:5] if run.dry else names
    comparison = run.steps(run.model("large", 256), run.recipes("fastmae", "fastmae-bf16-residual", *names), "levers")
    run.comparison(comparison, OPS_OF_A_STEP)


def huge(run: Run) -> None:
    names = ("fastmae", "facebookresearch-sdpa", "fastmae-graph")
    run.comparison(replace(run.steps(run.model("huge", 128), run.recipes(*names)), seconds=10.0), OPS_OF_A_STEP)
    trainer(run, "huge", "--recipe imagenet-vit-h --batch 128 --seconds 8")


def modes(run: Run) -> None:
    recipes = run.recipes(*(list(MODES)[:3] if run.dry else MODES))
    run.comparison(run.steps(run.model("base", 256), recipes, "modes of compilation"), OPS_OF_A_STEP)


def loaders(run: Run) -> None:
    """The trainer behind each loader; DALI decodes on the GPU."""
    for loader in ("dali", "torch"):
        trainer(run, f"base-{loader}", f"--recipe imagenet-vit-b --batch 256 --seconds 8 --data.loader {loader}")


def ops(run: Run) -> None:
    """The benchmark of each op on its own, as ``pytest benchmarks`` runs it."""
    left_out = ("bench_step", "bench_modes", "bench_attention", "bench_data")
    files = [path for path in sorted(Path(__file__).parent.glob("bench_*.py")) if path.stem not in left_out]
    for path in files[-1:] if run.dry else files:
        flags = ["--rounds", "1"] if run.dry else ["--no-compile"]
        run_pytest(run, [str(path), *flags, "--json-lines", str(run.results.path)])


def run_pytest(run: Run, arguments: list[str]) -> None:
    """A line for each test when it is over."""
    import pytest

    class Recorder:
        @staticmethod
        def pytest_runtest_logreport(report):
            if report.when == "call" or not report.passed:
                text = None if report.passed else str(report.longrepr)[-3000:]
                run.write("test", test=report.nodeid, outcome=report.outcome, seconds=report.duration, error=text)

    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[Recorder()])
    run.write("stage", name=arguments[0], end=f"pytest ends with {int(code)}")


def describe_run(results: JsonLines) -> None:
    """The line that says which machine and which code all others are of."""
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = "unknown"
    machine = describe_machine(environment.cpu_model())
    results.write("machine", machine=machine, date=time.strftime("%Y-%m-%d"), commit=commit)


STAGES = {
    function.__name__: function
    for function in (ceilings, numerics, attention, large, compilation, comparison, graph, base, end_to_end, levers,
                     huge, modes, loaders, ops)
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not sys.stdin.readline():  # the plan has ended before this stage's turn
        return 0
    results = JsonLines(arguments.out / "results.jsonl", arguments.stage)
    if import_error:
        results.write("failed", group=arguments.stage, competitor="imports", error=import_error)
        print(import_error)
        return 1
    if arguments.dry_run:
        torch.set_num_threads(1)
        meter = Meter(torch.device("cpu"), stand_in)
    elif torch.cuda.is_available():
        meter = Meter(torch.device("cuda"))
    else:
        return NO_DEVICE
    if not any(line["kind"] == "machine" for line in read_lines(results.path)):
        describe_run(results)
    run = Run(arguments.out, results, meter, arguments.dry_run, arguments.part, arguments.parts)
    try:
        if arguments.stage.startswith("tests/"):
            run_pytest(run, ["-m", "gpu", arguments.stage])
        else:
            STAGES[arguments.stage](run)
    except Exception as error:
        results.write("failed", group=arguments.stage, competitor="stage", error=describe(error))
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
