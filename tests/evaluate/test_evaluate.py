"""Reconstructions in pixel space, their errors, the baselines beside them, and the summary of sets."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from fastmae import ops
from fastmae.evaluate import (
    FixedSets,
    evaluate_sets,
    fill_inverse_distance,
    fill_mean_color,
    masked_error,
    reconstruct,
)
from fastmae.evaluate.sets import compare_masks
from fastmae.model import MAEOutput, MaskedAutoencoderViT

TINY = {
    "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


def tiny(chans=3, norm_pix_loss=False, img_size=(24, 32), patch_size=(4, 8)):
    model = MaskedAutoencoderViT(img_size, patch_size, chans, norm_pix_loss=norm_pix_loss, seed=0, **TINY)
    return model.train()


class Oracle(MaskedAutoencoderViT):
    """Predicts the targets, each moved by ``shift``, so that the error after de-normalisation is known."""

    shift = 0.0

    def forward(self, images, mask_ratio=0.75, *, noise=None, masking=None, full_pred=True):
        assert not self.training
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        target = self.patchify(images)
        if not full_pred:
            target = target.gather(1, masking.ids_mask[..., None].expand(-1, -1, target.shape[-1]))
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return MAEOutput(torch.zeros(()), target + self.shift, masking.mask)


def oracle(norm_pix_loss, chans=3):
    return Oracle((24, 32), (4, 8), chans, norm_pix_loss=norm_pix_loss, seed=0, **TINY)


def pictures(n=3, chans=3, size=(24, 32)):
    return torch.randint(0, 256, (n, chans, *size), dtype=torch.uint8)


def masks(n=3, length=24, ratio=0.75):
    return ops.random_masking(n, length, ratio, seed=5)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_perfect_predictions_give_the_picture_back(norm_pix_loss):
    for chans in (1, 3, 5):
        images = pictures(chans=chans)
        result = reconstruct(oracle(norm_pix_loss, chans), images, masks())
        torch.testing.assert_close(result.original, images.float() / 255)
        torch.testing.assert_close(result.reconstruction, result.original, atol=2e-6, rtol=0)
        assert result.mse.max() < 1e-10
        assert result.psnr.min() > 99
        assert result.psnr.max() <= 100  # where it would be infinite


def test_the_error_is_in_units_of_the_models_statistics_or_of_the_target_patches_unbiased_deviation():
    model, images, masking = oracle(False), pictures(), masks()
    model.shift = 0.5
    result = reconstruct(model, images, masking)
    torch.testing.assert_close(result.mse, torch.full((3,), 0.25))
    in_pixels = (0.5 * model.std).square().mean()
    torch.testing.assert_close(result.psnr, (-10 * in_pixels.log10()).expand(3))
    model = oracle(True)
    model.shift = 1.0
    result = reconstruct(model, images, masking)
    normalized = (images / 255 - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)
    patches = torch.stack([model.patchify(normalized)[i, ids] for i, ids in enumerate(masking.ids_mask)])
    deviation = patches.std(-1, unbiased=True)
    torch.testing.assert_close(result.mse, deviation.square().mean(1), rtol=1e-4, atol=1e-6)
    model = oracle(True, chans=1)
    model.shift = 1.0
    white = torch.full((3, 1, 24, 32), 255, dtype=torch.uint8)  # constant patches: the epsilon alone
    torch.testing.assert_close(reconstruct(model, white, masking).mse, torch.full((3,), 1e-6), rtol=1e-3, atol=0)


def test_masked_patches_are_grey_and_visible_ones_untouched():
    masking = masks()
    result = reconstruct(tiny(), pictures(), masking)
    assert result.visible.shape == (3, 1, 24, 32)
    first = masking.ids_mask[0, 0].item()
    top, left = first // 4 * 4, first % 4 * 8
    assert (result.masked[0, :, top : top + 4, left : left + 8] == 0.5).all()
    shown = result.visible.expand_as(result.original)
    assert shown.float().mean() == 0.25
    assert torch.equal(result.reconstruction[shown], result.original[shown])
    assert torch.equal(result.masked[shown], result.original[shown])
    assert not torch.equal(result.reconstruction[~shown], result.original[~shown])


def test_raw_normalised_and_bfloat16_images_have_the_error_that_is_the_training_loss():
    model, images, masking = tiny(), pictures(), masks()
    result = reconstruct(model, images, masking)
    loss = model(images, masking=masking, full_pred=False).loss
    torch.testing.assert_close(result.mse.mean(), loss.detach(), rtol=1e-5, atol=0)
    assert model.training
    floating = (images / 255 - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reconstruct(model, floating, masking)
    torch.testing.assert_close(found.reconstruction, result.reconstruction, rtol=1e-5, atol=1e-5)
    found = reconstruct(model, images, masking, dtype=torch.bfloat16)
    assert found.reconstruction.dtype == found.mse.dtype == torch.float32
    torch.testing.assert_close(found.mse, result.mse, rtol=0.05, atol=0)


def test_what_cannot_be_reconstructed_is_refused_and_implausible_floats_warn():
    model = tiny()
    model._float_images_seen = True  # the model's own warning is another test's
    for value in (200.0, float("nan")):
        with pytest.warns(UserWarning, match=r"expected within \[0, 1\]"):
            reconstruct(model, torch.full((3, 3, 24, 32), value), masks())
    with pytest.raises(ValueError, match="masking: expected one mask for each of 3 images, got 6 masks"):
        reconstruct(model, pictures(), masks(6))
    del model.decoder_pred
    with pytest.raises(ValueError, match="without one; an encoder alone cannot reconstruct"):
        reconstruct(model, pictures(), masks())
    with pytest.raises(ValueError, match="Linear without one"):
        reconstruct(nn.Linear(2, 2), pictures(), masks())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_visible_patches_as_predicted_leave_the_errors_alone(norm_pix_loss):
    images, masking = pictures(), masks()
    model = oracle(norm_pix_loss)
    perfect = reconstruct(model, images, masking, visible="predicted")
    torch.testing.assert_close(perfect.reconstruction, images / 255, rtol=0, atol=2e-3)
    model.shift = 0.5
    pasted, predicted = (reconstruct(model, images, masking, visible=how) for how in ("pasted", "predicted"))
    torch.testing.assert_close(predicted.mse, pasted.mse)
    seen = pasted.visible.expand_as(pasted.original)
    assert torch.equal(pasted.reconstruction[seen], pasted.original[seen])
    assert (predicted.reconstruction - predicted.original)[seen].abs().min() > 0
    torch.testing.assert_close(predicted.reconstruction[~seen], pasted.reconstruction[~seen])
    with pytest.raises(ValueError, match="visible: expected 'pasted' or 'predicted', got 'shown'"):
        reconstruct(model, images, masking, visible="shown")


def visible_pixels(n=2, size=(12, 20)):
    visible = torch.rand(n, 1, *size) > 0.7
    visible[..., 0, 0] = True
    return visible


def test_mean_color_ignores_what_is_masked():
    visible = visible_pixels()
    images = torch.rand(2, 3, 12, 20)
    filled = fill_mean_color(images.where(visible, torch.nan), visible)
    for i in range(2):
        hidden = ~visible[i, 0]
        expected = images[i][:, visible[i, 0]].mean(1)[:, None].expand(3, hidden.sum())
        torch.testing.assert_close(filled[i][:, hidden], expected)
    assert torch.equal(filled.where(visible, 0), images.where(visible, 0))


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_inverse_distance_equals_the_sum_over_all_visible_pixels(power):
    visible = visible_pixels()
    images = torch.rand(2, 3, 12, 20)
    filled = fill_inverse_distance(images.where(visible, torch.nan), visible, power)
    where = torch.cartesian_prod(torch.arange(12.0), torch.arange(20.0)).double().view(12, 20, 2)
    for i in range(2):
        known, hidden = visible[i, 0], ~visible[i, 0]
        weights = torch.cdist(where[hidden], where[known]) ** -power
        expected = images[i][:, known].double() @ weights.T / weights.sum(1)
        torch.testing.assert_close(filled[i][:, hidden], expected.float())
    assert torch.equal(filled.where(visible, 0), images.where(visible, 0))
    lone = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    lone[..., :16, :16] = True  # exact far away too
    plain = torch.full((1, 1, 256, 256), 0.3)
    torch.testing.assert_close(fill_inverse_distance(plain, lone, power), plain, rtol=1e-5, atol=0)


@pytest.fixture
def said(monkeypatch) -> dict:
    """What would be drawn: ``b`` the blocks, and the texts."""
    said = {}
    monkeypatch.setattr("fastmae.evaluate.sets.draw", lambda blocks, path, **text: said.update(text, b=blocks))
    return said


def evaluated(model, sets, **options):
    """With the drawing replaced by ``said``."""
    return evaluate_sets(model, sets, **{"mask_ratio": 0.75, "seed": 3, "path": "a.png"} | options)


def test_summary_of_sets_is_json_with_both_baselines_and_a_picture(tmp_path):
    sets, names = {"new crops": pictures(33), "unseen": pictures(2)}, {"unseen": ["cat", "coffee"]}
    path = tmp_path / "figure.png"
    summary = evaluate_sets(tiny(), sets, mask_ratio=0.75, seed=3, path=path, names=names, num_masks=40, num_rows=2)
    assert json.loads(json.dumps(summary)) == summary
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (summary["new crops"]["num_images"], summary["new crops"]["masks_per_image"]) == (33, 2)
    assert summary["unseen"]["masks_per_image"] == 20
    unseen = summary["unseen"]
    assert "images" not in summary["new crops"]
    assert [each["name"] for each in unseen["images"]] == ["cat", "coffee"]
    for metric in ("mse", "mse_mean_color", "mse_inverse_distance", "psnr"):
        one, other = (image[metric] for image in unseen["images"])
        assert one != other
        assert (one + other) / 2 == pytest.approx(unseen[metric])


def test_summary_averages_over_every_image_and_mask_each_time_a_model_is_looked_at():
    images, other, again = pictures(35), pictures(2) // 2, tiny()
    with torch.no_grad():
        again.decoder_pred.bias += 1
    fixed = FixedSets({"a": images, "b": other}, mask_ratio=0.5, seed=3, num_masks=70)
    for model in (tiny(), again):
        found = fixed.evaluate(model, None)
        errors, colors, distances = [], [], []
        for draw in range(2):
            masking = ops.random_masking(35, 24, 0.5, seed=3, draw=draw)
            result = reconstruct(model, images, masking)
            errors.append(result.mse)
            for into, fill in ((colors, fill_mean_color), (distances, fill_inverse_distance)):
                filled = fill(result.original, result.visible)
                into.append(masked_error(filled, result.original, result.visible, model.std.view(1, -1, 1, 1)))
        for name, parts in (("mse", errors), ("mse_mean_color", colors), ("mse_inverse_distance", distances)):
            assert found["a"][name] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
        assert found["a"]["mse_mean_color"] != found["b"]["mse_mean_color"]


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_masks_are_of_the_strategy(said, strategy):
    model, images = tiny(img_size=(32, 64)), pictures(3, size=(32, 64))
    numbers = evaluated(model, {"a": images}, mask_strategy=strategy, num_masks=3)["a"]
    masking = ops.random_masking(3, 64, 0.75, seed=3, strategy=strategy, grid_size=(8, 8))
    assert numbers["mse"] == pytest.approx(float(reconstruct(model, images, masking).mse.mean()), rel=1e-5)
    assert numbers["mask_strategy"] == strategy
    assert strategy in said["title"]


def test_several_masks_are_drawn_beside_each_other(said):
    model, images = tiny(img_size=(32, 64)), pictures(5, size=(32, 64))
    masks = [(0.5, "random"), (0.75, "grid")]
    found = compare_masks(model, images, masks, "x.png", names=["a", "b", "c", "d", "e"], seed=3, num_rows=2)
    for (ratio, strategy), numbers in zip(masks, found, strict=True):
        alone = evaluated(model, {"x": images}, mask_ratio=ratio, mask_strategy=strategy, num_rows=2)["x"]
        assert numbers == alone
    compare_masks(model, images, masks, "x.png", names=["a", "b", "c", "d", "e"], seed=3, num_rows=2)
    assert said["columns"] == ["original", "50 % random", "reconstruction", "75 % grid", "reconstruction"]
    first, second = said["b"][0].rows
    assert (first.name, second.name) == ("a", "b")
    assert torch.equal(first.pictures[0], images[0] / 255)
    hidden = [(picture == 0.5).all(0).float().mean() for picture in first.pictures[1::2]]
    assert hidden == [0.5, 0.75]
    assert f"{found[0]['mse']:.3f}, {found[1]['mse']:.3f}" in said["b"][0].text


def test_many_bands_are_stretched_each_and_named(said):
    """Bands that lie in small parts of [0, 1] fill the range of what is drawn; masked patches stay grey."""
    ramp = torch.linspace(0, 1, 24 * 32).view(24, 32)
    images = torch.stack([0.1 * band + 0.05 * ramp for band in range(5)])[None]
    evaluated(tiny(5), {"a": images}, bands=(3, 0, 4), num_masks=1)
    masked, reconstruction, original = said["b"][0].rows[0].pictures
    assert original.shape == (3, 24, 32)
    torch.testing.assert_close(original, ((ramp - 0.02) / 0.96).expand(3, -1, -1), rtol=0, atol=1e-3)
    grey = (masked == 0.5).all(0)
    assert grey.float().mean() == 0.75
    assert torch.equal(masked[:, ~grey], original[:, ~grey])
    assert torch.equal(reconstruction[:, ~grey], original[:, ~grey])
    assert "Bands 3, 0, 4 as red, green, blue" in said["note"]


def test_a_lone_photograph_is_shown_with_several_masks(said):
    sets, names = {"one": pictures(1), "many": pictures(5)}, {"one": ["cat"]}
    evaluated(tiny(), sets, names=names, num_masks=8)
    one, many = (block.rows for block in said["b"])
    assert [row.name for row in one] == ["cat"] * 3
    assert not torch.equal(one[0].pictures[0], one[1].pictures[0])
    assert torch.equal(one[0].pictures[2], one[1].pictures[2])
    assert len(many) == 5


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_figure_tells_how_normalised_pixels_became_colours(norm_pix_loss, said):
    model = tiny(norm_pix_loss=norm_pix_loss)
    summary = evaluated(model, {"a": pictures(2)}, num_masks=2)
    assert ("target patches' own mean and standard deviation" in said["note"]) == norm_pix_loss
    assert summary["a"]["denormalized_with_target_statistics"] == norm_pix_loss
    assert f"{summary['a']['mse']:.3f}" in said["b"][0].text


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sets\['none'\]: expected at least one image"):
        evaluated(tiny(), {"none": pictures(0)})
    with pytest.raises(ValueError, match=r"names\['a'\]: expected 1 names"):
        evaluated(tiny(), {"a": pictures(1)}, names={"a": ["cat", "coffee"]})
    with pytest.raises(ValueError, match=r"bands: expected one or three of the channels 0 to 4, got \(0, 5, 1\)"):
        evaluated(tiny(5), {"a": pictures(1, 5)}, bands=(0, 5, 1))
