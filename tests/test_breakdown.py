"""Where a step's time goes: names to kinds, spans to shares that add up, overlapping kernels counted once."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking
from fastmae.train.profiling.breakdown import Kernel, break_down_device, break_down_host
from fastmae.train.profiling.kinds import OWN_KERNELS, kind_of_kernel, kind_of_operators
from fastmae.train.profiling.records import break_down
from fastmae.train.profiling.spans import Span, Timeline, segments

KERNELS = {
    "matrix products": [
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nt_align8>(...)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)",
        "triton_tem_fused_mm_12",
        "Cijk_Ailk_Bljk_BBS_BH_MT128x128x32_MI32x32x8x1",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>(pytorch_flash::Params)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>(...)",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<...>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_knob_6_128x128x64_4x1x1_kernel0_0",
        "attention_fwd_kernel",
        "attention_bwd_kernel",
        "void (anonymous namespace)::softmax_warp_forward<float, c10::BFloat16, float, 8, false, false>(...)",
    ],
    "fastmae's kernels": ["add_norm_fwd_kernel", "masked_patch_mse_bwd_kernel", "gather_tokens_kernel"],
    "norms and elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(...)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel<float, float>(...)",
        "triton_poi_fused_add_gelu_3",
        "triton_per_fused__to_copy_add_native_layer_norm_view_7",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1>>",
    ],
    "reductions": [
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "triton_red_fused_sum_4",
        "triton_per_fused_mean_pow_2",
    ],
    "copies and casts": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(TensorIteratorBase&)>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<OpaqueType<2>, unsigned int, 3, 64, 64>",
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<c10::BFloat16, float, 2, 1, 1>>",
        "triton_poi_fused__to_copy_clone_9",
    ],
    "optimiser": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4, ...>>",
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, NormType::L2, float>>",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_ReduceScatter_RING_LL_Sum_float",
    ],
    "other": ["mystery_kernel"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_a_kernel_is_known_by_its_name(kind, name):
    assert kind_of_kernel(name) == kind


def test_every_triton_kernel_of_ours_has_a_kind():
    named = set()
    for path in (Path(__file__).parent.parent / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                named.add(node.name)
    assert len(named) > 10
    assert named == {*OWN_KERNELS, "attention_fwd_kernel", "attention_bwd_kernel"}


def test_a_kernel_of_unknown_name_is_known_by_its_operator():
    assert kind_of_kernel("kernel0", ("aten::matmul", "aten::mm")) == "matrix products"
    assert kind_of_kernel("kernel0", ("fastmae::masked_patch_mse",)) == "fastmae's kernels"
    assert kind_of_kernel("kernel0", ("SomeFunctionBackward",)) == "other"


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        ("matrix products", ["aten::linear", "aten::addmm"]),
        ("matrix products", ["fastmae::norm_linear", "aten::mm"]),
        ("attention", ["fastmae::plain_attention_qkvpacked", "aten::bmm"]),
        ("attention", ["aten::_scaled_dot_product_flash_attention_for_cpu"]),
        ("fastmae's kernels", ["fastmae::masked_patch_mse_backward", "aten::mul"]),
        ("optimiser", ["Optimizer.step#AdamW.step", "aten::_fused_adamw_"]),
        ("copies and casts", ["aten::to", "aten::_to_copy", "aten::copy_"]),
        ("reductions", ["aten::sum"]),
        ("norms and elementwise", ["aten::layer_norm", "aten::native_layer_norm"]),
        ("communication", ["c10d::allreduce_"]),
        ("attention", ["CompiledFunction", "## Call CompiledFxGraph abc ##", "aten::_softmax"]),
        ("norms and elementwise", ["CompiledFunction", "## Call CompiledFxGraph abc ##"]),
        ("between operators", ["autograd::engine::evaluate_function: AddmmBackward0"]),
        ("between operators", []),
    ],
)
def test_an_operator_is_known_by_its_name_and_by_what_calls_it(kind, operators):
    assert kind_of_operators(operators) == kind


def test_time_belongs_to_the_innermost_span():
    spans = [Span("b", 2, 4), Span("a", 0, 10), Span("c", 3, 4), Span("d", 9, 12), Span("e", 20, 21)]
    found = [(s.begin, s.end, s.names) for s in segments(spans)]
    assert found == [
        (0, 2, ("a",)), (2, 3, ("a", "b")), (3, 4, ("a", "b", "c")), (4, 9, ("a",)), (9, 10, ("a", "d")),
        (20, 21, ("e",)),
    ]  # fmt: skip
    timeline = Timeline(spans)
    assert (timeline.at(3.5), timeline.at(15), timeline.at(-1)) == (("a", "b", "c"), (), ())


def test_a_hosts_step_adds_up():
    spans = [
        Span("data", 0, 10), Span("forward", 10, 60), Span("encoder", 20, 40), Span("aten::mm", 22, 38),
        Span("fastmae::masked_patch_mse", 50, 55), Span("backward", 60, 90), Span("aten::mm", 60, 85),
        Span("optimizer", 90, 95), Span("Optimizer.step#AdamW.step", 91, 94),
    ]  # fmt: skip
    found = break_down_host(spans, (0, 100), steps=2)
    ms = {name: value * 2e3 for name, value in found.stages.items()}
    assert ms == pytest.approx({
        "waiting for images": 10, "encoder": 20, "loss": 5, "forward": 25, "backward": 30, "norm and optimiser": 5,
        "the rest": 5,
    })  # fmt: skip
    ms = {name: value * 2e3 for name, value in found.kinds.items()}
    assert ms == pytest.approx({
        "matrix products": 41, "fastmae's kernels": 5, "optimiser": 3, "between operators": 41,
        "waiting for images": 10,
    })  # fmt: skip
    assert found.attributed == 1
    assert found.step_ms == pytest.approx(0.05)


LABELS = Timeline([Span("data", 0, 10), Span("forward", 10, 30), Span("backward", 30, 50), Span("optimizer", 50, 60)])


def device_ms(*kernels: Kernel) -> tuple[dict, dict, dict]:
    found = break_down_device(kernels, LABELS, (0, 100), steps=1)
    assert math.fsum(found.stages.values()) == pytest.approx(found.step_ms)
    assert math.fsum(found.kinds.values()) == pytest.approx(found.step_ms)
    tables = (found.stages, found.kinds, found.hidden)
    return tuple({name: round(ms * 1e3, 6) for name, ms in table.items()} for table in tables)


def test_a_kernel_belongs_to_the_stage_that_launched_it_whenever_it_runs():
    stages, kinds, hidden = device_ms(Kernel("nvjet_a", 12, 40, launched=11), Kernel("nvjet_b", 40, 90, launched=31))
    assert stages == {"waiting for images": 10, "forward": 28, "backward": 50, "idle device": 12}
    assert kinds == {"matrix products": 78, "waiting for images": 10, "idle device": 12}
    assert hidden == {}


def test_waiting_for_images_costs_nothing_while_the_device_works():
    stages, _, _ = device_ms(Kernel("nvjet_a", 0, 8, launched=-5), Kernel("nvjet_b", 20, 100, launched=11))
    assert stages == {"waiting for images": 2, "forward": 80, "the rest": 8, "idle device": 10}


def test_what_runs_behind_computation_is_hidden_and_the_rest_exposed():
    stages, kinds, hidden = device_ms(
        Kernel("nvjet", 10, 50, launched=31),
        Kernel("ncclDevKernel_AllReduce", 40, 70, launched=45),
        Kernel("nvjpeg_decode", 45, 80),
        Kernel("Memcpy HtoD (Pinned -> Device)", 75, 85),
    )
    assert kinds == {
        "matrix products": 40, "communication": 20, "copies and casts": 10, "image decoding": 5,
        "waiting for images": 10, "idle device": 15,
    }  # fmt: skip
    assert hidden == {"communication": 10, "image decoding": 30}
    assert stages["images to the device"] == 10
    assert stages["backward"] == 60


def test_kernels_of_the_training_that_overlap_share_the_time():
    _, kinds, hidden = device_ms(Kernel("nvjet", 10, 30, launched=11), Kernel("flash_fwd", 20, 40, launched=12))
    assert kinds == {"matrix products": 15, "attention": 15, "waiting for images": 10, "idle device": 60}
    assert hidden == {"matrix products": 5, "attention": 5}


def test_the_loss_is_known_by_its_operator_and_images_by_their_copy():
    loss = Kernel("masked_patch_mse_fwd_kernel", 20, 30, 25, ("fastmae::masked_patch_mse",))
    backward = Kernel("masked_patch_mse_bwd_kernel", 40, 50, 40, ("backward", "fastmae::masked_patch_mse_backward"))
    images = Kernel("Memcpy HtoD (Pinned -> Device)", 60, 70, 5, ("aten::copy_",))
    stages, _, _ = device_ms(loss, backward, images)
    assert (stages["loss"], stages["backward"], stages["images to the device"]) == (10, 10, 10)


def test_what_nobody_knows_is_not_attributed():
    found = break_down_device([Kernel("mystery", 0, 25, 11)], LABELS, (0, 100), steps=1)
    assert found.attributed == pytest.approx(0.75)
    assert found.to_json()["attributed_share"] == pytest.approx(0.75)
    assert found.to_json()["kinds"]["other"]["share"] == pytest.approx(0.25)
    assert "75.0% of the time is of a known kind" in found.lines()


class Event:
    """As PyTorch's kineto events are asked."""

    def __init__(
        self, name, begin, end, *, device=DeviceType.CPU, thread=1, id=0, linked=0, user=False, node=-1, forward=0
    ):
        self.fields = {
            "name": name, "start_ns": begin * 1000, "end_ns": end * 1000, "device_type": device, "is_async": False,
            "start_thread_id": thread, "correlation_id": id, "linked_correlation_id": linked,
            "is_user_annotation": user, "sequence_nr": node, "fwd_thread_id": forward,
        }  # fmt: skip

    def __getattr__(self, name):
        return lambda: self.fields[name]


