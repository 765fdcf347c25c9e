"""A Hugging Face ViTMAE on fastmae's ops: same outputs, same state dict, and back again."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

import fastmae
from fastmae.interop import decelerate
from fastmae.reference import MaskedAutoencoder, sincos_positions

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CASES = {
    "default": {},
    "norm_pix": {"norm_pix_loss": True},
    "odd": {"image_size": 42, "patch_size": 14, "num_channels": 5, "mask_ratio": 0.6, "norm_pix_loss": True},
    "no qkv bias": {"qkv_bias": False, "num_channels": 1, "mask_ratio": 0.9},
    "uneven": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-6,
        "decoder_intermediate_size": 40,
        "image_size": (32, 32),
    },
    "eager": {"attn_implementation": "eager"},
}


def build(**changes) -> nn.Module:
    """A model whose weights look trained: no zero bias and no unit scale hides a missing term."""
    torch.manual_seed(0)
    model = fastmae.accelerate(transformers.ViTMAEForPreTraining(config(**changes)), init=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return decelerate(model)


def config(attn_implementation: str = "sdpa", **changes):
    made = transformers.ViTMAEConfig(**SMALL | changes)
    made._attn_implementation = attn_implementation
    return made


def inputs(model: nn.Module, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    embed = model.vit.embeddings.patch_embeddings
    return torch.randn(n, embed.num_channels, *embed.image_size), torch.rand(n, embed.num_patches)


def same(got, expected, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=tolerance)
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.ids_restore, expected.ids_restore)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """Hugging Face's model, and an accelerated copy."""
    theirs = build()
    return theirs, fastmae.accelerate(copy.deepcopy(theirs))


@pytest.fixture
def batch(pair) -> dict[str, torch.Tensor]:
    pixels, noise = inputs(pair[0])
    return {"pixel_values": pixels, "noise": noise}


@pytest.mark.parametrize(
    ("case", "full_logits"),
    [
        ("default", True),
        ("norm_pix", False),
        # The first by fused layers where kernels run, the second, of another activation, not.
        pytest.param("odd", True, marks=pytest.mark.ops),
        pytest.param("uneven", False, marks=pytest.mark.ops),
        ("no qkv bias", True),
        ("eager", False),
    ],
)
def test_outputs_and_gradients_are_the_same(case, full_logits):
    theirs = build(**CASES[case])
    ours = fastmae.accelerate(copy.deepcopy(theirs), full_logits=full_logits)
    pixels, noise = inputs(theirs)
    expected, got = theirs(pixels, noise=noise), ours(pixels, noise=noise)
    assert type(got) is type(expected)
    if full_logits:
        same(got, expected)
        first, second = got.logits[0][got.mask[0].bool()][:2]
        assert (first - second).abs().max() > 1e-2
    else:
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
        masked = expected.ids_restore.argsort(1)[:, expected.logits.shape[1] - got.logits.shape[1] :]
        assert torch.equal(masked.sort(1).values, expected.mask.nonzero()[:, 1].view_as(masked))
        rows = masked[:, :, None].expand(-1, -1, expected.logits.shape[2])
        torch.testing.assert_close(got.logits, expected.logits.gather(1, rows), rtol=0, atol=1e-4)
    same_gradients(ours, got, theirs, expected)


@pytest.mark.parametrize("case", ["no qkv bias", "odd"])
def test_fused_layers_are_the_same(case, monkeypatch):
    """What a layer does where kernels run, here on the ops' plain path."""
    theirs = build(**CASES[case])
    ours = fastmae.accelerate(copy.deepcopy(theirs))
    calls = []
    layers = sys.modules["fastmae.interop.vit_mae_layers"]
    fuse = layers.fused
    monkeypatch.setattr(layers, "fuses", lambda *args: True)
    monkeypatch.setattr(layers, "fused", lambda *args: (calls.append(args), fuse(*args))[1])
    pixels, noise = inputs(theirs)
    expected, got = theirs(pixels, noise=noise), ours(pixels, noise=noise)
    assert len(calls) == 4
    same(got, expected)
    same_gradients(ours, got, theirs, expected)

    # A module that is hooked is called; one layer then goes its own way.
    layer = next(m for m in ours.modules() if type(m).__name__ == "ViTMAELayer")
    hooked = next(m for m in layer.modules() if type(m).__name__ in ("ViTMAEMLP", "ViTMAEIntermediate"))
    hooked.register_forward_hook(lambda module, args, out: 0 * out)
    changed = ours(pixels, noise=noise)
    assert len(calls) == 7
    assert not torch.allclose(changed.logits, got.logits, atol=1e-3)


