"""What a loader gives depends on the position alone: not on where it was started, on how many ranks, or what failed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import KINDS, OPTIONS, assert_equal, needs_dali, smooth, take, write_source
from PIL import Image

from fastmae.data import Augment, Dataset, create_loader, has_dali, open_dataset

RICH = Augment(vflip=0.5, color_jitter=0.4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Dataset]:
    """Eleven images by each kind of source; one of them, the fourth, is known to be bad."""
    found = {}
    for name in ("folder", "shards", "list"):
        path = write_source(name, tmp_path_factory.mktemp(name))
        dataset = open_dataset(path, max_bad_fraction=0.5, cache_dir=tmp_path_factory.mktemp("cache"))
        found[name] = dataset.mark_bad({3: "does not decode"})
    return found


@pytest.mark.parametrize(("source", "ranks"), [("folder", 1), ("shards", 2), ("list", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_stopping_at_any_step(sources, source, kind, ranks):
    source, places = sources[source], [{"rank": rank, "world_size": ranks, "augment": RICH} for rank in range(ranks)]
    steps = 6  # of 5 samples: more than two epochs of eleven
    straight = [take(source, kind, steps, **place) for place in places]
    assert max(int(batch.epochs.max()) for batch in straight[0]) >= 2
    for step in (1, 3, 5):
        for place, expected in zip(places, straight, strict=True):
            again = take(source, kind, steps - step, position=step * 5 * ranks, num_threads=step, **place)
            assert_equal(again, expected[step:])


@pytest.mark.parametrize(("source", "ranks"), [("folder", (2, 1)), ("shards", (2, 3))])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_on_another_number_of_ranks(sources, source, kind, ranks):
    """Each remaining sample of the epoch comes once, with the pixels (so crop, flips, colours) and keys that it would
    have had; masks are drawn from the keys."""
    source, (before, after) = sources[source], ranks
    position = 2 * 2 * before  # two steps of two samples
    done = [take(source, kind, 2, batch_size=2, rank=r, world_size=before, augment=RICH) for r in range(before)]
    steps = -(-(2 * len(source) - position) // (2 * after))
    options = {"batch_size": 2, "world_size": after, "position": position, "augment": RICH}
    rest = [take(source, kind, steps, rank=r, **options) for r in range(after)]

    def samples(batches):
        for batch in batches:
            yield from zip(batch.epochs.tolist(), batch.sample_ids.tolist(), batch.images, strict=True)

    seen = [sample for rank in (*done, *rest) for sample in samples(rank)]
    counts = Counter((epoch, sample_id) for epoch, sample_id, _ in seen)
    assert all(counts[epoch, i] == 1 for epoch in (0, 1) for i in range(len(source)))
    [whole] = take(source, kind, 1, batch_size=2 * len(source), augment=RICH)
    expected = {(epoch, sample_id): image for epoch, sample_id, image in samples([whole])}
    for epoch, sample_id, image in seen:
        if epoch < 2:
            assert torch.equal(image, expected[epoch, sample_id])


def test_known_bad_images_are_replaced_alike_everywhere(sources):
    source = sources["shards"]
    torchs = take(source, "torch", 6)
    if has_dali():
        for ours, theirs in zip(torchs, take(source, "dali", 6), strict=True):
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert (ours.images.int() - theirs.images.int()).abs().max() <= 2
    assert 3 in torch.cat([batch.sample_ids for batch in torchs])
    with create_loader(source, loader="torch", **OPTIONS) as loader:
        for step in range(6):
            plan = loader.planner.plan(step)
            source_ids = np.array([source.sample_id for source in plan.sources])
            assert 3 not in source_ids
            assert np.array_equal(source_ids != plan.sample_ids, plan.sample_ids == 3)
        [next(loader) for _ in range(6)]
        assert loader.late_bad == []


# A file that is damaged in its lower half: DALI reads no more than a crop needs, and notices in some epochs only.

LOW = {"batch_size": 3, "img_size": (16, 16), "augment": Augment(scale=(0.02, 0.1))}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Dataset, list]:
    """Six tall JPEGs, one of which loses its lower part after the index was made; and the batches before that."""
    root = tmp_path_factory.mktemp("damaged")
    for i in range(6):
        Image.fromarray(smooth(400, 64, i)).save(root / f"{i}.jpg", quality=90)
    dataset = open_dataset(root, max_bad_fraction=0.5, cache_dir=root / ".cache")
    before = take(dataset, "dali" if has_dali() else "torch", 14, **LOW)
    path = Path(dataset.path(2))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10].ljust(len(content), b"\xff"))  # no pixels, and no other size
    return dataset, before


@needs_dali
def test_damage_seen_by_some_crops_only_does_not_depend_on_history(damaged):
    dataset, before = damaged
    reported = []
    with create_loader(dataset, loader="dali", seed=3, **LOW) as loader:
        straight = []
        for _ in range(14):
            straight.append(next(loader))
            reported.append(loader.late_bad)
    assert [late.sample_id for late in reported[-1]] == [2]
    same = [
        torch.equal(ours.images[j], theirs.images[j])
        for ours, theirs in zip(straight, before, strict=True)
        for j in range(3)
        if ours.sample_ids[j] == 2
    ]
    assert True in same, "the damage must pass unseen in some epochs, or this test shows nothing"
    assert False in same
    for step in (1, 4, 9, 13):
        options = LOW | {"known_bad": reported[step - 1], "position": 3 * step}
        with create_loader(dataset, loader="dali", seed=3, **options) as loader:
            assert_equal([next(loader) for _ in range(14 - step)], straight[step:])
    for known_bad in ((), reported[-1]):  # nor on what another rank has found
        assert_equal(take(dataset, "dali", 14, known_bad=known_bad, **LOW), straight)


@pytest.mark.parametrize("kind", KINDS)
def test_late_bad_files_tell_where_they_were_found(damaged, kind):
    dataset, _ = damaged
    with create_loader(dataset, loader=kind, seed=3, **LOW) as loader:
        ids = torch.cat([next(loader).sample_ids for _ in range(14)]).tolist()
        [late] = loader.late_bad
    assert (late.sample_id, "does not decode" in late.reason) == (2, True)
    # torch decodes the whole file, whenever it comes, in place of any sample
    assert late.position <= (ids.index(2) if kind == "torch" else len(ids) - 1)
    with create_loader(dataset, loader=kind, seed=3, known_bad=[tuple(late)], **LOW) as loader:
        assert loader.late_bad == [late]
        assert [bad.path for bad in loader.bad_files] == [dataset.path(2)]
