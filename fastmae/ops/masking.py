"""Random masks as index tensors: which patches stay visible, which are masked, and how to put them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmae.ops import masking_plain
from fastmae.ops._check import as_pair, check, num_kept
from fastmae.ops._dispatch import load_kernels, takes_triton
from fastmae.ops.philox import MAX_SAMPLE_ID, Stream, split_seed

_kernels = load_kernels("masking")

_MAX_BLOCK = 2048
_MAX_DRAWS = 256

STRATEGIES = ("random", "block", "grid", "fixed-grid")
"""What ``random_masking`` can draw."""


class Masking(NamedTuple):
    """Which patches are masked. N samples, L patches, K visible, M = L - K masked.

    With R masks a sample every tensor has N * R rows, those of a sample adjacent.

    Attributes:
        ids_keep: int64 (N, K), the visible patches.
        ids_mask: int64 (N, M), the masked patches.
        ids_restore: int64 (N, L), where each patch stands in ``cat([ids_keep, ids_mask], dim=1)``.
        mask: float32 (N, L), 1 for masked and 0 for visible.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor
    mask: Tensor


def random_masking(
    n: int,
    num_patches: int,
    mask_ratio: float | None = None,
    *,
    num_keep: int | None = None,
    seed: int,
    epoch: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    device: torch.device | str | None = None,
    strategy: str = "random",
    grid_size: int | Sequence[int] | None = None,
    masks_per_image: int = 1,
) -> Masking:
    """Masks of exactly L - K patches, a pure function of (seed, epoch, sample id, draw).

    The same on every device and in every batch. K is ``int(L * (1 - mask_ratio))`` as in facebookresearch/mae. Ids are
    ascending, so that gathers walk memory in order; the encoder does not care. The strategies are those of He et al.
    2022, table 1f, on words of ``fastmae.ops.philox``, stream MASK:

    - "random", the paper's own (section 3, "Masking"): each patch gets a 32-bit key, and the K smallest keys stay
      visible, ties by patch index.
    - "block", the block-wise masking of BEiT (Bao et al. 2022, algorithm 1): rectangles are masked until enough patches
      are. A rectangle's area is uniform between 16 patches (a twelfth of smaller grids, but at least 1) and what is
      left to mask; its aspect ratio is log-uniform in [0.3, 1 / 0.3], in 256 steps; it is cut to the grid and lies
      anywhere in it, so that the middle is masked more often than the corners (0.98 and 0.2 of the time in a 14 x 14
      grid at a ratio of 0.75). Unlike in BEiT the count is exact: of the last rectangle only the first patches that are
      still needed are masked, row by row.
    - "grid" keeps one of every four patches, the same corner of all 2 x 2 cells. Which one the paper does not say;
      here it is drawn for each mask, since with a fixed one the encoder would never see three quarters of the
      positions.
    - "fixed-grid" always keeps the upper left corner of the cells.

    Args:
        n: number of samples, N; may be 0.
        num_patches: patches a sample, L.
        mask_ratio: share of patches to mask, in (0, 1); at least one patch must stay visible and one be masked.
        num_keep: K itself, in place of a ratio.
        seed: in [0, 2**63).
        epoch: in [0, 2**32), or int64 (N,) of such values, one a sample.
        sample_ids: int64 (N,), values in [0, 2**48); None means 0 .. N - 1.
        draw: in [0, 256): independent masks of the same sample in the same epoch.
        device: of the result; None means that of ``sample_ids`` or ``epoch``, else torch's default device.
        strategy: "random", "block", "grid" or "fixed-grid".
        grid_size: (rows, columns) of patches, or an int for a square, L in all; needed by all but "random". Grids
            take even numbers and a mask ratio of 0.75.
        masks_per_image: R: row n * R + r of the result is draw ``draw + r`` of sample n; ``draw + R`` is at most 256.

    Returns:
        Masking of N * R rows, ids ascending.

    Raises:
        ValueError: on a wrong range, shape, dtype or device. Values inside tensors are checked on the CPU only.
    """
    valid = isinstance(n, int | torch.SymInt) and not isinstance(n, bool) and n >= 0
    check(valid, "n", "an int >= 0", n)
    valid = isinstance(num_patches, int | torch.SymInt) and 2 <= num_patches < 1 << 31
    check(valid, "num_patches", "an int in [2, 2**31)", num_patches)
    check(isinstance(draw, int) and 0 <= draw < _MAX_DRAWS, "draw", f"an int in [0, {_MAX_DRAWS})", draw)
    valid = isinstance(masks_per_image, int) and 1 <= masks_per_image <= _MAX_DRAWS - draw
    check(valid, "masks_per_image", f"an int in [1, {_MAX_DRAWS} - draw]", masks_per_image)
    split_seed(seed)
    epochs = epoch if isinstance(epoch, Tensor) else None
    if epochs is None:
        valid = isinstance(epoch, int | torch.SymInt) and not isinstance(epoch, bool) and 0 <= epoch < 1 << 32
        check(valid, "epoch", lambda: f"an int in [0, 2**32) or an int64 tensor of shape ({n},)", epoch)
    if device is not None:
        device = torch.device(device)
    for name, tensor in (("sample_ids", sample_ids), ("epoch", epochs)):
        if tensor is None:
            continue
        valid = isinstance(tensor, Tensor) and tensor.dtype == torch.int64 and tuple(tensor.shape) == (n,)
        where = f" on {device}" if device else ""
        expected = lambda where=where: f"an int64 tensor of shape ({n},){where}"  # noqa: E731
        check(valid and _same_device(tensor.device, device), name, expected, tensor)
        device = tensor.device
    if device is None:
        device = torch.get_default_device()
    kept = num_kept(num_patches, mask_ratio, num_keep)
    grid = check_strategy(strategy, grid_size, num_patches, kept)
    epoch = 0 if epochs is not None else epoch
    return Masking(
        *_random_masking(
            n, num_patches, kept, seed, epoch, epochs, sample_ids, draw, device, masks_per_image, strategy, *grid
        )
    )


