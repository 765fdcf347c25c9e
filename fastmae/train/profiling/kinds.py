"""What kind of work a recorded operator or kernel does, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

MATMUL, ATTENTION, OWN = "matrix products", "attention", "fastmae's kernels"
ELEMENTWISE, REDUCTION, COPY = "norms and elementwise", "reductions", "copies and casts"
OPTIMIZER, COMMUNICATION, DECODING = "optimiser", "communication", "image decoding"
OTHER, BETWEEN, WAITING, IDLE = "other", "between operators", "waiting for images", "idle device"

KINDS = (
    MATMUL, ATTENTION, OWN, ELEMENTWISE, REDUCTION, COPY, OPTIMIZER, COMMUNICATION, DECODING, OTHER, BETWEEN, WAITING,
    IDLE,
)  # fmt: skip
"""In the order in which they are shown. "between operators" is a CPU's, "idle device" a GPU's."""

OWN_KERNELS = (
    "gather_patches_fwd_kernel", "gather_patches_bwd_kernel", "gather_tokens_kernel", "scatter_tokens_kernel",
    "bias_gelu_fwd_kernel", "bias_gelu_bwd_kernel", "masked_patch_mse_fwd_kernel", "masked_patch_mse_bwd_kernel",
    "random_masking_kernel", "block_masking_kernel", "grid_masking_kernel", "add_norm_fwd_kernel",
    "add_norm_bwd_kernel", "restore_tokens_kernel", "mask_token_grad_kernel", "mask_table_grad_kernel",
)  # fmt: skip
"""Triton kernels of fastmae's but those of attention, which are counted with everybody's attention."""

_KERNELS = (
    (COMMUNICATION, r"nccl|rccl|one_shot_all_reduce|two_shot_all_reduce|multimem"),
    (OWN, r"\b(" + "|".join(OWN_KERNELS) + r")"),
    (ATTENTION, r"attention|flash|fmha|sdpa|softmax"),
    (COPY, r"memcpy|memset"),
    # Foreach kernels name the job in their arguments: copies of weights, the norm of the gradients, AdamW.
    (COPY, r"multi_tensor_apply.*copy"),
    (OPTIMIZER, r"multi_tensor_apply|lpnorm|fused_?adam|adamw"),
    (MATMUL, r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|triton_tem_|triton_mm|\bcijk_|winograd|implicit_convolve"),
    (ELEMENTWISE, r"layer_?norm|gammabeta|computegradinput|gelu"),
    # Inductor: pointwise, persistent and looped reductions; what is fused stands in the name.
    (COPY, r"triton_poi_fused(_(_to_copy|clone|cat|copy_|view|permute|transpose|t))+_\d+"),
    (ELEMENTWISE, r"triton_poi_|triton_for_"),
    (REDUCTION, r"triton_(per|red|mix)_|reduce_kernel|reduce_1block"),
    (COPY, r"copy_kernel|copy_device|catarray|copy_cast|transpose_kernel"),
    (ELEMENTWISE, r"elementwise|fillfunctor|index|gather|scatter|arange|distribution|triu|tril"),
)  # fmt: skip
_KERNEL_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KERNELS)

_WHOLE_OPS = (
    (COMMUNICATION, re.compile(r"^(c10d|_c10d_functional|gloo|nccl|DistributedDataParallel)|^record_param_comms")),
    (OPTIMIZER, re.compile(r"^Optimizer\.|_fused_adam|^aten::_foreach_(norm|mul_)|linalg_vector_norm")),
    (ATTENTION, re.compile(r"^(fastmae::|GeneratedBackwardFor_fastmae_)\w*attention|^aten::_?(scaled_dot|flash)")),
    (OWN, re.compile(r"^fastmae::(random_masking|gather_|scatter_|restore_tokens|masked_patch_mse|mask_to)")),
)
"""Operators that are of one kind with all that they call."""

_LEAF_OPS = (
    (MATMUL, re.compile(r"^(aten::|mkldnn::)(\w*mm\w*|mv|linear|mkldnn_\w*|\w*convolution\w*|_mkl_linear|addbmm)$")),
    (COPY, re.compile(r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|_foreach_copy_?|resolve_\w+)$")),
    (REDUCTION, re.compile(r"^aten::(sum|mean|amax|amin|any|all|norm|max|min|var\w*|std\w*|cumsum|nansum)$")),
    (ATTENTION, re.compile(r"^aten::_?(log_)?softmax")),
    (ELEMENTWISE, re.compile(r"^aten::")),
    # What the compiler generated for a CPU has no name inside of its graph.
    (ELEMENTWISE, re.compile(r"^## Call CompiledFxGraph|^cpp_fused")),
)


def kind_of_kernel(name: str, operators: Sequence[str] = ()) -> str:
    """The kind of a kernel, copy or fill on a GPU.

    Args:
        name: as the driver has it, mangled or not.
        operators: the operators that it was launched in, outermost first; asked where the name says nothing.
    """
    for kind, pattern in _KERNEL_PATTERNS:
        if pattern.search(name):
            return kind
    kind = kind_of_operators(operators)
    return OTHER if kind == BETWEEN else kind


def is_trained_with(name: str) -> bool:
    """Whether a kernel whose launch nobody recorded, as in a CUDA graph, is the training's and not the loader's."""
    trained = {MATMUL, ATTENTION, OWN, OPTIMIZER, COMMUNICATION, REDUCTION}
    return "at::native" in name or name.startswith("triton_") or kind_of_kernel(name) in trained


def kind_of_operators(operators: Sequence[str]) -> str:
    """The kind of what a CPU does inside these operators, outermost first, and outside of any other."""
    for name in operators:
        for kind, pattern in _WHOLE_OPS:
            if pattern.search(name):
                return kind
    for kind, pattern in _LEAF_OPS:
        if operators and pattern.search(operators[-1]):
            return kind
    return BETWEEN