def same_gradients(ours: nn.Module, got, theirs: nn.Module, expected, tolerance: float = 2e-5) -> None:
    expected.loss.backward()
    got.loss.backward()
    for (name, mine), (_, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mine.requires_grad and not name.endswith(("k_proj.bias", "key.bias")):  # theirs is rounding noise around 0
            assert (mine.grad - reference.grad).norm() < tolerance * reference.grad.norm(), name


def test_the_ops_run(pair, batch, monkeypatch):
    """Not vacuous: the accelerated model embeds, restores, attends and compares by ops, and theirs by none."""
    called = []
    ops = {"vit_mae": ["gather_patches", "restore_tokens", "masked_patch_mse"]}
    ops |= {"vit_mae_layers": ["attention_qkvpacked"]}
    for module, names in ops.items():
        for name in names:
            op = getattr(sys.modules[f"fastmae.interop.{module}"], name)
            record = lambda *a, op=op, name=name, **k: (called.append(name), op(*a, **k))[1]  # noqa: E731
            monkeypatch.setattr(f"fastmae.interop.{module}.{name}", record)
    theirs, ours = pair
    theirs(**batch)
    assert not called
    ours(**batch)
    attentions = 2 * ["attention_qkvpacked"]
    assert called == ["gather_patches", *attentions, "restore_tokens", *attentions, "masked_patch_mse"]


def test_same_parameters_and_state_dict_and_back_again():
    model, other = build(), build(norm_pix_loss=True)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    pixels, noise = inputs(model)
    original, others = model(pixels, noise=noise), other(pixels, noise=noise)
    classes = [type(module) for module in model.modules()]

    assert fastmae.accelerate(model) is model
    assert isinstance(model, transformers.ViTMAEForPreTraining)
    assert type(model).__name__ == "ViTMAEForPreTraining"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[n].data_ptr() == p and torch.equal(after[n], v) for n, (p, v) in before.items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    arguments = inspect.signature(transformers.ViTMAEForPreTraining.forward).parameters
    assert set(arguments) <= set(inspect.signature(model.forward).parameters) | {"self"}
    # Neither another model nor the library is touched.
    assert torch.equal(other(pixels, noise=noise).logits, others.logits)
    assert "fastmae" not in transformers.ViTMAEForPreTraining.forward.__module__

    assert decelerate(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert not any("fastmae" in name for module in model.modules() for name in vars(module))
    again = model(pixels, noise=noise)
    assert torch.equal(again.logits, original.logits)
    assert torch.equal(again.loss, original.loss)


def test_saved_and_loaded_by_transformers(pair, tmp_path, batch):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    loaded = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    assert type(loaded) is transformers.ViTMAEForPreTraining
    assert torch.equal(loaded(**batch).logits, theirs.eval()(**batch).logits)
    same(fastmae.accelerate(loaded)(**batch), theirs(**batch))
    assert torch.equal(type(ours).from_pretrained(tmp_path / "ours")(**batch).mask, loaded(**batch).mask)


def test_copies_are_accelerated_too():
    model = fastmae.accelerate(build(), full_logits=False)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    pixels, noise = inputs(model)
    assert torch.equal(copied(pixels, noise=noise).logits, model(pixels, noise=noise).logits)
    decelerate(copied)
    assert copied(pixels, noise=noise).logits.shape[1] == 16
    assert model(pixels, noise=noise).logits.shape[1] == 12


def test_hidden_states_tuples_and_attention_weights(pair, batch):
    theirs, ours = pair
    expected = theirs(**batch, output_hidden_states=True)
    got = ours(**batch, output_hidden_states=True)
    assert list(got.keys()) == list(expected.keys())
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for mine, reference in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)
    as_tuple = ours(**batch, return_dict=False)
    assert [value.shape for value in as_tuple] == [value.shape for value in theirs(**batch).to_tuple()]
    for model in pair:
        model.set_attn_implementation("eager")
    weights = [model(**batch, output_attentions=True).attentions for model in pair]
    assert len(weights[0]) == len(weights[1]) == 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))