def tube_masking(
    n: int, times: int, num_patches: int, mask_ratio: float | None = None, *, seed: int, **options: Any
) -> Masking:
    """Masks over space that hold for all times, as videos need them (VideoMAE, Tong et al. 2022, section 3.2).

    Patch t * L + i of the result is patch i at time t. Visible patches of all times come first, time by time, so that
    ``ids_keep[:, :K]`` are those of one image.

    Args:
        n: number of samples, N.
        times: T, of patches; with tubelets of two frames, half the frames.
        num_patches: patches at one time, L.
        mask_ratio, seed, options: those of :func:`random_masking`, of the masks over space; ``num_keep`` too is K at
            one time.

    Returns:
        Masking of T * L patches, T * K of them visible.

    Raises:
        ValueError: ``times`` below 1, or as :func:`random_masking`.
    """
    check(isinstance(times, int) and times >= 1, "times", "an int >= 1", times)
    space = random_masking(n, num_patches, mask_ratio, seed=seed, **options)
    t = torch.arange(times, device=space.mask.device)[:, None]
    keep, mask, place = space.ids_keep.shape[1], space.ids_mask.shape[1], space.ids_restore[:, None]
    restore = torch.where(place < keep, place + t * keep, place - keep + times * keep + t * mask)
    ids_keep, ids_mask = ((ids[:, None] + t * num_patches).flatten(1) for ids in (space.ids_keep, space.ids_mask))
    return Masking(ids_keep, ids_mask, restore.flatten(1), space.mask.repeat(1, times))


def check_strategy(
    strategy: str, grid_size: int | Sequence[int] | None, num_patches: int, num_kept: int
) -> tuple[int, int]:
    """Rows and columns for a strategy, (1, L) where none are given and none are needed.

    Raises:
        ValueError: an unknown strategy, or a grid or number of visible patches that it cannot take.
    """
    check(strategy in STRATEGIES, "strategy", f"one of {', '.join(STRATEGIES)}", strategy)
    if grid_size is None:
        if strategy != "random":
            raise ValueError(f"grid_size: expected (rows, columns) of patches for strategy {strategy!r}, got None")
        return 1, num_patches
    rows, columns = as_pair("grid_size", grid_size)
    check(rows * columns == num_patches, "grid_size", f"rows * columns == num_patches ({num_patches})", grid_size)
    if strategy.endswith("grid"):
        what = f"strategy {strategy!r}"
        ratio = 1 - num_kept / num_patches
        check(4 * num_kept == num_patches, "mask_ratio", f"0.75 for {what}, which keeps one of every four", ratio)
        check(rows % 2 == columns % 2 == 0, "grid_size", f"even numbers for {what}", grid_size)
    return rows, columns


def _same_device(have: torch.device, want: torch.device | None) -> bool:
    return want is None or (have.type == want.type and want.index in (None, have.index))


