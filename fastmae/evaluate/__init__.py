"""Looking at a pretrained model: reconstructions in pixels, their errors beside baselines, and figures."""

from fastmae.evaluate.baselines import fill_inverse_distance, fill_mean_color
from fastmae.evaluate.figure import Block, Row, draw
from fastmae.evaluate.reconstruction import Reconstruction, masked_error, masked_psnr, reconstruct
from fastmae.evaluate.sets import evaluate_sets, rows_of

__all__ = [
    "Block",
    "Reconstruction",
    "Row",
    "draw",
    "evaluate_sets",
    "fill_inverse_distance",
    "fill_mean_color",
    "masked_error",
    "masked_psnr",
    "reconstruct",
    "rows_of",
]
