"""What evaluation does on a GPU, without one: all tensors on it, and a host that never waits in a step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from devices import fake_cuda, put_on_cuda

from fastmae.data import Batch
from fastmae.data.sampler import Order
from fastmae.evaluate.finetune import Classification, WeightAverage
from fastmae.model.classifier import VisionTransformer
from fastmae.train.classification import ClassifierModelConfig, FinetuneConfig, classifier_recipe

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
COUNT = 12


def test_the_steps_of_fine_tuning_never_wait(monkeypatch):
    # A generator of the GPU needs one.
    monkeypatch.setattr("fastmae.evaluate.augmentation.torch.Generator", lambda device: torch._C.Generator())
    config = classifier_recipe(FinetuneConfig)
    train = replace(config.train, global_batch_size=COUNT)
    data = replace(config.data, erasing=1.0)  # and the rest of Table 9
    config = replace(config, model=ClassifierModelConfig(img_size=32), train=train, data=data)
    model = VisionTransformer(5, drop_path=0.1, seed=0, **SIZES)
    dataset = SimpleNamespace(channels=3, value_range=None, order=lambda seed: Order(COUNT, seed))
    loader = SimpleNamespace(late_bad=[])
    task = Classification(config, model, dataset, np.arange(COUNT) % 5, lambda *_, **options: loader)
    task.open_loader(0, COUNT, ranks=SimpleNamespace(rank=0, size=1), device=torch.device("cuda"), known_bad=[])
    average = WeightAverage(0.9, "average")
    with fake_cuda(autocast=torch.bfloat16):
        put_on_cuda(model)
        trainer = SimpleNamespace(model=model, step=1)
        average.attach(trainer)
        pixels = torch.zeros(COUNT, 32, 32, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        keys = torch.zeros(COUNT, dtype=torch.int64, device="cuda")
        inputs = task.prepare(Batch(pixels, keys, keys))
        assert all(part.is_cuda for part in inputs)
        assert task.loss(model, *inputs).is_cuda
        average.after_step(trainer)
        with average.applied():
            assert model.head.weight.is_cuda
