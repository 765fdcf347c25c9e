"""``--train``: optimisation, devices, saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how the run is logged and saved. The defaults are Table 8 of the paper,
    except for length and warm-up, which the recipe sets."""

    global_batch_size: int = 4096
    """Masked images that one optimiser step averages over, an image masked several times counted as many times. The
    learning rate follows it: base_lr * global_batch_size / 256."""
    batch_size: int | Literal["auto"] | None = None
    """Masked images in one forward pass on one device, at most; gradients accumulate up to the global batch, which must
    be a multiple. With several processes it is the largest divisor of their share of the global batch that is not
    larger. auto: the largest that fits the GPU, by a short trial. None: no accumulation."""
    masks_per_image: int = 1
    """Masks for each decoded image, which is read in place for every one of them (repeated sampling, Feichtenhofer et
    al. 2022; there each with a crop of its own, here all of one crop). Batches and epochs count masked images, so that
    the steps, their size and the learning rate stay as they are and decoding is divided by this number."""
    epochs: float | None = None
    """Length of the run in passes over the data, an image masked several times counted as many times. Give this or
    steps, not both."""
    steps: int | None = None
    """Length of the run in optimiser steps. Give this or epochs, not both."""
    warmup_epochs: float | None = None
    """Linear warm-up, in passes over the data. Give this or warmup_steps, not both; with neither, the recipe's,
    but never a larger share of the run than the recipe's."""
    warmup_steps: int | None = None
    """Linear warm-up, in optimiser steps."""
    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256; scaled linearly with the global batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, not scaled."""
    weight_decay: float = 0.05
    """AdamW's weight decay; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    optimizer: Literal["adamw", "apex"] = "adamw"
    """adamw: PyTorch's fused AdamW. apex: FusedAdam of NVIDIA's apex, if installed; the same computation on CUDA, not
    with fsdp or hsdp."""
    init_from: Path | None = None
    """Weights to start from: a .pth file of facebookresearch/mae, .safetensors under its names, a folder of a Hugging
    Face ViTMAE, a run folder or a checkpoint. All shapes must fit; a decoder that is not there is drawn anew. A resumed
    run goes on from its own checkpoint. None: random weights."""
    clip_grad: float | None = None
    """Largest global gradient norm. None: no clipping."""
    rollback_after: int = 20
    """Steps in a row without a finite gradient, each of them skipped, after which the run goes back to the newest
    checkpoint before them and on with other images."""
    max_rollbacks: int = 3
    """Times that a run goes back before it ends with an error."""
    seed: int = 0
    """Seed of the initialisation, the sample order, the crops and the masks."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16: autocast to bfloat16, weights and optimiser in float32. fp16: the same with float16 and a loss scale, for
    GPUs without bfloat16. auto: bf16 on CUDA, on a CPU whichever of bf16 and fp32 multiplies matrices faster, measured
    at the start; a resumed run keeps what was chosen."""
    compile: Literal["none", "blocks", "model"] = "none"
    """Compile with torch.compile. blocks: each block, which takes seconds, since blocks of one shape share their code.
    model: the whole model, which takes minutes; in several processes each block all the same."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile. reduce-overhead: CUDA graphs, on a GPU and not with fsdp or hsdp. max-autotune: these, and
    matrix products chosen by trial at the first step, which takes minutes. max-autotune-no-cudagraphs: trial only."""
    cuda_graph: bool = False
    """Capture the whole step (forward, backward, clipping, update) in a CUDA graph after three ordinary ones, so that
    the host launches it at once. The same computation. On one GPU, with images of one size."""
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """What the processes that torchrun starts share. ddp: gradients; each has the whole model. fsdp: also weights and
    optimiser state, sharded over all. hsdp: sharded inside a node, replicated across nodes. auto: none for one process,
    ddp for several."""
    shard_size: int | None = None
    """Processes that share one copy of the model with hsdp. None: those of a node."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Memory for work: what is computed again in the backward. selective: the blocks' attention, which spares two
    fifths of the activations for about a tenth more operations. full: the blocks, three quarters for a quarter."""
    reshard_after_forward: bool = True
    """With fsdp and hsdp, free a block's gathered weights after its forward and gather them again for its backward.
    Off: faster for small models, which then take their whole memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA where there is a GPU."""
    num_threads: int | None = None
    """CPU threads of PyTorch. None: PyTorch's default. Exact resume needs the same number."""
    max_minutes: float | None = None
    """End the training after this many minutes even if steps are left. None: no limit."""
    fit_steps: bool = False
    """Fit the run into max_minutes: time the first steps, then set the number of steps once, at most the one given, so
    that the learning rate's cosine ends in time. A resumed run keeps the number. Naming --train.steps or --train.epochs
    turns a recipe's fit_steps off."""
    log_every_steps: int = 20
    """Steps between two rows of metrics."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints. None: by time only. The end of the run is always saved."""
    checkpoint_every_seconds: float | None = 600.0
    """Seconds between two checkpoints. None: by steps only."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep."""
    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of this are kept for ever. None: none is."""
    background_save: bool | None = None
    """Write checkpoints while the training goes on, which waits for a copy in host memory only. None: on a GPU."""
