"""Statistics of a data set, against NumPy on the same pixels and counts known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from loading import png, rotated, smooth, write_mixed
from PIL import Image

from fastmae.data import inspect
from fastmae.data.inspect import QUANTILES, measure, suggest_range


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for i in range(9):
        Image.fromarray(smooth(30 + 10 * i, 200 - 7 * i, i)).save(root / "a" / f"{i}.png")
    return root


def expected(dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation over all pixels, mean standard deviation within images; images weigh the same."""
    images = [dataset.decode(i).astype(np.float64).reshape(-1, dataset.channels) / 255 for i in range(len(dataset))]
    weights = np.concatenate([np.full(len(image), 1 / len(image) / len(images)) for image in images])[:, None]
    pixels = np.concatenate(images)
    mean = (weights * pixels).sum(0)
    return mean, np.sqrt((weights * (pixels - mean) ** 2).sum(0)), np.mean([image.std(0) for image in images], 0)


def test_mean_and_standard_deviation(folder, open_, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for channels in (1, 5):
        (tmp_path / str(channels)).mkdir()
        for i in range(4):
            pixels = generator.integers(0, 256, (20 + i, 31, channels), dtype=np.uint8)
            np.save(tmp_path / str(channels) / f"{i}.npy", pixels)
    for dataset in (open_(folder), *(open_(tmp_path / str(channels), channels=channels) for channels in (1, 5))):
        for pixels_at_once in (1 << 20, 700):
            monkeypatch.setattr(inspect, "_PIXELS_AT_ONCE", pixels_at_once)
            found = measure(dataset)
            for value, truth in zip((found.mean, found.std, found.std_within), expected(dataset), strict=True):
                np.testing.assert_allclose(value, truth, rtol=0, atol=1e-12)
            assert found.sampled == len(dataset)


def test_white_and_black_images_weigh_the_same_whatever_their_size(open_, tmp_path):
    for name, value, size in (("white", 255, 10), ("black", 0, 300)):
        Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    found = measure(open_(tmp_path))
    assert (found.mean, found.std, found.std_within) == ([0.5] * 3, [0.5] * 3, [0.0] * 3)


def test_a_very_high_image(open_, tmp_path):
    """Of which the squares of one column, 70,000 times 255**2, do not fit into 32 bits."""
    np.save(tmp_path / "high.npy", np.full((70_000, 1), 255, np.uint8))
    found = measure(open_(tmp_path, channels=1))
    assert (found.mean, found.std) == ([1.0], [0.0])


def test_sixteen_bits_are_measured_as_they_are_trained_on(open_, tmp_path):
    np.save(tmp_path / "0.npy", np.linspace(1000, 3000, 600).astype(np.uint16).reshape(20, 30))
    dataset = open_(tmp_path, channels=1, value_range=(1000, 3000))
    found = measure(dataset)
    assert found.mean == pytest.approx([0.5], abs=0.01)
    assert found.std == pytest.approx([1 / np.sqrt(12)], abs=0.01)
    assert found.mean == pytest.approx([dataset.decode(0).mean()], abs=1e-7)


def test_a_range_for_each_channel_is_suggested(open_, tmp_path):
    """All but 0.1 % at either end, whatever is not finite, in channels that do not compare."""
    generator = np.random.default_rng(0)
    low, high = np.array([-1.0, 270.0, 0.0, 5.0]), np.array([1.0, 330.0, 3e-4, 5.0])
    for i in range(12):
        values = (generator.random((40, 50, 4)) * (high - low) + low).astype(np.float32)
        values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
        values[2, 2] = 1e9 if i == 0 else values[2, 2]
        np.save(tmp_path / f"{i}.npy", values)
    found = np.reshape(suggest_range(open_(tmp_path, channels=4, value_range=(0, 1))), (4, 2))
    assert np.all(np.abs(found[:3] - np.stack([low, high], 1)[:3]) <= 0.01 * (high - low)[:3, None])
    assert found[3].tolist() == [5.0, 6.0]


def test_a_sample_is_drawn_by_its_seed(folder, open_):
    dataset = open_(folder)
    first, second = measure(dataset, sample=3, seed=1), measure(dataset, sample=3, seed=2)
    assert first.sampled == 3
    assert first == measure(dataset, sample=3, seed=1, num_threads=3)
    assert first.mean != second.mean
    assert first.quantiles == second.quantiles
    seen = []
    assert measure(dataset, sample=0, progress=seen.append).mean == []
    measure(dataset, sample=4, progress=seen.append)
    assert seen == [1] * 4
    with pytest.raises(ValueError, match="sample: expected at least 0, got -1"):
        measure(dataset, sample=-1)


def test_counts(open_, tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    write_mixed(root)
    (root / "empty.jpg").write_bytes(b"")
    (root / "damaged.png").write_bytes(png(True))
    (root / "short.png").write_bytes(png(False)[:-40])
    (root / "shorter.png").write_bytes(png(False)[:-90])
    dataset = open_(root, max_bad_fraction=1.0)
    found = measure(dataset)
    suffixes = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    good = [path for path in root.iterdir() if path.stem not in ("empty", "short", "shorter")]
    assert found.formats == {name: sum(p.suffix == f".{s}" for p in good) for name, s in suffixes.items()}
    assert found.rotated == sum("turned" in path.name for path in good)
    assert (found.modes["CMYK"], found.modes["I;16"], sum(found.modes.values())) == (3, 1, len(good))
    assert found.images == len(good) - 1
    assert found.bytes == sum(path.stat().st_size for path in good)
    assert (found.bad["empty file"], found.bad["truncated"], sum(found.bad.values())) == (1, 2, 4)


def test_quantiles_of_upright_sizes(folder, open_):
    heights, widths = np.array([(30 + 10 * i, 200 - 7 * i) for i in range(9)]).T
    found = measure(open_(folder), sample=0).quantiles
    assert found["height"] == pytest.approx(np.quantile(heights, QUANTILES))
    assert found["megapixels"] == pytest.approx(np.quantile(heights * widths / 1e6, QUANTILES))
    Image.fromarray(smooth(500, 20, 0)).save(folder / "turned.jpg", exif=rotated(6))
    found = measure(open_(folder), sample=0)
    assert (found.quantiles["height"][-1], found.quantiles["width"][-1]) == (110, 500)
    assert (found.rotated, found.labelled) == (1, 9)
