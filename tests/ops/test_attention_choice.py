"""What ``"auto"`` picks: the shipped table, its reader, and the script that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import report
import torch

from fastmae.ops import _attention_choice as choice
from fastmae.ops.attention import attention, attention_qkvpacked, choose_backend, describe_backends

ROOT = Path(__file__).parents[2]


def row(dtype: str, tokens: int, head_dim: int, **ratios: float) -> choice.Row:
    return choice.Row(dtype, tokens, head_dim, tuple(sorted(ratios.items(), key=lambda item: item[1])))


@pytest.fixture
def table(monkeypatch):
    """Puts rows in the place of the CPU's."""

    def use(*rows: choice.Row, key: str = "cpu") -> None:
        monkeypatch.setattr(choice, "_cache", {key: choice.Table("a machine", rows)})

    return use


def test_shipped_table_comes_from_the_committed_results():
    assert report.attention_choices(report.attention_results()) == (ROOT / report.CHOICES).read_text()


@pytest.mark.parametrize(
    ("tokens", "head_dim", "expected"),
    [(1, 1, (50, 32)), (50, 33, (50, 64)), (51, 64, (197, 32)), (400, 32, (257, 64)), (50, 128, (50, 64))],
)
def test_next_larger_shape_decides(tokens, head_dim, expected):
    shapes = [(50, 32), (50, 64), (197, 32), (257, 64)]
    rows = [row("float32", *shape, sdpa=1.0) for shape in shapes]
    rows = (*[row("bfloat16", *shape, plain=0.5, sdpa=1.0) for shape in shapes], *rows)
    assert choice.nearest_row(choice.Table("", rows), "float32", tokens, head_dim)[:3] == ("float32", *expected)


def test_table_is_honoured(table):
    table(row("float32", 50, 32, plain=0.9, sdpa=1.0), row("float32", 197, 32, plain=1.1, sdpa=1.0))
    assert choose_backend("cpu", torch.float32, 50, 32).backend == "plain"
    assert choose_backend("cpu", torch.float32, 51, 32).backend == "sdpa"
    q = torch.randn(1, 50, 2, 32, requires_grad=True)
    assert "plain" in type(attention(q, q, q).grad_fn).__name__.lower()
    longer = torch.randn(1, 51, 2, 32, requires_grad=True)
    assert "plain" not in type(attention(longer, longer, longer).grad_fn).__name__.lower()


def test_float16_goes_by_bfloat16_where_it_was_not_measured(table):
    table(row("bfloat16", 50, 32, plain=0.5, sdpa=1.0))
    assert choose_backend("cpu", torch.float16, 50, 32).backend == "plain"
    assert choose_backend("cpu", torch.float64, 50, 32).backend == "sdpa"


def test_backend_that_cannot_run_is_passed_over(table, monkeypatch):
    monkeypatch.setattr(choice, "device_key", lambda device_type: device_type)
    table(row("bfloat16", 257, 32, triton=0.5, xformers=0.6, sdpa=1.0, plain=2.0), key="cuda")
    monkeypatch.setattr(choice._attention_triton, "is_installed", lambda: True)
    monkeypatch.setattr(choice._xformers, "is_installed", lambda: False)
    assert choose_backend("cuda", torch.bfloat16, 50, 64).backend == "triton"
    assert choose_backend("cuda", torch.bfloat16, 300, 32).backend == "sdpa"
    monkeypatch.setattr(choice._attention_triton, "is_installed", lambda: False)
    assert choose_backend("cuda", torch.bfloat16, 50, 64).backend == "sdpa"
    monkeypatch.setattr(choice._xformers, "is_installed", lambda: True)
    assert choose_backend("cuda", torch.bfloat16, 50, 64).backend == "xformers"


def test_unknown_device_has_a_stated_default(monkeypatch):
    monkeypatch.setattr(choice, "device_key", lambda device_type: "cuda 99.0")
    found = choose_backend("cuda", torch.bfloat16, 50, 64)
    assert found.backend == "sdpa"
    assert "not measured on this device" in found.reason
    ((_, line),) = choice.describe_choices("cuda")
    assert line.startswith("sdpa: not measured")


def test_table_is_read_inside_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(choice, "_cache", {})
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention_qkvpacked(x), fullgraph=True, backend="aot_eager")
    for length in (5, 6, 60):
        qkv = torch.randn(2, length, 3, 2, 8)
        torch.testing.assert_close(compiled(qkv), attention_qkvpacked(qkv, "sdpa"), rtol=1e-4, atol=1e-5)


def test_picks_are_reported_with_their_ratios(table):
    table(row("float32", 50, 32, plain=0.9, sdpa=1.0), row("float32", 50, 64, plain=1.1, sdpa=1.0))
    rows = dict(describe_backends())
    assert "measured on a machine" in rows["auto, cpu"]
    assert rows["auto, cpu, float32, 50 tokens"] == "heads of 32: plain (0.90), heads of 64: sdpa (1.00)"


def test_results_of_one_kind_of_device_are_joined_by_the_geometric_mean():
    shape = {"dtype": "bfloat16", "tokens": 50, "head_dim": 64, "device_key": "cuda 9.0", "torch": "2.14"}

    def result(device: str, **sdpa_over: float) -> dict:
        ratios = {"sdpa": {}} | {name: {"sdpa": ratio} for name, ratio in sdpa_over.items()}
        entries = [shape | {"competitor": name, "ratios": found} for name, found in ratios.items()]
        return {"machine": {"device": device}, "benchmarks": entries}

    results = [result("H200", triton=0.9, plain=2.0), result("H100", triton=0.4, plain=2.0, cudnn=0.3)]
    written = [report.attention_choices(order) for order in (results, results[::-1])]
    assert written[0] == written[1]
    table = choice.read_choices(written[0])["cuda 9.0"]
    assert table.device == "H100, H200"
    assert table.rows == (row("bfloat16", 50, 64, triton=0.6, sdpa=1.0, plain=2.0),)
