"""Full verification: what an index cannot see is found, remembered and not confused with what is good."""

from __future__ import annotations

import numpy as np
import pytest
from loading import png, write_mixed, write_shards

from fastmae.data import DataError, errors
from fastmae.data.inspect import Verdict, verify_images


@pytest.fixture
def folder(tmp_path):
    """Eight images, of which 2 and 5 do not decode, and 6 is empty."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.png").write_bytes(png(i in (2, 5), i) if i != 6 else b"")
    return root


def test_damage_behind_the_header_is_found(folder, open_):
    dataset = open_(folder, max_bad_fraction=1.0)
    assert dataset.bad_ids.tolist() == [6]
    for num_threads in (1, 4):
        verdicts = list(verify_images(dataset, num_threads=num_threads))
        assert [verdict.sample_id for verdict in verdicts] == [0, 1, 2, 3, 4, 5, 7]
        assert [verdict.sample_id for verdict in verdicts if verdict.reason] == [2, 5]
        assert all("does not decode" in verdict.reason for verdict in verdicts if verdict.reason)
        assert [verdict.size for verdict in verdicts] == [len(png(i in (2, 5), i)) for i in (0, 1, 2, 3, 4, 5, 7)]
    assert [verdict.sample_id for verdict in verify_images(dataset, [7, 5, 0])] == [7, 5, 0]  # in the order asked for


def test_verdicts_are_remembered(folder, open_):
    dataset = open_(folder, max_bad_fraction=1.0)
    dataset.mark_bad({verdict.sample_id: verdict.reason for verdict in verify_images(dataset) if verdict.reason})
    again = open_(folder, max_bad_fraction=1.0)
    assert again.bad_ids.tolist() == [2, 5, 6]
    assert [verdict.reason for verdict in verify_images(again)] == [None] * 5


def test_good_images_of_every_kind_pass_in_a_folder_and_in_shards(open_, tmp_path):
    (tmp_path / "mixed").mkdir()
    files = sorted(write_mixed(tmp_path / "mixed").iterdir())
    assert not [verdict for verdict in verify_images(open_(tmp_path / "mixed")) if verdict.reason]
    (tmp_path / "mixed" / "damaged.png").write_bytes(png(True))
    shards = write_shards(tmp_path / "shards", [tmp_path / "mixed" / "damaged.png", *files], per_shard=20)
    verdicts = verify_images(open_(shards, max_bad_fraction=1.0))
    assert [verdict.sample_id for verdict in verdicts if verdict.reason] == [0]


def test_a_shape_other_than_the_headers(folder, open_, monkeypatch):
    dataset = open_(folder, max_bad_fraction=1.0)
    monkeypatch.setattr(type(dataset), "decode", lambda self, i: np.zeros((40, 50 + i % 2, 3), np.uint8))
    verdicts = list(verify_images(dataset, [0, 1]))
    assert verdicts[0].reason is None
    assert verdicts[1] == Verdict(1, len(png(False, 1)), "decodes to (40, 51, 3), its header said (40, 50, 3)")


def test_a_file_that_is_gone_is_no_bad_image(folder, open_, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.01,))
    dataset = open_(folder, max_bad_fraction=1.0)
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png: cannot be read"):
        list(verify_images(dataset))


def test_warnings_are_put_down_to_their_files(open_, tmp_path):
    """A decoder warns at any time, while other threads decode too."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(70):
        (root / f"{i:02}.png").write_bytes(png(i == 40, i % 5))
    dataset = open_(root, max_bad_fraction=1.0)
    real, warnings = type(dataset).decode, []

    class Warns(type(dataset)):
        def decode(self, sample_id):
            if sample_id in (3, 39, 40, 68):
                warnings.append(f"warning of {sample_id}")
            return real(self, sample_id)

    def take():
        taken, warnings[:] = list(warnings), []
        return taken

    dataset.__class__ = Warns
    verdicts = list(verify_images(dataset, num_threads=2, take_warnings=take))
    assert [verdict.sample_id for verdict in verdicts] == list(range(70))
    found = {verdict.sample_id: verdict.warning for verdict in verdicts if verdict.warning}
    assert found == {i: f"warning of {i}" for i in (3, 39, 68)}
    assert [verdict.sample_id for verdict in verdicts if verdict.reason] == [40]