def test_what_the_ops_do_not_cover_takes_the_original_path(pair):
    theirs, ours = pair
    pixels, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    options = {"noise": noise, "interpolate_pos_encoding": True}
    same(ours(pixels, **options), theirs(pixels, **options))

    pixels, noise = inputs(theirs)
    results, gradients = [], []
    for model in pair:
        x = pixels.clone().requires_grad_()
        results.append(model(x, noise=noise))
        gradients.extend(torch.autograd.grad(results[-1].loss, x))
    same(*results)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)

    for model in pair:
        model.config.mask_ratio = 0.0
    assert torch.allclose(ours(pixels, noise=noise).logits, theirs(pixels, noise=noise).logits, atol=1e-4)


def test_dropout_is_applied_in_training_only():
    theirs = build(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours = fastmae.accelerate(copy.deepcopy(theirs))
    pixels, noise = inputs(theirs)
    results = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        results.append(model(pixels, noise=noise))
    same(*results)
    same(ours.eval()(pixels, noise=noise), theirs.eval()(pixels, noise=noise))
    assert not torch.allclose(results[0].logits, ours(pixels, noise=noise).logits, atol=1e-2)


def test_gradient_checkpointing_changes_nothing(pair, batch):
    theirs, ours = pair
    theirs.train()(**batch).loss.backward()
    ours.train().gradient_checkpointing_enable()
    ours(**batch).loss.backward()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-6)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_hooks_and_replaced_layers_are_respected(pair, batch):
    plain = pair[0](**batch)
    for model in pair:
        attention = next(m for m in model.vit.modules() if type(m).__name__.endswith("Attention"))
        query = attention.get_submodule("q_proj" if hasattr(attention, "q_proj") else "attention.query")
        for projection in (query, model.vit.embeddings.patch_embeddings.projection):
            projection.register_forward_hook(lambda module, args, out: 1.5 * out)
        query.__class__ = Doubled
    expected = pair[0](**batch)
    assert not torch.allclose(expected.logits, plain.logits, atol=1e-3)
    same(pair[1](**batch), expected)


def test_bf16_autocast(pair):
    within_bf16(*pair, *inputs(pair[0]))


def within_bf16(theirs: nn.Module, ours: nn.Module, pixels: torch.Tensor, noise: torch.Tensor) -> None:
    """No further from full precision than theirs is, give or take."""
    exact = theirs(pixels, noise=noise)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        expected, got = theirs(pixels, noise=noise), ours(pixels, noise=noise)
    assert got.logits.dtype == expected.logits.dtype
    assert torch.equal(got.mask, expected.mask)
    error = (expected.logits.float() - exact.logits).norm()
    assert 0 < (got.logits.float() - exact.logits).norm() < 2 * error
    torch.testing.assert_close(got.loss, exact.loss, rtol=2e-2, atol=0)
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


def test_compiles_as_one_graph(pair, batch):
    theirs, ours = pair
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(compiled(**batch), theirs(**batch))


def test_ddp_and_fsdp2_take_an_accelerated_model(pair, tmp_path, batch):
    from torch.distributed.fsdp import fully_shard

    theirs, ours = pair
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        same(nn.parallel.DistributedDataParallel(ours)(**batch), theirs(**batch))
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in ours.modules():
            if type(module).__name__ in ("ViTMAELayer", "ViTMAEEmbeddings"):
                fully_shard(module, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        got = ours(**batch)
        same(got, theirs(**batch))
        got.loss.backward()
        with pytest.raises(ValueError, match=r"model: expected a transformers.ViTMAEForPreTraining.*FSDP"):
            decelerate(ours)
    finally:
        torch.distributed.destroy_process_group()


def test_zero_position_tables_are_refused_and_init_is_the_remedy():
    model = transformers.ViTMAEForPreTraining(config())
    pixels, noise = inputs(model)
    predictions = model(pixels, noise=noise)
    broken = not model.decoder.decoder_pos_embed.any()
    if broken:
        first, second = predictions.logits[0][predictions.mask[0].bool()][:2]
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"frozen and all zeros.*init=True"):
            fastmae.accelerate(model)
        assert type(model) is transformers.ViTMAEForPreTraining

    fastmae.accelerate(model, init=True)
    got = model(pixels, noise=noise)
    first, second = got.logits[0][got.mask[0].bool()][:2]
    assert (first - second).abs().max() > 1e-2
    fastmae.accelerate(model)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
    with pytest.raises(ValueError, match=r"vit.embeddings.position_embeddings is frozen and all zeros"):
        fastmae.accelerate(model)


