"""Memory that a training step takes on the CPU: MAE's encoder, and one with mask tokens (the paper's Tables 1c and 2).

    python benchmarks/measure_memory.py --out benchmarks/results/<machine>/encoder-mask-tokens-memory.json

Each step is the first of a fresh process: the peak of its resident memory during forward and backward, above what it
held before. float32, without an optimiser.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import fastmae
from fastmae.environment import cpu_model

MODELS = ("mae_vit_base_patch16", "mae_vit_large_patch16")


def measure(name: str, mask_tokens: bool, batch_size: int) -> int:
    """Bytes."""
    torch.set_num_threads(1)
    model = fastmae.create_model(name, norm_pix_loss=True, encoder_mask_tokens=mask_tokens)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # which a step does not add
    images = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model(images, full_pred=False).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "MASK_TOKENS"), help="one step, in this process")
    given = parser.parse_args()
    if given.one:
        print(measure(given.one[0], given.one[1] == "True", given.batch_size))
        return
    found = {"cpu": cpu_model(), "torch": version("torch"), "batch_size": given.batch_size, "bytes_per_image": {}}
    for name in MODELS:
        words = [sys.executable, __file__, "--batch-size", str(given.batch_size), "--one", name]
        outputs = [subprocess.run([*words, str(which)], check=True, capture_output=True, text=True).stdout
                   for which in (False, True)]  # fmt: skip
        ours, theirs = (int(output) // given.batch_size for output in outputs)
        found["bytes_per_image"][name] = {"MAE": ours, "mask tokens in the encoder": theirs}
        print(
            f"{name}: {ours / 1e6:,.0f} MB per image, with mask tokens {theirs / 1e6:,.0f}, {theirs / ours:.2f} times"
        )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
