"""The trainer from JPEGs on a disk, the model alone and the loader alone: ``fastmae bench`` with the paper's models.

A few thousand JPEGs of ImageNet's usual size are cut from the embedded photographs, so that nothing has to be fetched.
They are read through the page cache: the disk itself is not measured. For GPUs.
"""

from __future__ import annotations

import json

import pytest
import torch

MODELS = {
    "large": "--recipe imagenet-vit-l --train.global-batch-size 256 --train.batch-size 256 --seconds 20",
    "huge": "--recipe imagenet-vit-h --train.global-batch-size 128 --train.batch-size 128 --seconds 8",
    **{
        f"base-{loader}": "--recipe imagenet-vit-b --train.global-batch-size 256 --train.batch-size 256 --seconds 8 "
        f"--data.loader {loader}"
        for loader in ("dali", "torch")
    },
}
TINY = (
    "--train.global-batch-size 4 --train.batch-size 4 --seconds 0.1 --train.num-threads 1 --data.num-threads 1 "
    "--train.device cpu --train.precision fp32 --model.img-size 32 --model.patch-size 16 --model.depth 1 "
    "--model.embed-dim 32 --model.num-heads 2 --model.decoder-embed-dim 32 --model.decoder-depth 1 "
    "--model.decoder-num-heads 2 --data.loader torch"
)


@pytest.mark.parametrize("model", MODELS)
def bench_end_to_end(request, store, tmp_path, model):
    tiny = request.config.getoption("--tiny")
    if not (tiny or torch.cuda.is_available()):
        pytest.skip("for GPUs; --tiny runs it")
    from loaders import write_photographs

    from fastmae.cli import main as fastmae

    images, out = tmp_path / "images", tmp_path / "found.json"
    write_photographs(images, count := 16 if tiny else 4096)
    flags = [*MODELS[model].split(), *(TINY.split() if tiny else [])]
    code = fastmae(["bench", "--data.path", str(images), "--json", str(out), *flags])
    assert code == 0, f"fastmae bench: exit code {code}"
    # Where the images lay for the moment means nothing to a reader of the results.
    found = json.loads(out.read_text().replace(str(images), f"{count} JPEGs"))
    store("end_to_end", name=model, found=found)
