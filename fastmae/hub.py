"""Models for the Hugging Face hub: a folder with a model card, uploaded when asked, loaded by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file

import fastmae
from fastmae.evaluate.curves import Curves, draw_curves
from fastmae.interop.facebook import weights_of
from fastmae.loading import WeightsInfo, download, load
from fastmae.model.image_model import ImageModel
from fastmae.train.run_folder import read_rows

_CAUTION = """\
What a masked autoencoder fills in is generated. It follows the statistics of the images that the model was trained on,
with their biases, some of which are harmful, and it can show what does not exist. Consider this before you show or use
generated content (He et al. 2022, broader impacts)."""


class Pretrained(ModelHubMixin):
    """A model and what is known of its training, with the methods of ``huggingface_hub``'s mixin.

    ``save_pretrained(folder)`` writes weights, ``config.json`` and a model card, which shows the curves and the newest
    picture of a run; it sends nothing anywhere, writes no path of this machine, and keeps a card that is there.
    ``push_to_hub("owner/name")`` uploads these files. ``from_pretrained`` takes such a folder, or the name of a model
    on the hub, which may be of transformers or timm as well. :func:`fastmae.load` reads both too.

    Args:
        source: whatever :func:`fastmae.load` takes, or a model.
        data_license: licence of the training images, in your words.
        name: heading of the card. None: the name of the folder or repository.
        info: what is known of a model that was loaded before.

    Attributes:
        model: as :func:`fastmae.load` returns it.
        info: its :class:`fastmae.WeightsInfo`, if it was loaded.

    Raises:
        CheckpointError: as :func:`fastmae.load`.
    """

    def __init__(
        self,
        source: Path | str | ImageModel,
        data_license: str | None = None,
        name: str | None = None,
        info: WeightsInfo | None = None,
    ):
        is_model = isinstance(source, ImageModel)
        self.model, self.info = (source, info) if is_model else load(source, return_info=True)
        self.data_license, self.name = data_license, name

    def _save_pretrained(self, save_directory: Path) -> None:
        model, folder, run = self.model, save_directory, self.info.config if self.info else {}
        known = {"architecture": model.architecture, "step": self.info and self.info.step}
        metadata = {key: json.dumps(value) for key, value in known.items() if value is not None}
        weights = {key: tensor.contiguous() for key, tensor in weights_of(model).items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt", **metadata})
        settings = {key: run[key] for key in ("recipe", "recipe_version", "model", "train") if key in run}
        if "target" in settings.get("model", {}):  # "pixels", or a file
            settings["model"] = settings["model"] | {"target": Path(settings["model"]["target"]).name}
        settings["train"] = {k: v for k, v in settings.get("train", {}).items() if k != "init_from"}
        described = {"library_name": "fastmae", "fastmae_version": fastmae.__version__, **known, **settings}
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        if not (folder / "README.md").exists():
            figures = _figures(self.info.path, folder) if self.info and self.info.path.is_dir() else {}
            card = _card(model, run, self.name or folder.name, self.data_license, figures)
            (folder / "README.md").write_text(card)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, data_license: str | None = None, name: str | None = None, **options: Any
    ) -> Pretrained:
        return cls(model_id if Path(model_id).is_dir() else download(model_id, **options), data_license, name)


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
