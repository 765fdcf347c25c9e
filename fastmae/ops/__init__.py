"""Fused, differentiable, compile-friendly ops for masking vision transformers: masks, patches, tokens, and the blocks.

Every op takes any strides, checks its arguments, runs a Triton kernel on CUDA tensors and frugal PyTorch elsewhere, and
works under autograd, autocast and ``torch.compile(fullgraph=True)``. Nothing here needs Triton or DALI installed.
"""

from fastmae.ops.attention import attention, attention_kvpacked, attention_qkvpacked
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.gather_tokens import gather_tokens
from fastmae.ops.gelu_linear import gelu_linear
from fastmae.ops.masked_patch_mse import masked_patch_mse
from fastmae.ops.masking import Masking, masking_from_noise, random_masking, tube_masking
from fastmae.ops.norm_linear import norm_linear
from fastmae.ops.restore_tokens import restore_tokens

__all__ = [
    "Masking",
    "attention",
    "attention_kvpacked",
    "attention_qkvpacked",
    "gather_patches",
    "gather_tokens",
    "gelu_linear",
    "masked_patch_mse",
    "masking_from_noise",
    "norm_linear",
    "random_masking",
    "restore_tokens",
    "tube_masking",
]
