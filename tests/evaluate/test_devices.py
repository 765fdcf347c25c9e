"""What evaluation does on a GPU, without one: all tensors on it, and a host that never waits in a step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from devices import fake_cuda

from fastmae.cli import evaluate as command
from fastmae.cli.commands import EncodingConfig, LabelledConfig, LinearConfig
from fastmae.data import Batch
from fastmae.data.sampler import Order
from fastmae.evaluate import features, linear
from fastmae.evaluate.attentive import attentive_scores, fit_attentive
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
        model.to("cuda")
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


def test_encoding_images_never_waits(monkeypatch):
    model = VisionTransformer(5, seed=0, **SIZES)

    def batches(dataset, ids, size, batch_size, count, pinned, *_):
        for _ in range(count):
            images = torch.full((batch_size, *size, 3), 128, dtype=torch.uint8, pin_memory=pinned)
            yield images.permute(0, 3, 1, 2), torch.ones(batch_size, dtype=torch.bool)

    monkeypatch.setattr(features, "_batches", batches)
    with fake_cuda() as waiting:
        model.to("cuda")
        counted = []
        options = {"batch_size": 4, "on_batch": lambda: counted.append(len(waiting))}
        found = features.pooled_features(model, SimpleNamespace(channels=3), np.arange(COUNT), **options)
        assert counted == [0, 0, 0]
        assert all(part.is_cuda for part in found)
        waiting.clear()


def test_training_a_linear_probe_never_waits(monkeypatch):
    model = VisionTransformer(5, seed=0, **SIZES)
    images = SimpleNamespace(dataset=None, sample_ids=None, labels=np.arange(COUNT) % 3)
    dataset = SimpleNamespace(order=lambda seed: Order(COUNT, seed))
    monkeypatch.setattr(command, "subset", lambda *_: dataset)
    monkeypatch.setattr(command, "_bar", lambda *_: lambda: None)
    head = linear.create_head(32, 3)  # here, since it reads what it draws
    monkeypatch.setattr(linear, "create_head", lambda *_: head)
    data, encoding = LabelledConfig(Path("images")), EncodingConfig(batch_size=4)
    config = LinearConfig(Path("weights"), data, solver="sgd", epochs=2, warmup_epochs=1, encoding=encoding)
    counted = []
    with fake_cuda() as waiting:
        model.to("cuda")
        keys = torch.zeros(4, dtype=torch.int64, device="cuda")
        batch = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda"), keys, keys)
        monkeypatch.setattr(command, "create_loader", lambda *_, **options: nullcontext([batch] * 6))

        def fit(*arguments, on_batch, **options):
            linear.fit_linear_probe(*arguments, on_batch=lambda loss: counted.append(len(waiting)), **options)
            raise ValueError("trained")

        monkeypatch.setattr(command, "fit_linear_probe", fit)
        with pytest.raises(ValueError, match="trained"):
            command._trained_linear(config, model, images, images, {"dtype": torch.float32, "num_threads": 1})
        assert counted == [counted[0]] * 6
        waiting.clear()


def test_training_an_attentive_probe_waits_once_per_epoch():
    with fake_cuda() as waiting:
        tokens, labels = torch.zeros(COUNT, 4, 8).half(), torch.zeros(COUNT, dtype=torch.int64, device="cuda")
        options = {"lr": 0.1, "num_queries": 2}
        counted = []
        for epochs, batch_size in ((1, 12), (1, 3), (2, 3)):
            waiting.clear()
            pool = fit_attentive(tokens, labels, 3, epochs=epochs, batch_size=batch_size, **options)
            counted.append(len(waiting))
        assert counted == [counted[0], counted[0], counted[0] + 1]
        assert attentive_scores(pool, tokens).is_cuda
        waiting.clear()
