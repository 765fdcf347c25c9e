"""Models on the Hugging Face hub: a folder with a model card, which is uploaded when asked and loaded by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

import fastmae
from fastmae.evaluate.curves import Curves, draw_curves
from fastmae.interop.facebook import weights_of
from fastmae.loading import HUB, WeightsInfo, load
from fastmae.model.image_model import ImageModel
from fastmae.train.run_folder import read_rows

_CAUTION = """\
What a masked autoencoder fills in is generated. It follows the statistics of the images that the model was trained on,
with their biases, some of which are harmful, and it can show what does not exist. Consider this before you show or use
generated content (He et al. 2022, broader impacts)."""


def save_pretrained(
    source: Path | str | nn.Module, folder: Path | str, *, data_license: str | None = None, name: str | None = None
) -> Path:
    """Write a folder for the hub: weights, ``config.json``, and a model card with curves and picture of the run.

    Nothing is sent anywhere, and no path of this machine is written.

    Args:
        source: whatever :func:`fastmae.load` takes; of a run folder the card has the recipe, its settings, the curves
            and the newest reconstruction. Or a model.
        folder: what to write; :func:`fastmae.load` reads it.
        data_license: licence of the training images, in your words.
        name: heading of the card. None: the folder's name.

    Raises:
        CheckpointError: as :func:`fastmae.load`.
        FileExistsError: the folder is not new.
    """
    model, info = (source, None) if isinstance(source, ImageModel) else load(source, return_info=True)
    return write(model, Path(folder), info, data_license, name)


def from_pretrained(name: Path | str, **options: Any) -> Any:
    """:func:`fastmae.load` of such a folder, or of a model on the hub by its name, ``owner/name`` or
    ``owner/name@revision``, which may be of transformers or timm as well."""
    return load(name if Path(name).exists() else f"{HUB}{name}", **options)


def push_to_hub(folder: Path | str, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder that :func:`save_pretrained` wrote as ``owner/name``, which is made if it is not there; return
    its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder).repo_url)


def write(
    model: ImageModel, folder: Path, info: WeightsInfo | None, data_license: str | None = None, name: str | None = None
) -> Path:
    """As :func:`save_pretrained`, of a loaded model."""
    folder.mkdir(parents=True)
    run = {} if info is None else info.config
    known = {"architecture": model.architecture, "step": info and info.step}
    metadata = {key: json.dumps(value) for key, value in known.items() if value is not None}
    weights = {key: tensor.contiguous() for key, tensor in weights_of(model).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt", **metadata})
    settings = {key: run[key] for key in ("recipe", "recipe_version", "model", "train") if key in run}
    if "target" in settings.get("model", {}):  # "pixels", or a file
        settings["model"] = settings["model"] | {"target": Path(settings["model"]["target"]).name}
    settings["train"] = {k: v for k, v in settings.get("train", {}).items() if k != "init_from"}
    described = {"library_name": "fastmae", "fastmae_version": fastmae.__version__, **known, **settings}
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    figures = _figures(info.path, folder) if info is not None and info.path.is_dir() else {}
    (folder / "README.md").write_text(_card(model, run, name or folder.name, data_license, figures))
    return folder


def _figures(run: Path, folder: Path) -> dict[str, str]:
    """Draw the curves and copy the newest picture of a run; their files by caption."""
    figures, rows = {}, read_rows(run / "metrics.jsonl")
    pictures = sorted((run / "reconstructions").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        shutil.copyfile(pictures[-1], folder / "reconstruction.png")
        figures["Masked, reconstructed and original images"] = "reconstruction.png"
    if rows:
        curves = Curves("training", rows, read_rows(run / "evaluations.jsonl"))
        draw_curves([curves], folder / "curves.png")
        figures["Curves of the training"] = "curves.png"
    return figures


def _card(
    model: ImageModel, run: Mapping[str, Any], name: str, data_license: str | None, figures: Mapping[str, str]
) -> str:
    known = model.architecture
    (height, width), (rows, columns) = model.img_size, model.patch_size
    decodes = getattr(model, "has_decoder", False)
    classes = known.get("num_classes")
    kind = "encoder of a masked autoencoder (He et al., CVPR 2022)"
    kind = "Vision Transformer that classifies images" if classes else kind.removeprefix("encoder of a " * decodes)
    parts = {
        "model": kind,
        "encoder": f"{known['depth']} blocks of {known['embed_dim']}, {known['num_heads']} heads",
        "images": f"{height} x {width} pixels, {known['in_chans']} channels, patches of {rows} x {columns}",
        "parameters": f"{sum(tensor.numel() for tensor in weights_of(model).values()):,}",
    }
    if decodes:
        pixels = {True: "normalised pixels", False: "plain pixels"}.get(known.get("norm_pix_loss"), "pixels")
        parts["decoder"] = f"{known['decoder_depth']} blocks of {known['decoder_embed_dim']}, predicts {pixels}"
    if classes:
        parts["classes"] = str(classes)
    if run:
        train, path = run["train"], run["data"]["path"]
        parts["recipe"] = f"{run.get('recipe')}, version {run.get('recipe_version')}"
        parts["data"] = "the photographs that come with fastmae" if path is None else Path(path).name
        length = f"{train['epochs']} epochs" if train.get("epochs") else f"{train.get('steps')} steps"
        parts["training"] = f"{length} of batches of {train['global_batch_size']}; all settings are in config.json"
    parts["licence of the data"] = data_license or "not stated"
    table = "\n".join(f"| {key} | {value} |" for key, value in parts.items())
    shown = "".join(f"\n![{caption}]({file})\n\n*{caption}.*\n" for caption, file in figures.items())
    return f"""---
library_name: fastmae
pipeline_tag: {"image-classification" if classes else "image-feature-extraction"}
tags: [masked-autoencoder, vision-transformer, self-supervised-learning]
---

# {name}

| | |
| --- | --- |
{table}

```python
import fastmae

model = fastmae.load("hf-hub:OWNER/{name}")     # or a local copy of this folder
tokens = model.encode(images)                   # uint8 (N, {known["in_chans"]}, {height}, {width})
```
{shown}
## Caution

{_CAUTION}
"""
