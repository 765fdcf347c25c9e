"""Who may import whom: kernels <- ops <- model <- train, evaluate <- cli, and no circles; read from every source."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What each part may import of ours besides itself: parts, or single modules ("train.config"). The package's own names
# (its version) are free to all but the two
# that stand alone: kernels, and the reference, which is the specification and so shares no code with what it specifies.
ALLOWED = {
    "kernels": set(),
    "reference": set(),
    "ops": {"kernels", "fastmae"},
    "model": {"ops", "fastmae"},
    "data": {"ops", "model", "fastmae"},
    "interop": {"ops", "model", "reference", "fastmae"},
    "train": {"ops", "model", "data", "fastmae"},
    "evaluate": {"ops", "model", "data", "fastmae", "train.callbacks", "train.classification", "train.config"}
    | {"train.flops", "train.ranks", "train.task"},
    "environment": {"ops", "fastmae"},
    "errors": set(),
    "pretraining": {"ops", "model", "data", "train", "evaluate", "loading", "errors", "fastmae"},
    "finetuning": {"model", "data", "train", "evaluate", "loading", "pretraining", "errors", "fastmae"},
    "loading": {"model", "interop", "train", "fastmae"},
    "hub": {"model", "interop", "loading", "train", "evaluate", "fastmae"},
    "run": {"data", "train", "pretraining", "loading", "fastmae"},
    "cli": {"ops", "model", "data", "train", "evaluate", "interop", "loading", "environment", "errors", "pretraining"}
    | {"finetuning", "hub", "fastmae"},
    "__main__": {"cli"},
    "fastmae": {"ops", "model", "interop", "hub", "loading", "run", "evaluate"},
}
# What may be imported from elsewhere where a module is loaded; the standard library is free.
THIRD_PARTY = {"kernels": {"triton"}, "reference": {"torch"}, "ops": {"torch", "numpy"}}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastmae")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """``fastmae.ops.masking`` belongs to ``ops``, the package itself to ``fastmae``."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(source: str, module: str, is_package: bool = False) -> set[tuple[str, bool]]:
    """(imported module, whether it is imported as soon as this one is) for every import in the source."""
    found = set()

    def visit(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.update((alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            # "from fastmae import ops" imports a module, "from fastmae import __version__" from the package itself.
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add((inner if inner in MODULES else base, at_load))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add((node.args[0].value, at_load))
        inside = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), True)
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in this source breaks the layering, as readable lines."""
    part = part_of(module)
    if part not in ALLOWED:
        return [f"{module}: say in ALLOWED what the new part {part!r} may import"]
    broken = []
    for name, at_load in sorted(imports(source, module, is_package)):
        top = name.split(".")[0]
        if top == "fastmae":
            allowed = {part} | ALLOWED[part]
            if part_of(name) not in allowed and name.removeprefix("fastmae.") not in allowed:
                broken.append(f"{module} imports {name}")
        elif top not in sys.stdlib_module_names and part in THIRD_PARTY:
            lazy_is_fine = part == "ops" and not at_load
            if top not in THIRD_PARTY[part] and not lazy_is_fine:
                broken.append(f"{module} imports {name}")
    return broken


def sources() -> list[Path]:
    ours = [path for path in (ROOT / "fastmae").rglob("*.py") if "kernels" not in path.parts[len(ROOT.parts) :]]
    return sorted([*ours, *(ROOT / "kernels").rglob("*.py")])


MODULES = {module_name(path): path for path in sources()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first one again at the end; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_every_module_keeps_to_its_layer():
    assert {part_of(module) for module in MODULES} >= {"kernels", "ops", "model", "train", "evaluate", "cli"}
    broken = [v for m, p in MODULES.items() for v in violations(p.read_text(), m, p.name == "__init__.py")]
    assert not broken, "\n".join(broken)


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions and under TYPE_CHECKING count: files that need each other are one idea."""
    graph = {}
    for module, path in MODULES.items():
        names = {name for name, _ in imports(path.read_text(), module, path.name == "__init__.py")}
        # Everyone may read the package's version, and the package exports names of everyone, lazily.
        graph[module] = (names & MODULES.keys()) - {module, "fastmae"}
    found = circle(graph)
    assert not found, " -> ".join(found)


def test_a_circle_is_found_whatever_kind_of_import_closes_it():
    source = "if TYPE_CHECKING:\n    from fastmae.model import mae\ndef f():\n    import fastmae.model.blocks"
    assert {name for name, _ in imports(source, "a")} == {"fastmae.model.mae", "fastmae.model.blocks"}
    found = circle({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()})
    assert " -> ".join(found) in "a -> b -> c -> a -> b -> c"
    assert len(found) == 4


def test_a_wrong_import_is_found_and_a_right_one_passes():
    for module, source in (
        ("fastmae.kernels.masking", "import torch"),
        ("fastmae.reference", "import numpy"),
        ("fastmae.ops.masking", "from fastmae.model import PRESETS"),
        ("fastmae.ops.masking", "import triton"),
        ("fastmae.data.index", "from fastmae.train.config import DataConfig"),
        ("fastmae.train.trainer", "from ..evaluate import reconstruct"),
        ("fastmae.evaluate.figure", "importlib.import_module('fastmae.train')"),
        ("fastmae.novelty", "import os"),
    ):
        assert violations(source, module), source
    for module, source in (
        ("fastmae.kernels.masking", "import triton\nfrom fastmae.kernels.philox import philox4x32"),
        ("fastmae.ops.masking", "def f():\n    import triton"),
        ("fastmae.evaluate.figure", "from fastmae import ops, __version__\nfrom .baselines import fill_mean_color"),
        ("fastmae.cli", "from fastmae.train import trainer"),
    ):
        assert not violations(source, module), source
