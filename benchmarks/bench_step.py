"""One training step: fastmae against the plain reference and Hugging Face's ViTMAE, eager and compiled, in one run.

Every competitor starts from the same uint8 batch, ends after the optimiser step, uses bf16 autocast (the eager
reference on CUDA also fp16 with a gradient scaler, as facebookresearch/mae trains) and fused AdamW, and keeps its
residual stream in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmae.model import PRESETS, MaskedAutoencoderViT, create_model
from fastmae.ops import random_masking
from fastmae.reference import MaskedAutoencoder

CUDA = torch.cuda.is_available()
CASES = [("mae_vit_base_patch16", 256), ("mae_vit_large_patch16", 256)] if CUDA else [("small-32px", 16)]
SMALL = {
    "img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 3,
    "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4,
}  # fmt: skip
COMPETITORS = ["fastmae", "fastmae-compile", "reference", "reference-compile", "reference-fp16", "transformers"]
MASK_RATIO = 0.75


def build_fastmae(name: str) -> MaskedAutoencoderViT:
    return create_model(name, seed=0) if name in PRESETS else MaskedAutoencoderViT(**SMALL, seed=0)


def build_reference(fast: MaskedAutoencoderViT) -> MaskedAutoencoder:
    kwargs = {key: value for key, value in fast.architecture.items() if key not in ("mean", "std")}
    kwargs |= {key: tuple(kwargs[key]) for key in ("img_size", "patch_size")}
    reference = MaskedAutoencoder(**kwargs)
    reference.load_state_dict(fast.state_dict())
    return reference


def build_transformers(fast: MaskedAutoencoderViT) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    a = fast.architecture
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=a["embed_dim"], num_hidden_layers=a["depth"], num_attention_heads=a["num_heads"],
            intermediate_size=int(a["embed_dim"] * a["mlp_ratio"]), image_size=a["img_size"][0],
            patch_size=a["patch_size"][0], decoder_hidden_size=a["decoder_embed_dim"],
            decoder_num_hidden_layers=a["decoder_depth"], decoder_num_attention_heads=a["decoder_num_heads"],
            decoder_intermediate_size=int(a["decoder_embed_dim"] * a["mlp_ratio"]), layer_norm_eps=1e-6,
            mask_ratio=MASK_RATIO,
        )
    )  # fmt: skip


def make_step(competitor: str, name: str, batch: int, device: torch.device) -> Callable[[], None]:
    fast = build_fastmae(name)
    if competitor.startswith("fastmae"):
        model = fast
    elif competitor == "transformers":
        model = build_transformers(fast)
    else:
        model = build_reference(fast)
    model = model.to(device).train()
    mean, std = (s.to(device).view(1, 3, 1, 1) for s in (fast.mean, fast.std))
    height, width = fast.img_size
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    dtype = torch.float16 if competitor.endswith("fp16") else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run(x: torch.Tensor, masking=None) -> torch.Tensor:
        if competitor.startswith("fastmae"):
            return model(x, masking=masking, full_pred=False).loss
        if competitor == "transformers":
            return model(x).loss
        return model(x, MASK_RATIO)[0]

    forward = torch.compile(run) if competitor.endswith("compile") else run
    position = 0

    def step() -> None:
        nonlocal position
        if competitor.startswith("fastmae"):
            masking = random_masking(batch, fast.num_patches, MASK_RATIO, seed=0, epoch=position, device=device)
            arguments = (images, masking)
        else:
            arguments = ((images / 255 - mean) / std,)
        with torch.autocast(device.type, dtype=dtype):
            loss = forward(*arguments)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        position += 1

    return step


@pytest.mark.parametrize("competitor", COMPETITORS)
@pytest.mark.parametrize(("name", "batch"), CASES)
def bench_step(benchmark, device, synchronized, name, batch, competitor):
    if not CUDA and competitor.endswith(("compile", "fp16")):
        pytest.skip("on a CPU the compiler's minutes would outweigh the run, and fp16 training is CUDA's")
    benchmark.group = f"training step {name}, batch {batch}"
    step = make_step(competitor, name, batch, device)
    for _ in range(3):
        step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(synchronized(step), rounds=20 if CUDA else 5, iterations=1)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["images per second"] = round(batch / benchmark.stats.stats.median, 1)
    if CUDA:
        benchmark.extra_info["peak memory MiB"] = torch.cuda.max_memory_allocated() >> 20
