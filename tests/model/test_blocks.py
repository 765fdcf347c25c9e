"""Blocks against the reference's, what they share and skip, and the low-precision copies of their weights."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from traffic import EagerTraffic

from fastmae.model import MaskedAutoencoderViT
from fastmae.model.blocks import Block, Linear, SharedTokens, Stream, cast_weights, run_blocks
from fastmae.ops import random_masking, restore_tokens
from fastmae.ops._dispatch import is_interpreted
from fastmae.reference import Block as ReferenceBlock

BF16 = torch.bfloat16
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 24}
SIZES |= {"decoder_depth": 2, "decoder_num_heads": 2}


@pytest.fixture
def model(device) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**SIZES, seed=0).to(device)


@pytest.fixture
def inputs(device):
    """Images and a mask, as keyword arguments of the model."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    return {"images": images, "masking": random_masking(2, 16, 0.75, seed=0, device=device)}


def pair(device, depth=2, dim=32, heads=2):
    fast = torch.nn.ModuleList(Block(dim, heads, 4.0, "plain") for _ in range(depth)).to(device)
    slow = torch.nn.ModuleList(ReferenceBlock(dim, heads, 4.0) for _ in range(depth)).to(device)
    for parameter in fast.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    slow.load_state_dict(fast.state_dict(), strict=True)
    return fast, slow


def assert_same_gradients(fast, slow):
    expected = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        error, size = (parameter.grad - expected[name].grad).norm(), expected[name].grad.norm()
        # A constant added to every key cancels in the softmax: that third of the bias's gradient is rounding.
        assert error <= 1e-4 * size + 1e-5, name


@pytest.mark.ops
def test_blocks_are_the_references(device, route):
    fast, slow = pair(device)
    x = torch.randn(3, 7, 32, device=device)
    got, want = run_blocks(fast, x), slow[1](slow[0](x))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert_same_gradients(fast, slow)


@pytest.mark.ops
def test_rows_that_come_out_are_rows_of_the_whole(device, route):
    fast, _ = pair(device, depth=1)
    x, ids = torch.randn(3, 9, 32, device=device), torch.tensor([[1, 4, 8], [0, 2, 3], [5, 6, 7]], device=device)
    whole, rows = run_blocks(fast, x), fast[0](Stream(x), ids).sum()
    torch.testing.assert_close(rows, whole.gather(1, ids[..., None].expand(-1, -1, 32)), rtol=1e-5, atol=1e-5)


@pytest.mark.ops
def test_masked_tokens_projected_once_a_batch(device, route):
    fast, slow = pair(device, depth=1)
    m = random_masking(3, 12, 0.75, seed=0, device=device)
    visible, table = torch.randn(3, 4, 32, device=device), torch.randn(1, 12, 32, device=device)
    x = restore_tokens(visible, table, m.ids_restore, num_prefix_tokens=1)
    got = fast[0](Stream(x), shared=SharedTokens(visible, table, m.ids_restore)).sum()
    torch.testing.assert_close(got, slow[0](x), rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    slow[0](x).square().sum().backward()
    assert_same_gradients(fast, slow)


def test_the_decoder_projects_no_mask_token_twice(model, inputs, monkeypatch):
    """Rows of the decoder's first product of queries, keys and values: visible ones of each image, then one table."""
    rows = []
    inner = type(model.decoder_blocks[0].attn).forward_shared

    def seen(self, shared, norm, num_prefix_tokens):
        rows.append((shared.visible.shape[:2], shared.table.shape[1]))
        return inner(self, shared, norm, num_prefix_tokens)

    monkeypatch.setattr(type(model.decoder_blocks[0].attn), "forward_shared", seen)
    model(**inputs)
    assert rows == [((2, 1 + 4), 16)]


@pytest.mark.ops
def test_bfloat16_stream_is_an_option(device, inputs, route):
    losses, streams = {}, set()
    for dtype in ("float32", "bfloat16"):
        model = MaskedAutoencoderViT(**SIZES, seed=0, residual_dtype=dtype).to(device)
        for block in [*model.blocks, *model.decoder_blocks]:
            block.register_forward_hook(lambda _m, _i, stream, name=dtype: streams.add((name, stream.x.dtype)))
        with torch.autocast(device.type, BF16):
            losses[dtype] = model(**inputs).loss
        losses[dtype].backward()
    assert streams == {("float32", torch.float32), ("bfloat16", BF16)}
    assert losses["float32"] != losses["bfloat16"]
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match=r"residual_dtype.*float16"):
        MaskedAutoencoderViT(**SIZES, residual_dtype="float16")


def test_weights_are_cast_once_for_several_forwards(device, model, inputs, fused, monkeypatch):
    casts = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (casts.append(len(to)), copy(to, of)))
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    with torch.autocast(device.type, BF16), model.cast_weights(BF16):
        first = model(**inputs).loss
        second = model(**inputs).loss
        assert all(m.weight_cast.dtype == m.bias_cast.dtype == BF16 for m in linears)
    assert casts == [2 * len(linears)] == [2 * (4 * 4 + 2)]
    assert torch.equal(first, second)
    assert all(m.weight_cast is m.bias_cast is None for m in linears)
    first.backward()
    assert all(m.weight.grad.dtype == torch.float32 for m in linears)
    with torch.no_grad():
        for m in linears:
            m.weight.mul_(2)
    with torch.autocast(device.type, BF16):  # on its own, a forward sees the weights as they are now
        assert not torch.equal(model(**inputs).loss, first)
    assert len(casts) == 2


def test_copies_change_nothing_but_the_casting(device, model, inputs, fused):
    gradients = []
    for patch in (False, True):
        model.zero_grad()
        with torch.autocast(device.type, BF16), pytest.MonkeyPatch.context() as context:
            if patch:
                for name in ("norm_linear", "gelu_linear"):
                    module = import_module(f"fastmae.ops.{name}")
                    context.setattr(module, "operand", lambda weight, _, dtype: weight.to(dtype))
                context.setattr(MaskedAutoencoderViT, "_autocast_weights", lambda self: nullcontext())
            model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class VectorCopies(EagerTraffic):
    """The parameters' names whose vectors are cast or cloned one by one: a launch each."""

    def __init__(self, model):
        super().__init__()
        self.names, self.found = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default) and args[0].ndim == 1:
            self.found.append(self.names.get(args[0].untyped_storage().data_ptr()))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.ops
def test_no_bias_is_cast_or_cloned_on_its_own(device, model, inputs, fused):
    with torch.autocast(device.type, BF16), VectorCopies(model) as copies:
        model(**inputs, full_pred=False)
    # Without the kernel, gelu_linear's composition casts the bias that the kernel reads in float32.
    by_composition = () if is_interpreted() or device.type == "cuda" else ("mlp.fc1.bias",)
    assert [name for name in copies.found if name and not name.endswith(by_composition)] == ["patch_embed.proj.bias"]


def test_a_bias_leaves_its_block_as_a_copy_unless_it_is_known_not_to_be_sharded(device, fused):
    """FSDP frees a block's parameters when its forward ends, so what the next block reads must not be one of them."""
    (block,), x = pair(device, depth=1)[0], torch.randn(2, 5, 32, device=device)
    own = block.mlp.fc2.bias
    assert block(Stream(x)).bias.data_ptr() != own.data_ptr()
    with cast_weights(block, BF16):
        assert block(Stream(x)).bias is own


def test_no_copies_where_no_kernel_runs_or_the_dtype_fits(model):
    model = model.double()
    with cast_weights(model, BF16):
        assert all(m.weight_cast is None for m in model.modules() if isinstance(m, Linear))
