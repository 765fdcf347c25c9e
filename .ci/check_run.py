"""Check the outputs of a pretraining run. ``--whole`` also asks for what only the whole default run can reach."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image

import fastmae

GOALS = {"bf16": (0.32, 0.29), "fp32": (0.36, 0.29)}
"""Errors on new crops and on a photograph that the model never saw, which the default run reaches in its time on two
cores. In fp32, on a CPU without fast bf16, fewer steps fit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    run = arguments.run

    problems = []
    summary = json.loads((run / "summary.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        problems.append(f"losses are missing or not finite: {losses}")
    elif not losses[-1] < 0.8 * losses[0]:
        problems.append(f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    fastmae.load(run)
    with Image.open(summary["picture"]) as picture:
        picture.load()
        if min(picture.size) < 300:
            problems.append(f"the picture is only {picture.size}")

    length = f"{summary['steps']} steps in {summary['precision']}, {summary['seconds']:.0f} s"
    print(f"{length}, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    sets = summary["sets"]
    if len(sets) != 2:
        problems.append(f"expected two sets of pictures, got {list(sets)}")
    for goal, (name, numbers) in zip(GOALS[summary["precision"]], sets.items(), strict=False):
        error, color, distance = (numbers[k] for k in ("mse", "mse_mean_color", "mse_inverse_distance"))
        print(f"{name}: error {error:.3f}; mean colour {color:.3f}, inverse distance {distance:.3f}")
        if not all(math.isfinite(value) and value > 0 for value in (error, color, distance)):
            problems.append(f"{name}: an error is not finite and positive")
        if arguments.whole and error > min(goal, color):
            problems.append(f"{name}: error {error:.3f} is above {min(goal, color):.3f}")
        for image in numbers.get("images", []):
            error, color, distance = (image[k] for k in ("mse", "mse_mean_color", "mse_inverse_distance"))
            print(f"  {image['name']}: error {error:.3f}; mean colour {color:.3f}, inverse distance {distance:.3f}")
    if arguments.whole and summary["seconds"] > 240:
        problems.append(f"training took {summary['seconds']:.0f} s, more than four minutes")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