def test_kernels_are_followed_to_the_thread_and_the_label_that_launched_them():
    cuda = DeviceType.CUDA
    events = [
        Event("ProfilerStep#3", 0, 100, user=True), Event("backward", 10, 60, user=True),
        Event("ProfilerStep#3", 0, 100, device=cuda, user=True),
        Event("autograd::engine::evaluate_function: MmBackward0", 20, 40, thread=2, id=1),
        Event("aten::mm", 21, 30, thread=2, id=2), Event("cudaLaunchKernel", 25, 26, thread=99, id=70, linked=2),
        Event("kernel_without_a_telling_name", 50, 90, device=cuda, id=70, linked=2),
        Event("aten::copy_", 30, 40, thread=3, id=4), Event("cudaMemcpyAsync", 31, 32, thread=98, id=71, linked=4),
        Event("Memcpy HtoD (Pinned -> Device)", 30, 40, device=cuda, id=71, linked=4),
        Event("idct_kernel", 40, 45, device=cuda, id=72),
    ]  # fmt: skip
    found = break_down(events, on_gpu=True)
    ms = {name: round(value * 1e3, 6) for name, value in found.stages.items()}
    assert ms == {"backward": 40, "images to the device": 10, "image decoding": 5, "idle device": 45}
    assert round(found.kinds["matrix products"] * 1e3, 6) == 40


