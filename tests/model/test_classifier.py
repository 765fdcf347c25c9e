"""The classifier: timm's ViT with the same weights, pretrained encoders, other sizes, stochastic depth, token maps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from devices import fake_cuda
from torch import nn

from fastmae.model import MaskedAutoencoderViT
from fastmae.model.blocks import Stream
from fastmae.model.classifier import VisionTransformer, create_vision_transformer, scales_of
from fastmae.model.initialization import sincos_positions

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def classifier(num_classes: int = 5, **options) -> VisionTransformer:
    model = VisionTransformer(num_classes, **SMALL | {"seed": 1} | options)
    with torch.no_grad():  # no zero bias and no unit scale hides a missing term
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_equals_timm_with_the_same_weights(images, pool):
    timm = pytest.importorskip("timm")
    model = classifier(pool=pool)
    peer = timm.models.vision_transformer.VisionTransformer(
        (32, 48), 8, num_classes=5, embed_dim=64, depth=3, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        global_pool="token" if pool == "cls" else "avg", fc_norm=pool == "avg",
    )  # fmt: skip
    peer.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images), peer.eval()(images), rtol=1e-4, atol=1e-5)
    maps = model.forward_intermediates(images, [0, -1], norm=pool == "cls")
    expected = peer.forward_intermediates(images, [0, 2], norm=pool == "cls", intermediates_only=True)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == (3, 64, 4, 6)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_pretrained_encoder_gives_the_same_tokens(images):
    mae = MaskedAutoencoderViT(**SMALL, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, seed=3)
    model = VisionTransformer(0, **SMALL, seed=1)
    assert model.load_encoder(mae.state_dict()) == []
    raw = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(model(raw), mae.encode(raw)[:, 0])
    average = VisionTransformer(7, **SMALL, pool="avg", seed=1)
    assert average.load_encoder(mae.state_dict()) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    again = VisionTransformer(7, **SMALL, pool="avg", seed=2)
    assert again.load_encoder(average.state_dict()) == []
    torch.testing.assert_close(again(images), average(images))


def test_positions_of_another_size_are_recomputed_and_learnt_ones_interpolated_by_name():
    square = SMALL | {"img_size": 32}
    weights = MaskedAutoencoderViT(**square, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).state_dict()
    model = VisionTransformer(2, **SMALL | {"img_size": 64})
    model.load_encoder(weights)
    torch.testing.assert_close(model.pos_embed.detach(), sincos_positions(64, (8, 8), (4, 4)))
    learnt = weights | {"pos_embed": torch.randn(1, 17, 64)}
    with pytest.raises(ValueError, match=r"pos_embed: a learnt table for 4 x 4 .* 8 x 8; pass positions=.interpolate"):
        model.load_encoder(learnt)
    model.load_encoder(learnt, positions="interpolate")
    assert torch.equal(model.pos_embed[:, :1], learnt["pos_embed"][:, :1])
    constant = weights | {"pos_embed": torch.full((1, 17, 64), 0.5)}
    model.load_encoder(constant, positions="interpolate")
    torch.testing.assert_close(model.pos_embed.detach(), torch.full((1, 65, 64), 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.norm2.bias"), r"blocks\.1\.norm2\.bias: missing"),
        (lambda w: w.update({"blocks.9.norm1.bias": torch.zeros(64)}), r"blocks\.9\.norm1\.bias: among the weights"),
        (lambda w: w.update({"norm.bias": torch.zeros(63)}), r"norm\.bias: .*\(63,\), this model's \(64,\)"),
        (lambda w: w["cls_token"].fill_(torch.nan), "cls_token: has values that are not finite"),
        (lambda w: w.update({"head.bias": torch.zeros(9)}), r"head\.bias: .* num_classes must be that of the weights"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(change, message):
    weights = {name: tensor.clone() for name, tensor in classifier().state_dict().items()}
    change(weights)
    model = VisionTransformer(5, **SMALL, seed=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_encoder(weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_stochastic_depth_leaves_out_branches_and_keeps_the_mean(images):
    model = classifier(drop_path=0.5)
    assert torch.equal(model.eval()(images), classifier().eval()(images))
    model.train()
    nothing = torch.zeros(3, 2, 3)  # all branches left out: the head sees the embedding
    torch.testing.assert_close(
        model.forward_features(images, path_scales=nothing), model.norm(model.embed(images)[:, 0])
    )
    assert not torch.equal(model(images), model(images))
    scales = scales_of(torch.rand(12, 2, 20_000, generator=torch.Generator().manual_seed(0)), 0.3)
    assert (scales[0] == 1).all()
    torch.testing.assert_close((scales == 0).float().mean((1, 2)), torch.linspace(0, 0.3, 12), atol=0.01, rtol=0)
    torch.testing.assert_close(scales.mean((1, 2)), torch.ones(12), atol=0.02, rtol=0)


def test_stochastic_depth_is_the_same_on_the_ops_that_gpus_use(images, request):
    scales = scales_of(torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(2)), 0.5)
    outcomes = []
    for fixtures in ((), ("fused",)):
        [*map(request.getfixturevalue, fixtures)]
        model = classifier(drop_path=0.5)
        out = model(images, path_scales=scales)
        out.square().sum().backward()
        outcomes.append({"out": out.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_stochastic_depth_scales_branches_in_low_precision(mode):
    model = classifier()
    model.set_activation_checkpointing(mode)
    with fake_cuda(autocast=torch.bfloat16):
        model.to("cuda")
        stream = Stream(model.embed(torch.zeros(3, 3, 32, 48, device="cuda")))
        stream = model.blocks[0](stream, torch.ones(2, 3, device="cuda"))
        assert (stream.x.dtype, stream.branch.dtype) == (torch.float32, torch.bfloat16)
        assert model(torch.zeros(3, 3, 32, 48, device="cuda")).is_cuda


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(images, mode, route):
    scales = scales_of(torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(2)), 0.5)
    gradients = []
    for activation_checkpointing in ("none", mode):
        model = classifier(drop_path=0.5)
        model.set_activation_checkpointing(activation_checkpointing)
        model(images, path_scales=scales).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_it_compiles_in_one_graph(images):
    model = classifier().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool: expected one of cls, avg, got 'max'"),
        ({"drop_path": 1.0}, r"drop_path: expected a probability in \[0, 1\)"),
        ({"num_heads": 5}, "embed_dim: expected a multiple of num_heads=5"),
        ({"img_size": 30}, "img_size"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(5, **SMALL | options)


def test_wrong_images_and_names_are_refused(images):
    model = classifier()
    with pytest.raises(ValueError, match=r"images: expected \(N, 3, 32, 48\)"):
        model(images[..., :32])
    with pytest.raises(ValueError, match="indices: expected blocks from -3 to 2"):
        model.forward_intermediates(images, [3])
    with pytest.raises(ValueError, match="name: expected one of vit_tiny_patch16"):
        create_vision_transformer("resnet50", 10)
    assert create_vision_transformer("vit_tiny_patch16", 10, img_size=32).architecture["depth"] == 12
