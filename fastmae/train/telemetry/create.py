"""The reporter of a run, from its configuration."""

from __future__ import annotations

from rich.console import Console
from torch import nn

from fastmae.train.config import PretrainConfig
from fastmae.train.flops import count_flops
from fastmae.train.parallel import DTYPES, Parallelism
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.rank_values import RankValues
from fastmae.train.telemetry.reporter import Reporter


def create_reporter(
    config: PretrainConfig,
    model: nn.Module,
    run: RunFolder,
    console: Console,
    parallelism: Parallelism,
    ranks: Ranks,
    batch_size: int,
    accumulation: int,
) -> Reporter:
    """A reporter that knows how fast every rank computes, and how many FLOPs a step has.

    Args:
        batch_size, accumulation: masked images of a rank in one forward pass, and passes in a step.
    """
    device, interval = parallelism.device, config.train.log_every_steps

    def step_flops() -> int:  # of images as large as they are now
        architecture = model.architecture | {"img_size": model.input_size}
        return accumulation * ranks.size * count_flops(architecture, batch_size, config.model.mask_ratio)

    images = "" if config.data.path is None else f" --data.path {config.data.path}"
    blocks = model.blocks
    return Reporter(
        run,
        console,
        device,
        interval,
        f"fastmae bench --recipe {config.recipe}{images} says what would help",
        parallelism,
        rank_values=RankValues(ranks, device, interval, blocks[len(blocks) // 2], 3 * len(blocks) * accumulation),
        flops=step_flops,
        dtype=DTYPES[config.train.precision],
        wandb_project=config.report.wandb_project,
    )
