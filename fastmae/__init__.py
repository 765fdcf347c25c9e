"""fastmae: fast pretraining of Masked Autoencoders (He et al., CVPR 2022), and the fused ops that make it fast.

``pretrain`` runs a pretraining, ``create_model`` builds a model, ``load`` reads one from weights of any source,
``create_classifier`` makes a classifier of them, ``extract_features`` encodes images, ``fastmae.ops`` holds the ops,
``accelerate`` lets Hugging Face's ViTMAE run on them, and the command line is ``fastmae --help``. Names are imported
when first used: ``import fastmae`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmae import hub, interop, ops
    from fastmae.evaluate.features import ImageFeatures, extract_features
    from fastmae.interop.hugging_face import accelerate
    from fastmae.loading import WeightsInfo, create_classifier, load
    from fastmae.model import MAEOutput, MaskedAutoencoderViT, create_model
    from fastmae.run import Run, pretrain

__version__ = "0.1.0"
__all__ = [
    "ImageFeatures",
    "MAEOutput",
    "MaskedAutoencoderViT",
    "Run",
    "WeightsInfo",
    "__version__",
    "accelerate",
    "create_classifier",
    "create_model",
    "extract_features",
    "hub",
    "interop",
    "load",
    "ops",
    "pretrain",
]


def __getattr__(name: str) -> object:
    if name in ("MAEOutput", "MaskedAutoencoderViT", "create_model"):
        return getattr(import_module("fastmae.model"), name)
    if name in ("Run", "pretrain"):
        return getattr(import_module("fastmae.run"), name)
    if name in ("WeightsInfo", "create_classifier", "load"):
        return getattr(import_module("fastmae.loading"), name)
    if name in ("ImageFeatures", "extract_features"):
        return getattr(import_module("fastmae.evaluate"), name)
    if name == "accelerate":
        return import_module("fastmae.interop.hugging_face").accelerate
    if name in ("ops", "model", "reference", "data", "interop", "hub"):
        return import_module(f"fastmae.{name}")
    raise AttributeError(f"module 'fastmae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
