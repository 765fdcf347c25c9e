"""What is shipped: the mapped kernels folder, the wheel, and requirements that hold together."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastmae

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines if line)}


def run_python(code: str, *path: Path) -> str:
    """Output of a Python whose first import path is the root of the tree, as for anyone who works there."""
    lines = [f"import sys; sys.path[1:1] = {[str(p) for p in path]!r}", code]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_folder_gives_way_to_the_package_of_that_name(tmp_path):
    # Hugging Face publishes a package named "kernels", which transformers looks for. A folder without __init__.py
    # loses to a package anywhere on the path, and does not count as one where there is none.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'another project'")
    assert run_python("import kernels; print(kernels.owner)", tmp_path).strip() == "another project"
    pytest.importorskip("transformers")
    code = "import kernels; from transformers.utils.import_utils import is_kernels_available as available\n"
    assert run_python(f"{code}print(kernels.__file__, available())").split() in (["None", "True"], ["None", "False"])


def test_wheel_maps_the_kernels_into_the_package(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("fastmae", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"fastmae-{fastmae.__version__}.dist-info/METADATA").decode()
    assert {f"fastmae/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "fastmae").rglob("*.py")} <= names
    assert (ROOT / "fastmae" / "kernels").resolve() == ROOT / "kernels"  # the symlink serves the uninstalled tree
    assert "fastmae/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"fastmae", f"fastmae-{fastmae.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_version_is_the_same_everywhere():
    assert PROJECT["version"] == fastmae.__version__
    latest = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest.group(1) == fastmae.__version__


def test_tested_pins_are_within_the_ranges():
    pinned = pins()
    outside = [
        f"{r} but {pinned[key]}"
        for r in requirements()
        if (key := canonicalize_name(r.name)) in pinned and not r.specifier.contains(pinned[key])
    ]
    assert not outside


def test_extras_exist_and_what_is_hard_to_install_is_never_required():
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not required & {"triton", "xformers", "transformers", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    assert "xformers" not in {Requirement(line).name for line in PROJECT["optional-dependencies"]["test"]}
    extras = {"dali-cuda12", "dali-cuda13", "xformers", "bench", "eval", "test", "dev"}
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert "apex" not in {canonicalize_name(r.name) for r in requirements()} | set(pins())  # PyPI's is another one