def test_kernels_of_a_graph_are_known_though_no_operator_launched_them():
    cuda = DeviceType.CUDA
    events = [
        Event("ProfilerStep#3", 0, 100, user=True), Event("forward", 10, 60, user=True),
        Event("cudaGraphLaunch", 15, 16, thread=99, id=70), Event("nvjet_tst", 20, 50, device=cuda, id=70),
        Event("add_norm_fwd_kernel", 50, 60, device=cuda, id=70),
        Event("void dali::kernels::BatchedResize", 60, 70, device=cuda, id=71),
    ]  # fmt: skip
    found = break_down(events, on_gpu=True)
    ms = {name: round(value * 1e3, 6) for name, value in found.stages.items()}
    assert ms == {"forward": 40, "image decoding": 10, "idle device": 50}


def test_the_backward_is_told_apart_by_the_forward_that_it_belongs_to():
    node = "autograd::engine::evaluate_function: "
    events = [
        Event("ProfilerStep#3", 0, 100, user=True), Event("forward", 0, 40, user=True),
        Event("encoder", 10, 20, user=True), Event("aten::view", 10, 11, node=7), Event("aten::mm", 12, 20, node=7),
        Event("decoder", 20, 40, user=True), Event("aten::add", 20, 21, node=8),
        Event("GeneratedBackwardFor_fastmae_masked_patch_mse_default", 25, 30, node=9),
        Event("backward", 40, 90, user=True),
        Event(f"{node}GeneratedBackwardFor_fastmae_masked_patch_mse_defaultBackward", 40, 45, node=9, forward=1),
        Event(f"{node}AddBackward0", 45, 55, node=8, forward=1), Event("aten::mul", 50, 53),
        Event(f"{node}MmBackward0", 55, 80, node=7, forward=1), Event("aten::mm", 56, 80),
        Event(f"{node}torch::autograd::AccumulateGrad", 80, 90),
    ]  # fmt: skip
    found = break_down(events, on_gpu=False)
    ms = {name: round(value * 1e3, 6) for name, value in found.stages.items()}
    assert ms == {
        "encoder": 10, "decoder": 15, "loss": 5, "forward": 10, "loss, backward": 5, "decoder, backward": 10,
        "encoder, backward": 25, "backward": 10, "the rest": 10,
    }  # fmt: skip
    assert round(found.kinds["matrix products"] * 1e3, 6) == 32
    # The same on a GPU, whose backward has a thread of its own.
    on_threads = [Event(**_fields(e) | {"thread": 2 if e.start_ns() >= 40_000 and not e.is_user_annotation() else 1})
                  for e in events]  # fmt: skip
    for event in on_threads:
        if event.name() == "aten::mm":
            event.fields["correlation_id"] = event.start_ns()
    kernels = [Event("nvjet", 60, 95, device=DeviceType.CUDA, linked=56_000, id=5),
               Event("nvjet", 15, 30, device=DeviceType.CUDA, linked=12_000, id=6)]  # fmt: skip
    found = break_down([*on_threads, *kernels], on_gpu=True)
    ms = {name: round(value * 1e3, 6) for name, value in found.stages.items()}
    assert ms == {"encoder": 15, "encoder, backward": 35, "idle device": 50}


