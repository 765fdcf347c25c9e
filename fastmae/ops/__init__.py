"""Fused, differentiable, compile-friendly ops for masking vision transformers.

Every op takes any strides, checks its arguments, runs a Triton kernel on CUDA tensors and frugal PyTorch elsewhere, and
works under autograd, autocast and ``torch.compile(fullgraph=True)``. Nothing here needs Triton or DALI installed.
"""

from fastmae.ops.attention import attention, attention_qkvpacked

__all__ = ["attention", "attention_qkvpacked"]
