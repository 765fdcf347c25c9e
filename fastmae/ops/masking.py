"""Random masks as index tensors: which patches stay visible, which are masked, and how to put them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.ops._check import check, num_kept
from fastmae.ops._dispatch import load_kernels, takes_triton
from fastmae.ops.philox import MAX_SAMPLE_ID, Stream, random_words, split_seed

_kernels = load_kernels("masking")

_MAX_BLOCK = 2048


class Masking(NamedTuple):
    """Which patches are masked. N samples, L patches, K visible, M = L - K masked.

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
    mask_ratio: float,
    *,
    seed: int,
    epoch: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    device: torch.device | str | None = None,
) -> Masking:
    """Uniform random masks of exactly K patches, a pure function of (seed, epoch, sample id, draw).

    The same on every device and in every batch: each patch gets a 32-bit Philox key (``fastmae.ops.philox``, stream
    MASK), and the K smallest keys stay visible, ties by patch index. The mask of He et al. 2022, section 3.1 ("random
    sampling"); K is ``int(L * (1 - mask_ratio))`` as in facebookresearch/mae. Ids are ascending, so that gathers walk
    memory in order; the encoder does not care.

    Args:
        n: number of samples, N; may be 0.
        num_patches: patches a sample, L.
        mask_ratio: share of patches to mask, in (0, 1); at least one patch must stay visible and one be masked.
        seed: in [0, 2**63).
        epoch: in [0, 2**32), or int64 (N,) of such values, one a sample.
        sample_ids: int64 (N,), values in [0, 2**48); None means 0 .. N - 1.
        draw: in [0, 256): independent masks of the same sample in the same epoch.
        device: of the result; None means that of ``sample_ids`` or ``epoch``, else torch's default device.

    Returns:
        Masking, ids ascending.

    Raises:
        ValueError: on a wrong range, shape, dtype or device. Values inside tensors are checked on the CPU only.
    """
    valid = isinstance(n, int | torch.SymInt) and not isinstance(n, bool) and n >= 0
    check(valid, "n", "an int >= 0", n)
    valid = isinstance(num_patches, int | torch.SymInt) and 2 <= num_patches < 1 << 31
    check(valid, "num_patches", "an int in [2, 2**31)", num_patches)
    check(isinstance(draw, int) and 0 <= draw < 256, "draw", "an int in [0, 256)", draw)
    split_seed(seed)
    epochs = epoch if isinstance(epoch, Tensor) else None
    if epochs is None:
        valid = isinstance(epoch, int | torch.SymInt) and not isinstance(epoch, bool) and 0 <= epoch < 1 << 32
        check(valid, "epoch", f"an int in [0, 2**32) or an int64 tensor of shape ({n},)", epoch)
    if device is not None:
        device = torch.device(device)
    for name, tensor in (("sample_ids", sample_ids), ("epoch", epochs)):
        if tensor is None:
            continue
        expected = f"an int64 tensor of shape ({n},)" + (f" on {device}" if device else "")
        valid = isinstance(tensor, Tensor) and tensor.dtype == torch.int64 and tuple(tensor.shape) == (n,)
        check(valid and _same_device(tensor.device, device), name, expected, tensor)
        device = tensor.device
    if device is None:
        device = torch.get_default_device()
    kept = num_kept(num_patches, mask_ratio)
    epoch = 0 if epochs is not None else epoch
    return Masking(*_random_masking(n, num_patches, kept, seed, epoch, epochs, sample_ids, draw, device))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values("sample_ids", sample_ids, MAX_SAMPLE_ID)
    _check_values("epoch", epochs, (1 << 32) - 1)
    mask = torch.empty(n, num_patches, dtype=torch.float32, device=device)
    if not takes_triton(mask, _kernels):
        return _random_masking_plain(n, num_patches, num_kept, seed, epoch, epochs, sample_ids, draw, device)
    ids_keep, ids_mask, ids_restore = (
        torch.empty(n, size, dtype=torch.int64, device=device)
        for size in (num_kept, num_patches - num_kept, num_patches)
    )
    block = min(max(1 << (num_patches - 1).bit_length(), 16), _MAX_BLOCK)
    key_low, key_high = split_seed(seed)
    with torch.cuda.device_of(mask):
        _kernels.random_masking_kernel[(n,)](
            ids_keep, ids_mask, ids_restore, mask,
            None if sample_ids is None else sample_ids.contiguous(),
            None if epochs is None else epochs.contiguous(),
            num_patches, num_kept, *map(_signed, (key_low, key_high, epoch, Stream.MASK << 16 | draw << 24)),
            SINGLE=num_patches <= block, BLOCK=block,
            # Eight keys a thread; up to 256 patches one warp, whose reductions need no barrier.
            num_warps=max(block // 256, 1),
        )  # fmt: skip
    return ids_keep, ids_mask, ids_restore, mask


@_random_masking.register_fake
def _(n, num_patches, num_kept, seed, epoch, epochs, sample_ids, draw, device):
    sizes = (num_kept, num_patches - num_kept, num_patches)
    ids = tuple(torch.empty(n, size, dtype=torch.int64, device=device) for size in sizes)
    return *ids, torch.empty(n, num_patches, dtype=torch.float32, device=device)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else int(word)


def _check_values(name: str, tensor: Tensor | None, largest: int) -> None:
    if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    low, high = (int(v) for v in tensor.aminmax())
    if low < 0 or high > largest:
        raise ValueError(f"{name}: expected values in [0, {largest}], got values in [{low}, {high}]")


def _random_masking_plain(n, num_patches, num_kept, seed, epoch, epochs, sample_ids, draw, device):
    if sample_ids is None:
        sample_ids = torch.arange(n, device=device)
    if epochs is None:
        epochs = torch.full((n,), epoch, dtype=torch.int64, device=device)
    index = torch.arange(num_patches, device=device)
    # The patch index below the 32-bit word makes keys unique, so that one threshold a row settles ties as well.
    keys = (random_words(seed, epochs, sample_ids, Stream.MASK, num_patches, draw) << 31) | index
    threshold = keys.sort(dim=1).values[:, num_kept - 1 : num_kept]
    keep = keys <= threshold
    position = keep.cumsum(1)
    ids_restore = torch.where(keep, position - 1, num_kept + index - position)
    order = _invert(ids_restore)
    mask = torch.where(keep, 0.0, 1.0)
    # Copies: of one row, a contiguous slice would be a view, which an op may not return twice.
    return order[:, :num_kept].clone(), order[:, num_kept:].clone(), ids_restore, mask


def masking_from_noise(noise: Tensor, mask_ratio: float) -> Masking:
    """The mask that keeps the patches of smallest noise, as facebookresearch/mae draws it.

    Its ``argsort`` is not stable; here ties keep the lower patch index first, on every device.

    Args:
        noise: floating point (N, L). float16 and bfloat16 have many ties; NaN counts as the largest value, and is
            refused on the CPU outside of ``torch.compile``.
        mask_ratio: share of patches to mask, in (0, 1); K is ``int(L * (1 - mask_ratio))``.

    Returns:
        Masking, ids in the order of the noise: ``cat([ids_keep, ids_mask], 1)`` is ``argsort(noise)``.

    Raises:
        ValueError: on a wrong shape, dtype or ratio.
    """
    expected = "a floating point tensor of shape (N, L)"
    check(isinstance(noise, Tensor) and noise.is_floating_point() and noise.ndim == 2, "noise", expected, noise)
    kept = num_kept(noise.shape[1], mask_ratio)
    noise = noise.detach()
    if noise.device.type == "cpu" and not torch.compiler.is_compiling() and bool(noise.isnan().any()):
        raise ValueError(f"noise: expected numbers, got {int(noise.isnan().sum())} NaN")
    order = noise.argsort(dim=1, stable=True)
    ids_restore = _invert(order)
    mask = (ids_restore >= kept).to(torch.float32)
    return Masking(order[:, :kept].contiguous(), order[:, kept:].contiguous(), ids_restore, mask)


def _invert(permutation: Tensor) -> Tensor:
    """The inverse of each row's permutation, by a scatter instead of a second sort."""
    index = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, index)
