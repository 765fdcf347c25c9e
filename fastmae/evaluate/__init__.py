"""Looking at a pretrained model: reconstructions in pixels, their errors beside baselines, and figures; features of
labelled images, nearest neighbours and a linear classifier on them."""

from fastmae.evaluate.baselines import fill_inverse_distance, fill_mean_color
from fastmae.evaluate.features import Features, ImageFeatures, evaluating, extract_features, join_ranks, pooled_features
from fastmae.evaluate.figure import Block, Row, draw
from fastmae.evaluate.frozen import top_k_accuracy
from fastmae.evaluate.knn import knn_scores
from fastmae.evaluate.labelled import LabelledImages, choose_labelled, hold_out, match_classes
from fastmae.evaluate.linear import LinearClassifier, fit_linear
from fastmae.evaluate.online_probe import judge, probe
from fastmae.evaluate.reconstruction import Reconstruction, masked_error, masked_psnr, reconstruct
from fastmae.evaluate.sets import FixedSets, evaluate_sets, rows_of

__all__ = [
    "Block",
    "Features",
    "FixedSets",
    "ImageFeatures",
    "LabelledImages",
    "LinearClassifier",
    "Reconstruction",
    "Row",
    "choose_labelled",
    "draw",
    "evaluate_sets",
    "evaluating",
    "extract_features",
    "fill_inverse_distance",
    "fill_mean_color",
    "fit_linear",
    "hold_out",
    "join_ranks",
    "judge",
    "knn_scores",
    "masked_error",
    "masked_psnr",
    "match_classes",
    "pooled_features",
    "probe",
    "reconstruct",
    "rows_of",
    "top_k_accuracy",
]
