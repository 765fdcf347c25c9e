"""Statistics against NumPy on the same pixels and counts known beforehand; verification of every pixel."""

from __future__ import annotations

import numpy as np
import pytest
from loading import png, rotated, smooth, write_mixed, write_shards
from PIL import Image

from fastmae.data import DataError, errors
from fastmae.data.inspect import QUANTILES, Verdict, measure, suggest_range, verify_images


@pytest.fixture
def folder(tmp_path):
    """Nine images of several sizes in one class."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for i in range(9):
        Image.fromarray(smooth(30 + 10 * i, 200 - 7 * i, i)).save(root / "a" / f"{i}.png")
    return root


@pytest.fixture
def damaged(tmp_path):
    """Eight images, of which 2 and 5 do not decode, and 6 is empty."""
    root = tmp_path / "damaged"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.png").write_bytes(png(i in (2, 5), i) if i != 6 else b"")
    return root


# Statistics


def expected(dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation over all pixels, mean standard deviation within images; images weigh the same."""
    images = [np.float64(dataset.decode(i)).reshape(-1, dataset.channels) for i in range(len(dataset))]
    images = [image / 255 if dataset.dtype == np.uint8 else image for image in images]
    weights = np.concatenate([np.full(len(image), 1 / len(image) / len(images)) for image in images])[:, None]
    pixels = np.concatenate(images)
    mean = (weights * pixels).sum(0)
    return mean, np.sqrt((weights * (pixels - mean) ** 2).sum(0)), np.mean([image.std(0) for image in images], 0)


def test_mean_and_standard_deviation(folder, open_, tmp_path):
    generator, datasets = np.random.default_rng(0), [open_(folder)]
    for channels, dtype in ((1, np.uint8), (5, np.uint8), (2, np.uint16)):
        (tmp_path / str(channels)).mkdir()
        for i in range(4):
            pixels = generator.integers(0, np.iinfo(dtype).max, (20 + i, 31, channels), dtype=dtype, endpoint=True)
            np.save(tmp_path / str(channels) / f"{i}.npy", pixels)
        value_range = None if dtype == np.uint8 else (1000, 30000)
        datasets.append(open_(tmp_path / str(channels), channels=channels, value_range=value_range))
    for dataset in datasets:
        found = measure(dataset)
        for value, truth in zip((found.mean, found.std, found.std_within), expected(dataset), strict=True):
            np.testing.assert_allclose(value, truth, rtol=0, atol=1e-12)
        assert found.sampled == len(dataset)


def test_white_and_black_images_weigh_the_same_and_squares_do_not_overflow(open_, tmp_path):
    for name, value, size in (("white", 255, (70_000, 1)), ("black", 0, (30, 30))):
        np.save(tmp_path / f"{name}.npy", np.full(size, value, np.uint8))
    found = measure(open_(tmp_path, channels=1))
    assert (found.mean, found.std, found.std_within) == ([0.5], [0.5], [0.0])


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
    dataset, seen = open_(folder), []
    first, second = measure(dataset, sample=3, seed=1), measure(dataset, sample=3, seed=2)
    assert first == measure(dataset, sample=3, seed=1, num_threads=3, progress=seen.append)
    assert (first.sampled, seen) == (3, [1] * 3)
    assert first.mean != second.mean
    assert first.quantiles == second.quantiles
    assert measure(dataset, sample=0).mean == []
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
    found = measure(open_(root, max_bad_fraction=1.0))
    suffixes = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    good = [path for path in root.iterdir() if path.stem not in ("empty", "short", "shorter")]
    assert found.formats == {name: sum(p.suffix == f".{s}" for p in good) for name, s in suffixes.items()}
    assert found.rotated == sum("turned" in path.name for path in good)
    assert (found.modes["CMYK"], found.modes["I;16"], sum(found.modes.values())) == (3, 1, len(good))
    assert found.images == len(good) - 1
    assert found.bytes == sum(path.stat().st_size for path in good)
    assert (found.bad["empty file"], found.bad["truncated"], sum(found.bad.values())) == (1, 2, 4)


def test_quantiles_are_of_upright_sizes(folder, open_):
    Image.fromarray(smooth(500, 20, 0)).save(folder / "turned.jpg", exif=rotated(6))
    heights, widths = np.array([(20, 500), *((30 + 10 * i, 200 - 7 * i) for i in range(9))]).T
    found = measure(open_(folder), sample=0)
    assert found.quantiles["height"] == pytest.approx(np.quantile(heights, QUANTILES))
    assert found.quantiles["megapixels"] == pytest.approx(np.quantile(heights * widths / 1e6, QUANTILES))
    assert (found.rotated, found.labelled) == (1, 9)


# Verification


def test_damage_behind_the_header_is_found(damaged, open_):
    dataset = open_(damaged, max_bad_fraction=1.0)
    assert dataset.bad_ids.tolist() == [6]
    for num_threads in (1, 4):
        verdicts = list(verify_images(dataset, num_threads=num_threads))
        assert [verdict.sample_id for verdict in verdicts] == [0, 1, 2, 3, 4, 5, 7]
        assert [verdict.sample_id for verdict in verdicts if "does not decode" in (verdict.reason or "")] == [2, 5]
    assert [verdict.sample_id for verdict in verify_images(dataset, start=4)] == [4, 5, 7]


def test_good_images_of_every_kind_pass_in_a_folder_and_in_shards(open_, tmp_path):
    (tmp_path / "mixed").mkdir()
    files = sorted(write_mixed(tmp_path / "mixed").iterdir())
    assert not [verdict for verdict in verify_images(open_(tmp_path / "mixed")) if verdict.reason]
    (tmp_path / "mixed" / "damaged.png").write_bytes(png(True))
    shards = write_shards(tmp_path / "shards", [tmp_path / "mixed" / "damaged.png", *files], per_shard=20)
    verdicts = verify_images(open_(shards, max_bad_fraction=1.0))
    assert [verdict.sample_id for verdict in verdicts if verdict.reason] == [0]


def test_another_shape_is_bad_and_a_file_that_is_gone_is_an_error(damaged, open_, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.01,))
    dataset = open_(damaged, max_bad_fraction=1.0)
    (damaged / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png: cannot be read"):
        list(verify_images(dataset))
    monkeypatch.setattr(type(dataset), "decode", lambda self, i: np.zeros((40, 50 + i % 2, 3), np.uint8))
    good, bad, *_ = verify_images(dataset)
    assert good.reason is None
    assert bad == Verdict(1, "decodes to (40, 51, 3), its header said (40, 50, 3)")


def test_warnings_are_attributed_to_their_files(open_, tmp_path):
    """A decoder warns at any time, while other threads decode too."""
    for i in range(70):
        (tmp_path / f"{i:02}.png").write_bytes(png(i == 40, i % 5))
    dataset, warnings = open_(tmp_path, max_bad_fraction=1.0), []

    class Warns(type(dataset)):
        def decode(self, sample_id):
            if sample_id in (3, 39, 40, 68):
                warnings.append(f"warning of {sample_id}")
            return super().decode(sample_id)

    def take():
        taken, warnings[:] = list(warnings), []
        return taken

    dataset.__class__ = Warns
    verdicts = list(verify_images(dataset, num_threads=2, take_warnings=take))
    assert [verdict.sample_id for verdict in verdicts] == list(range(70))
    found = {verdict.sample_id: verdict.warning for verdict in verdicts if verdict.warning}
    assert found == {i: f"warning of {i}" for i in (3, 39, 68)}
    assert [verdict.sample_id for verdict in verdicts if verdict.reason] == [40]
