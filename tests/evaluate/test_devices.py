"""What evaluation does on a GPU: without one, that all tensors are on it and the host does not wait; with one, that the
numbers are the CPU's."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
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
from fastmae.evaluate import augmentation, features, linear
from fastmae.evaluate.attentive import attentive_scores, evaluate_attentive, fit_attentive
from fastmae.evaluate.augmentation import BatchAugment
from fastmae.evaluate.finetune import Classification, WeightAverage
from fastmae.evaluate.frozen import Split
from fastmae.evaluate.knn import evaluate_knn
from fastmae.evaluate.linear import evaluate_logistic
from fastmae.model.ablations import AblatedMAE
from fastmae.model.classifier import VisionTransformer, scales_of
from fastmae.ops import Masking, random_masking
from fastmae.train.classification import ClassifierModelConfig, FinetuneConfig, LabelledDataConfig, classifier_recipe

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
COUNT = 12


def fine_tuning() -> tuple[Classification, SimpleNamespace]:
    """A task with all of Table 9, and what its callbacks see of a trainer."""
    config = classifier_recipe(FinetuneConfig)
    train, data = replace(config.train, global_batch_size=COUNT), replace(config.data, erasing=1.0)
    config = replace(config, model=ClassifierModelConfig(img_size=32), train=train, data=data)
    model = VisionTransformer(5, drop_path=0.1, seed=0, **SIZES)
    dataset = SimpleNamespace(channels=3, value_range=None, order=lambda seed: Order(COUNT, seed))
    loader = SimpleNamespace(late_bad=[])
    task = Classification(config, model, dataset, np.arange(COUNT) % 5, lambda *_, **options: loader)
    task.open_loader(0, COUNT, ranks=SimpleNamespace(rank=0, size=1), device=torch.device("cuda"), known_bad=[])
    return task, SimpleNamespace(model=model, step=1)


def take_step(task: Classification, average: WeightAverage, trainer: SimpleNamespace) -> None:
    images = torch.zeros(COUNT, 32, 32, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    keys = torch.zeros(COUNT, dtype=torch.int64, device="cuda")
    inputs = task.prepare(Batch(images, keys, keys))
    assert all(part.is_cuda for part in inputs)
    task.loss(task.model, *inputs).backward()
    average.after_step(trainer)


def test_the_steps_of_fine_tuning_never_wait(monkeypatch):
    # A generator of the GPU needs one.
    monkeypatch.setattr("fastmae.evaluate.augmentation.torch.Generator", lambda device: torch._C.Generator())
    task, trainer = fine_tuning()
    average = WeightAverage(0.9, "average")
    with fake_cuda(autocast=torch.bfloat16):
        task.model.to("cuda")
        average.attach(trainer)
        take_step(task, average, trainer)
        with average.applied():
            assert task.model.head.weight.is_cuda


@pytest.mark.gpu
def test_the_steps_of_fine_tuning_never_wait_for_a_gpu():
    task, trainer = fine_tuning()
    task.model.to("cuda")
    average = WeightAverage(0.9, "average")
    average.attach(trainer)
    with torch.autocast("cuda", torch.bfloat16):
        take_step(task, average, trainer)  # compiles kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(task, average, trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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


def test_each_process_of_a_node_has_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, value in {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    moved = lambda device: SimpleNamespace(mean=SimpleNamespace(is_cuda=device.type == "cuda", device=device))  # noqa: E731
    model = command.on_device(SimpleNamespace(to=moved), "auto")
    assert current == [model.mean.device] == [torch.device("cuda:2")]
    assert command.on_device(SimpleNamespace(to=moved), "cpu").mean.device.type == "cpu"
    assert len(current) == 1


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


def to_cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.gpu
@pytest.mark.parametrize("name", augmentation.OPERATIONS)
def test_gpu_operations_are_the_cpus(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8, generator=generator)
    operations, levels = (
        np.full((4, 1), list(augmentation.OPERATIONS).index(name)),
        np.array([[0.1], [0.4], [0.7], [1]]),
    )
    for sign in (-1.0, 1.0):
        keys = operations, levels, np.full((4, 1), sign)
        expected, found = (augmentation.randaugment(batch, *keys) for batch in (images, images.cuda()))
        differences = (found.cpu().int() - expected.int()).abs()
        assert (differences > 1).float().mean() < 0.01  # rounding, on the edge of a bin or of the image


@pytest.mark.gpu
def test_gpu_augmentation_mixes_erases_and_labels_as_the_cpu():
    images, labels = torch.rand(16, 3, 32, 48, generator=torch.Generator().manual_seed(0)), np.arange(16) % 5
    keys, normalized = (np.arange(16), np.zeros(16, np.int64)), lambda x: x * 2 - 1
    config = LabelledDataConfig(randaugment=0, erasing=0.25)
    cpu, gpu = (BatchAugment(3, 5, config)(batch, labels, *keys, normalized) for batch in (images, images.cuda()))
    torch.testing.assert_close(gpu[1].cpu(), cpu[1])
    assert gpu[0].isfinite().all()
    boxes, _ = augmentation.draw_erasing(3, keys[1], keys[0], (32, 48), 0.25)
    whole = [
        i for i in range(16) if not boxes[[i, i ^ 1], 2].any()
    ]  # noise, which is the device's, has no part in them
    assert 0 < len(whole) < 16
    torch.testing.assert_close(gpu[0][whole].cpu(), cpu[0][whole])


@pytest.mark.gpu
def test_gpu_probes_are_the_cpus():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 6
    features = torch.randn(6, 16, generator=generator)[labels] + 0.5 * torch.randn(300, 16, generator=generator)
    cpu = Split(features[:200], labels[:200], features[200:], labels[200:], 6)
    gpu = Split(*map(to_cuda, cpu))
    assert torch.equal(gpu.held_out(3).test_labels.cpu(), cpu.held_out(3).test_labels)
    for evaluate in (partial(evaluate_knn, k=10, temperature=0.07), partial(evaluate_logistic, l2=0.01)):
        assert evaluate(gpu) == pytest.approx(evaluate(cpu), abs=0.011)  # an image of 100
    tokens = cpu._replace(inputs=cpu.inputs.half()[:, None], tests=cpu.tests.half()[:, None])
    tokens = tokens._replace(labels=gpu.labels, test_labels=gpu.test_labels)
    assert evaluate_attentive(tokens, lr=1e-2, epochs=20, num_queries=2)["top1"] > 0.9
    assert fit_attentive(tokens.inputs, gpu.labels, 6, lr=1e-2, epochs=1, num_queries=2).queries.is_cuda


ABLATED = [
    {"encoder_mask_tokens": True, "decoder_depth": 0},
    {"class_token": False, "num_outputs": 7},
    {"encoder_mask_tokens": True, "loss_on_all_patches": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("options", ABLATED)
def test_gpu_ablations_are_the_cpus(options):
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masking = random_masking(3, 16, 0.75, seed=2)
    targets = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(1)) if "num_outputs" in options else None
    outcomes = []
    for move in (lambda x: x, to_cuda):
        model = AblatedMAE(**SIZES | decoder | options, seed=0)
        model = model.cuda() if move is to_cuda else model
        moved = {"masking": Masking(*map(move, masking)), "targets": move(targets)}
        loss = model(move(images), full_pred=False, **moved).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append({"loss": loss.detach()} | gradients)
    assert_close_by_norm(*outcomes)


@pytest.mark.gpu
def test_a_gpus_stochastic_depth_is_the_cpus():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scales = scales_of(torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(2)), 0.5)
    outcomes = []
    for move in (lambda x: x, to_cuda):
        model = VisionTransformer(5, pool="avg", drop_path=0.5, seed=0, **SIZES)
        model = model.cuda() if move is to_cuda else model
        out = model(move(images), path_scales=move(scales))
        (1000 * out).square().sum().backward()
        outcomes.append({"out": out.detach()} | {name: p.grad for name, p in model.named_parameters()})
    assert_close_by_norm(*outcomes)


def assert_close_by_norm(expected, found):
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name].cpu() - tensor).norm() <= 2e-3 * tensor.norm() + 1e-6, name
