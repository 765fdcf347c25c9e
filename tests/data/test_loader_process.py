"""What could take a process down or keep it from ending, in one process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from loading import smooth
from PIL import Image
from training import write_images

from fastmae.data import has_dali

PROGRAM = """
import io, os, signal, sys
from pathlib import Path

import fastmae.data

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run with SIGINT ignored

print("decoders imported by the package:", [m for m in ("nvidia.dali", "skimage", "torchvision") if m in sys.modules])

import numpy as np
from PIL import Image
from fastmae.data import DataError, create_loader, has_dali, open_dataset
from fastmae.data.decode import UndecodableImage, decode

root, kinds = Path(sys.argv[1]), ("torch", "dali")[: 1 + has_dali()]

# Each decoder on files with holes, cuts and zeros.
random, refused, image = np.random.default_rng(0), 0, Image.open(root / "image.png")
for format_, options in [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("PNG", {})]:
    file = io.BytesIO()
    image.save(file, format_, **options)
    content = np.frombuffer(file.getvalue(), np.uint8)
    for trial in range(60):
        damaged = content.copy()
        at, length = random.integers(20, len(damaged) - 50), random.integers(10, 500)
        if trial % 3 == 0:
            damaged[at : at + length] = 0
        elif trial % 3 == 1:
            damaged = np.delete(damaged, slice(at, at + length))
        else:
            damaged[random.integers(20, len(damaged), 10)] = random.integers(0, 256, 10)
        try:
            assert decode(damaged).dtype == np.uint8
        except UndecodableImage:
            refused += 1
print("refused many:", refused > 70)

# Closing while work is under way, as every run does at its end.
dataset = open_dataset(root / "large", cache_dir=root / "cache")
for _ in range(4):
    for kind in kinds:
        with create_loader(dataset, loader=kind, batch_size=16, img_size=(64, 64), seed=0, num_threads=2) as loader:
            for _ in range(2):
                next(loader)
print("closed")

# Files that lose their headers after the index was made.
folder = root / "images"
dataset = open_dataset(folder, cache_dir=root / "cache", max_bad_fraction=0.5)
(folder / "3.jpg").write_bytes(bytes((folder / "3.jpg").stat().st_size))  # as a crash leaves files on some file systems
content = (folder / "5.jpg").read_bytes()
(folder / "5.jpg").write_bytes(content[:2] + bytes(198) + content[200:])
batches = []
for kind in kinds:
    with create_loader(dataset, loader=kind, batch_size=5, img_size=(64, 64), seed=0, num_threads=2) as loader:
        batches.append([next(loader) for _ in range(4)])
        print("replaced:", [Path(bad.path).name for bad in loader.bad_files])
for first, second in zip(batches[0], batches[-1]):
    assert first.sample_ids.tolist() == second.sample_ids.tolist()
    assert (first.images.float() - second.images.float()).abs().mean() < 3

# A file that hangs, as on a dead server: a pipe that nobody writes to.
dataset, (pipe, _) = open_dataset(root / "hanging", cache_dir=root / "cache"), os.pipe()
read = dataset.storage.read
dataset.storage.read = lambda *where: os.read(pipe, 1) if where[-1] == 7 else read(*where)
for kind in kinds:
    loader, taken = create_loader(dataset, loader=kind, batch_size=4, img_size=(16, 16), seed=0, timeout=2), 0
    for again in (False, True):
        try:
            for batch in loader:
                taken += 1
        except DataError as error:
            assert taken <= 5
            print("again:" if again else "hangs:", " ".join(str(error).split("\\n")))

# Ending with loaders that nobody closed.
dataset = open_dataset(root / "large", cache_dir=root / "cache")
loaders = [create_loader(dataset, loader=kind, batch_size=64, img_size=(64, 64), seed=0) for kind in kinds]
for batches in zip(*loaders):
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_damage_hanging_files_and_early_ends_neither_crash_nor_keep_the_process(tmp_path):
    Image.fromarray(smooth(60, 80, 0)).save(tmp_path / "image.png")
    for name, count, size in (("large", 8, (300, 400)), ("hanging", 20, (30, 40))):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.jpg")
    write_images(tmp_path / "images", 8)
    command, root = [sys.executable, "-c", PROGRAM, tmp_path], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    loaders = 1 + has_dali()
    lines = done.stdout.splitlines()
    expected = ["decoders imported by the package: []", "refused many: True", "closed"]
    expected += ["replaced: ['3.jpg', '5.jpg']"] * loaders
    assert lines[: len(expected)] == expected, done.stderr[-2000:]
    hangs = lines[len(expected) :]
    assert [line.split(":")[0] for line in hangs] == ["hangs", "again"] * loaders, done.stderr[-2000:]
    assert all(part in line for line in hangs for part in ("no batch came within 2 s", "07.jpg", "--data.timeout"))
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode in (-2, 130)