def test_init_draws_the_weights_of_create_model():
    model = fastmae.accelerate(transformers.ViTMAEForPreTraining(config(layer_norm_eps=1e-6)), init=True, seed=3)
    drawn = fastmae.create_model(
        "mae_vit_tiny_patch16", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, decoder_embed_dim=32,
        decoder_depth=2, decoder_num_heads=2, seed=3,
    )  # fmt: skip
    slow = MaskedAutoencoder((32, 32), (8, 8), 3, 64, 2, 4, 32, 2, 2)
    slow.load_state_dict(drawn.state_dict())
    pixels, noise = inputs(model)
    loss, pred, _ = slow(pixels, 0.75, noise)
    got = model(pixels, noise=noise)
    torch.testing.assert_close(got.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.logits, pred, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decoder.decoder_pos_embed.data, sincos_positions(32, (4, 4)))
    assert 0.01 < model.decoder.mask_token.std() < 0.04
    again = fastmae.accelerate(transformers.ViTMAEForPreTraining(config()), init=True, seed=4)
    assert not torch.equal(again.decoder.mask_token, model.decoder.mask_token)


def test_refusals(pair, monkeypatch):
    theirs, ours = pair
    expected = r"model: expected a transformers.ViTMAEForPreTraining"
    for wrong in (nn.Linear(2, 2), theirs.vit, type("Mine", (type(theirs),), {})(theirs.config)):
        with pytest.raises(ValueError, match=expected):
            fastmae.accelerate(wrong)
    with pytest.raises(ValueError, match=r"model: expected one that fastmae.accelerate returned"):
        decelerate(theirs)
    with pytest.raises(ValueError, match="seed: expected None without init=True"):
        fastmae.accelerate(theirs, seed=1)
    with pytest.raises(ValueError, match="square image_size"):
        # Sixteen patches, so that the constructor, which takes a square grid for granted, does not fail first.
        fastmae.accelerate(transformers.ViTMAEForPreTraining(config(image_size=(16, 64))), init=True)
    with torch.device("meta"), pytest.raises(ValueError, match="init: expected a model with memory"):
        fastmae.accelerate(transformers.ViTMAEForPreTraining(config()), init=True)
    with pytest.raises(ValueError, match="pixel_values"):
        ours(None)
    for pixels in (torch.zeros(1, 4, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(
            ValueError, match=r"pixel_values: expected a floating-point tensor of shape \(N, 3, 32, 32\)"
        ):
            ours(pixels)
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"expected transformers 5.0 or newer, got version 4.57.1"):
        fastmae.accelerate(theirs)


@pytest.mark.gpu
def test_on_cuda():
    theirs = build(norm_pix_loss=True).cuda()
    ours = fastmae.accelerate(copy.deepcopy(theirs))
    pixels, noise = (x.cuda() for x in inputs(theirs, 8))
    with torch.backends.cudnn.flags(allow_tf32=False):  # PyTorch's default for convolutions, theirs among them
        expected = theirs(pixels, noise=noise)
    got = ours(pixels, noise=noise)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
    assert torch.equal(got.mask, expected.mask)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(pixels, noise=noise)
    torch.testing.assert_close(compiled.loss, got.loss, rtol=1e-5, atol=0)
    same_gradients(ours, got, theirs, expected, tolerance=1e-3)


@pytest.mark.gpu
def test_bf16_autocast_on_cuda(pair):
    theirs, ours = (model.cuda() for model in pair)
    pixels, noise = (x.cuda() for x in inputs(theirs, 8))
    within_bf16(theirs, ours, pixels, noise)