@torch.library.custom_op("fastmae::random_masking", mutates_args=())
def _random_masking(
    n: int,
    num_patches: int,
    num_kept: int,
    seed: int,
    epoch: int,
    epochs: Tensor | None,
    sample_ids: Tensor | None,
    draw: int,
    device: torch.device,
    masks_per_image: int,
    strategy: str,
    grid_h: int,
    grid_w: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values("sample_ids", sample_ids, MAX_SAMPLE_ID)
    _check_values("epoch", epochs, (1 << 32) - 1)
    rows = n * masks_per_image
    mask = torch.empty(rows, num_patches, dtype=torch.float32, device=device)
    if strategy == "fixed-grid" or not takes_triton(mask, _kernels):  # nothing is drawn, so no kernel
        keys = masking_plain.keys_of_rows(n, seed, epoch, epochs, sample_ids, draw, masks_per_image, device)
        return masking_plain.draw_masks(keys, num_patches, num_kept, strategy, grid_h, grid_w)
    ids_keep, ids_mask, ids_restore = (
        torch.empty(rows, size, dtype=torch.int64, device=device)
        for size in (num_kept, num_patches - num_kept, num_patches)
    )
    block = min(max(1 << (num_patches - 1).bit_length(), 16), _MAX_BLOCK)
    # Eight patches a thread; up to 256 patches one warp, whose reductions need no barrier.
    options = {"BLOCK": block, "num_warps": max(block // 256, 1)}
    grid = {
        "random": (),
        "block": (grid_h, grid_w, masking_plain.min_block_area(num_patches)),
        "grid": (grid_w,),
    }[strategy]
    if strategy != "grid":
        options["SINGLE"] = num_patches <= block
    words = map(_signed, (*split_seed(seed), epoch, Stream.MASK << 16 | draw << 24))
    with torch.cuda.device_of(mask):
        getattr(_kernels, f"{strategy}_masking_kernel")[(rows,)](
            ids_keep, ids_mask, ids_restore, mask,
            None if sample_ids is None else sample_ids.contiguous(),
            None if epochs is None else epochs.contiguous(),
            num_patches, num_kept, masks_per_image, *grid, *words, **options,
        )  # fmt: skip
    return ids_keep, ids_mask, ids_restore, mask


@_random_masking.register_fake
def _(
    n, num_patches, num_kept, seed, epoch, epochs, sample_ids, draw, device, masks_per_image, strategy, grid_h, grid_w
):
    rows, sizes = n * masks_per_image, (num_kept, num_patches - num_kept, num_patches)
    ids = tuple(torch.empty(rows, size, dtype=torch.int64, device=device) for size in sizes)
    return *ids, torch.empty(rows, num_patches, dtype=torch.float32, device=device)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else int(word)


def _check_values(name: str, tensor: Tensor | None, largest: int) -> None:
    if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    low, high = (int(v) for v in tensor.aminmax())
    if low < 0 or high > largest:
        raise ValueError(f"{name}: expected values in [0, {largest}], got values in [{low}, {high}]")


def masking_from_noise(noise: Tensor, mask_ratio: float | None = None, *, num_keep: int | None = None) -> Masking:
    """The mask that keeps the patches of smallest noise, as facebookresearch/mae draws it.

    Its ``argsort`` is not stable; here ties keep the lower patch index first, on every device.

    Args:
        noise: floating point (N, L). float16 and bfloat16 have many ties; NaN counts as the largest value, and is
            refused on the CPU outside of ``torch.compile``.
        mask_ratio: share of patches to mask, in (0, 1); K is ``int(L * (1 - mask_ratio))``.
        num_keep: K itself, in place of a ratio.

    Returns:
        Masking, ids in the order of the noise: ``cat([ids_keep, ids_mask], 1)`` is ``argsort(noise)``.

    Raises:
        ValueError: on a wrong shape, dtype or ratio.
    """
    expected = "a floating point tensor of shape (N, L)"
    check(isinstance(noise, Tensor) and noise.is_floating_point() and noise.ndim == 2, "noise", expected, noise)
    kept = num_kept(noise.shape[1], mask_ratio, num_keep)
    noise = noise.detach().contiguous()
    if noise.device.type == "cpu" and not torch.compiler.is_compiling() and bool(noise.isnan().any()):
        raise ValueError(f"noise: expected numbers, got {int(noise.isnan().sum())} NaN")
    order = noise.argsort(dim=1, stable=True)
    ids_restore = masking_plain.invert(order)
    mask = (ids_restore >= kept).to(torch.float32)
    return Masking(order[:, :kept].contiguous(), order[:, kept:].contiguous(), ids_restore, mask)
