"""What the tests of packing share: a source, and what is in the shards that it was packed into."""

from __future__ import annotations

import tarfile
from pathlib import Path

from loading import smooth
from PIL import Image


def write_source(root: Path, count: int = 20) -> Path:
    """Folders of two classes, photographs of several sizes."""
    for i in range(count):
        path = root / ("cats", "dogs")[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(40 + 3 * i, 60 + i, i)).save(path, quality=92)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def by_source(folder: Path) -> dict[int, tuple[str, bytes]]:
    """The images of shards by their number in the source: suffix, bytes."""
    images = {name: data for name, data in members(folder).items() if not name.endswith(".cls")}
    return {int(name[:9]): (Path(name).suffix, data) for name, data in images.items()}
