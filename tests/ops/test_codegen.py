"""The code that GPUs would run for every kernel: nothing spills, resources and access widths are as the table says."""

from __future__ import annotations

import ast
import json
import re

import pytest

pytest.importorskip("triton")

import counted
import triton
from code_cases import LINES, compiled
from cross_compile import TARGETS, assert_fits, needs_compiler

RESULTS = json.loads(counted.CODE.read_text())

# By default one use of each kernel is compiled for every target, and all of attention for one; the rest is slow.
USUAL = {
    "random_masking", "random_masking, block", "random_masking, grid", "gather_patches", "gather_patches backward",
    "masked_patch_mse", "masked_patch_mse backward", "gather_tokens", "gather_tokens backward", "restore_tokens",
    "restore_tokens backward, mask token", "restore_tokens backward, table", "norm_linear, 768 wide",
    "norm_linear backward, 768 wide", "gelu_linear, 3072 wide", "gelu_linear backward, 3072 wide",
    "attention, 50 of 64", "attention backward, 50 of 64",
}  # fmt: skip


def cases():
    for name in LINES:
        for target in TARGETS:
            usual = name in USUAL or ("attention" in name and target == "sm_90")
            yield pytest.param(name, target, marks=() if usual else pytest.mark.slow)


OVER = {
    "3.6.0": {
        *(("attention, 65 of 80", target) for target in ("gfx942", "sm_100")),
        *(("attention, 257 of 32", f"sm_{n}") for n in (80, 90, 120)),
        *(("attention backward, 257 of 32", f"sm_{n}") for n in (80, 100)),
    }
}
"""What other versions of Triton do not keep: narrow loads, registers (236 on sm_100), spills with 257 keys."""


@needs_compiler
@pytest.mark.parametrize(("name", "target"), cases())
def test_code_is_as_the_table_says(request, name, target):
    if (name, target) in OVER.get(triton.__version__, ()):
        request.applymarker(pytest.mark.xfail(reason=f"Triton {triton.__version__} does not keep it"))
    line, code = LINES[name].on(target), compiled(name, target)
    assert_fits(code, target, max_registers=line.registers)
    assert not line.excess(code), code


@needs_compiler
@pytest.mark.parametrize(
    ("name", "programs"),
    [("attention, 197 of 32", 2), ("attention backward, 197 of 32", 2), ("attention backward, 50 of 64", 3)],
)
def test_programs_of_attention_share_a_hopper_processor(name, programs):
    launch, code = LINES[name].launch("sm_90"), compiled(name, "sm_90")
    threads = 32 * launch.keywords["num_warps"]
    assert programs * threads * -(-code.registers // 8) * 8 <= 65536
    assert programs * (code.shared + 1024) <= 228 << 10
    if "197" in name:  # products of a warpgroup, and of a single warp: only dq's rows are too few for the former
        assert code.text.count("HGMMA") >= 16
        assert len(re.findall(r"\bHMMA", code.text)) == (16 if "backward" in name else 0)


@needs_compiler
@pytest.mark.parametrize(("name", "limit"), [("gelu_linear, 3072 wide", 752), ("gelu_linear backward, 3072 wide", 600)])
def test_gelu_takes_few_instructions_and_no_division(name, limit):
    """32 values a thread forward, 16 backward; an H100 has issue slots for about 35 and 70 a value."""
    nvidia, amd = (compiled(name, target).text for target in ("sm_90", "gfx942"))
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)", nvidia)
    assert 100 < len(instructions) <= limit
    assert "MUFU.RCP" not in nvidia
    assert "v_div_" not in amd


def test_every_kernel_is_in_the_table():
    launched = set()
    for file in (counted.ROOT / "kernels").glob("*.py"):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        launched |= {function.name for function in functions if function.name.endswith("_kernel")}
    assert launched == {f"{LINES[name].kernel}_kernel" for name in USUAL}


def test_every_kernel_is_published_and_none_spills_as_the_page_says():
    assert list(RESULTS["lines"]) == list(LINES)
    codes = [code for targets in RESULTS["lines"].values() for code in targets.values()]
    assert not any(code["spills"] or code["stack"] for code in codes)
    page = " ".join((counted.ROOT / "docs/kernels.md").read_text().split())
    assert f"None of the {len(codes)} spills or uses a stack" in page


@needs_compiler
@pytest.mark.parametrize("name", ["gather_patches", "attention, 50 of 64"])
def test_published_numbers_are_those_of_the_code(name):
    if triton.__version__ != RESULTS["triton"]:
        pytest.skip(f"compiled with Triton {RESULTS['triton']}")
    for target in TARGETS:
        assert counted.code_numbers(compiled(name, target)) == RESULTS["lines"][name][target]