def _fields(event):
    f = event.fields
    return {
        "name": f["name"], "begin": f["start_ns"] // 1000, "end": f["end_ns"] // 1000, "user": f["is_user_annotation"],
        "node": f["sequence_nr"], "forward": f["fwd_thread_id"],
    }  # fmt: skip


def test_a_step_that_was_not_whole_is_left_out():
    events = [Event(f"ProfilerStep#{i}", 10 * i, 10 * i + 8, user=True) for i in (1, 2)]
    events += [Event("ProfilerStep#3", 30, 31, user=True), Event("aten::mm", 11, 15)]
    assert break_down(events, on_gpu=False, num_steps=2).steps == 2
    assert break_down(events, on_gpu=False, num_steps=2).step_ms == pytest.approx(18e-3 / 2)


def test_no_step_is_an_error():
    with pytest.raises(ValueError, match="at least one recorded step"):
        break_down([Event("aten::mm", 0, 1)], on_gpu=False)


def test_a_real_step_is_mostly_matrix_products():
    model = MaskedAutoencoderViT(
        32, 4, embed_dim=192, depth=3, num_heads=3, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3
    )
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(epoch: int) -> None:
        with record_function("masking"):
            masking = random_masking(16, model.num_patches, 0.75, seed=0, epoch=epoch)
        with record_function("forward"):
            loss = model(images, masking=masking, full_pred=False).loss
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    step(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for epoch in (1, 2):
            with record_function(f"ProfilerStep#{epoch}"):
                step(epoch)
    found = break_down(profiler.profiler.kineto_results.events(), on_gpu=False)
    assert found.steps == 2
    for table in (found.stages, found.kinds):
        assert math.fsum(table.values()) == pytest.approx(found.step_ms)
    assert found.kinds["matrix products"] > 0.3 * found.step_ms
    assert {"attention", "fastmae's kernels", "norms and elementwise", "optimiser"} <= found.kinds.keys()
    assert found.stages["backward"] > found.stages["forward"] > found.stages["masking and embedding"] > 0
    assert found.stages["loss"] > 0
    assert found.attributed == 1
