"""How long loaders hold the interpreter lock per image, which bounds the images per second of all threads together.

    python benchmarks/measure_lock.py --out benchmarks/results/<machine>/loader-lock.json

A preloaded library wraps the functions of the interpreter that take and release the lock, and sums the CPU time between
them over all threads; what the clock itself takes is measured and subtracted. CPU time, so that other processes only
disturb through the caches, which they do: on a busy machine the figures are up to twice as large. With tiny images
nearly all that is left is the lock; behind the decoding of a larger one, the interpreter finds the processor's caches
full of pixels, and the same Python takes longer. Each figure is the least of some rounds, with the median beside it.

It needs a C compiler, Linux, and a Python whose libpython is shared and calls its own functions through the dynamic
linker (no -fno-semantic-interposition); it stops where that is not so.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <time.h>
static _Atomic long long held, releases;
static __thread long long since;
static __thread int without;
static long long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void released(void) { if (!without) { held += now() - since; releases++; } without = 1; }
static void taken(void) { without = 0; since = now(); }
#define REAL(name, result, ...) static result (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
void *PyEval_SaveThread(void) { REAL("PyEval_SaveThread", void *, void); released(); return real(); }
void PyEval_ReleaseThread(void *s) { REAL("PyEval_ReleaseThread", void, void *); released(); real(s); }
void PyEval_RestoreThread(void *s) { REAL("PyEval_RestoreThread", void, void *); real(s); taken(); }
void PyEval_AcquireThread(void *s) { REAL("PyEval_AcquireThread", void, void *); real(s); taken(); }
long long held_ns(void) { return held; }
long long release_count(void) { return releases; }
long long clock_ns(void) {
  long long before = held, count = releases;
  for (int i = 0; i < 100000; i++) { taken(); released(); }
  long long cost = (held - before) / 100000;
  held = before, releases = count;
  taken();
  return cost;
}
"""
PICTURES = {"40 x 32": (16, 16), "500 x 375": (224, 224)}
"""Size of the JPEG files: size of the crops."""
FILES, BATCH_SIZE, BATCHES, ROUNDS = 512, 256, 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="now", help="of these figures in the file; others stay in it")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "held.so"
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
        subprocess.run(command, input=LIBRARY, text=True, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--measure", folder]
        found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    result[arguments.name] = json.loads(found.splitlines()[-1])
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path) -> dict[str, object]:
    import torch

    from fastmae.data import create_loader, has_dali, open_dataset

    library = ctypes.PyDLL(os.environ["LD_PRELOAD"])
    for function in (library.held_ns, library.release_count, library.clock_ns):
        function.restype = ctypes.c_longlong
    before = library.release_count()
    time.sleep(0)
    if library.release_count() == before:
        raise SystemExit("this Python does not call PyEval_SaveThread through the dynamic linker")
    clock = min(library.clock_ns() for _ in range(9))
    gc.freeze()  # as the trainer does after its first step
    found: dict[str, object] = {"python": sys.version.split()[0], "torch": torch.__version__}
    found |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "batch_size": BATCH_SIZE}
    for picture, size in PICTURES.items():
        for source in write_pictures(folder / picture, *map(int, picture.split(" x "))):
            dataset = open_dataset(source, cache_dir=folder / "cache")
            for kind in ("torch", "dali")[: 1 + has_dali()]:
                options = {"batch_size": BATCH_SIZE, "img_size": size, "seed": 0, "num_threads": 1, "cache_bytes": 0}
                with create_loader(dataset, loader=kind, **options) as loader:
                    for _ in range(3):
                        next(loader)
                    rounds = [one_round(library, loader, clock) for _ in range(ROUNDS)]
                held = sorted(us for us, _ in rounds)
                found[f"{kind}, {source.name}, {picture}"] = {
                    "held_us_per_image": round(held[0], 1),
                    "median": round(statistics.median(held), 1),
                    "releases_per_image": round(rounds[0][1], 1),
                }
    return found


def one_round(library: ctypes.PyDLL, loader, clock: int) -> tuple[float, float]:
    """Microseconds held and releases, per image."""
    held, releases, images = library.held_ns(), library.release_count(), BATCHES * BATCH_SIZE
    for _ in range(BATCHES):
        next(loader)
    releases = library.release_count() - releases
    return (library.held_ns() - held - releases * clock) / images / 1e3, releases / images


def write_pictures(root: Path, width: int, height: int) -> list[Path]:
    """JPEG files in a folder, and the same in tar shards."""
    folder, shards = root / "folder", root / "shards"
    folder.mkdir(parents=True)
    shards.mkdir()
    random = np.random.default_rng(0)
    for i in range(FILES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=90)
    for first in range(0, FILES, 128):
        with tarfile.open(shards / f"{first:04}.tar", "w") as tar:
            for i in range(first, first + 128):
                tar.add(folder / f"{i:04}.jpg", arcname=f"{i:04}.jpg")
    return [folder, shards]


if __name__ == "__main__":
    main()
