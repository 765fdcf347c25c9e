"""DALI's operators, and what they are fed with: from files' bytes to crops, and on a GPU to finished images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types

from fastmae.data.plan import Plan

_COLORS = ("brightness", "contrast", "saturation", "hue")
_NO_JITTER = (1.0, 1.0, 1.0, 0.0)


def input_names(finished: bool, jitter: bool) -> list[str]:
    """The inputs of a pipeline that gives crops, or finished images with or without colour jitter."""
    names = ["encoded", "anchors", "shapes"]
    if finished:
        names += ["sizes", "left_right", "top_bottom", *(_COLORS if jitter else ())]
    return names


def input_values(plan: Plan, encoded: list[np.ndarray]) -> dict[str, list[np.ndarray] | np.ndarray]:
    """All inputs for a batch: its files' bytes, and its plan as DALI wants it."""
    jitter = np.tile(_NO_JITTER, (len(encoded), 1)) if plan.jitter is None else plan.jitter
    brightness, contrast, saturation, turn = np.ascontiguousarray(jitter.T, np.float32)
    return {
        "encoded": encoded,
        "anchors": plan.boxes[:, :2].astype(np.int32),
        "shapes": plan.boxes[:, 2:].astype(np.int32),
        "sizes": np.tile(np.float32(plan.img_size), (len(encoded), 1)),
        "left_right": plan.flips[:, 0].astype(np.int32),
        "top_bottom": plan.flips[:, 1].astype(np.int32),
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": 360 * turn,
    }


def decoded_crops(inputs: Mapping, device: str, hints: Mapping):
    """Decode the plan's boxes: uint8 (height, width, 3) each.

    Args:
        inputs: data nodes by name.
        device: ``"cpu"``, or ``"mixed"`` for decoding on the GPU.
        hints: further arguments for the decoder.
    """
    return fn.decoders.image_slice(
        inputs["encoded"],
        inputs["anchors"],
        inputs["shapes"],
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        # The boxes are those of upright images, and so must be DALI's idea of the image.
        adjust_orientation=True,
        device=device,
        **hints,
    )


def finished_images(crops, inputs: Mapping):
    """Resize crops (bicubic, antialiased), mirror them and change their colours, wherever the crops are.

    Colours differ a little from those of ``augment.jitter_into``: DALI applies all four factors at once, turns contrast
    around mid-grey instead of the image's mean, and hue in a linear space instead of HSV.
    """
    images = fn.resize(crops, size=inputs["sizes"], interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=inputs["left_right"], vertical=inputs["top_bottom"])
    if "hue" in inputs:
        images = fn.color_twist(images, **{name: inputs[name] for name in _COLORS})
    return images
