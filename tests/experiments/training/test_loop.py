"""Training: the arithmetic of one step, determinism, resuming after a kill, distillation, what is refused."""

import copy
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from keepdrop.envs.data.sources import ArrayImages, digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.errors import UserError
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.averaging import Average
from keepdrop.experiments.training.loop import TrainSettings, fit_network, recalibrate_bn
from torch import nn
from torch.nn import functional as F


def images(n_images=40, n_classes=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n_images, 1, 8, 8, generator=generator)
    return ArrayImages(pixels, torch.arange(n_images) % n_classes, (0.0,), (1.0,), n_classes)


def network(seed=0, widths=(3, 3, 4, 4, 5)):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return small_cnn(n_classes=3, widths=widths)


def linear_network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def accuracy(model, data):
    model.eval()
    with torch.inference_mode():
        batch, labels = data.batch(torch.arange(len(data)))
        return float((model(batch).argmax(1) == labels).float().mean())


def test_digits_reach_their_accuracy():
    data = digits(seed=0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = small_cnn()
    settings = TrainSettings(epochs=12, batch_size=64, lr=0.1, warmup=0.2)
    result = fit_network(model, data.train, settings, seed=0, augment=RandomCropFlip(1, flip=False))
    assert accuracy(model, data.test) >= 0.97
    assert [record.epoch for record in result.history] == list(range(1, 13))
    assert result.history[-1].loss < 0.2 * result.history[0].loss and result.history[-1].accuracy > 0.97


def test_one_step_is_nesterov_sgd_with_decay_on_weights_only():
    model, data = linear_network(), images(8)
    expected = copy.deepcopy(model)
    batch, labels = data.batch(torch.arange(8))
    F.cross_entropy(expected(batch), labels).backward()
    settings = TrainSettings(
        epochs=1, batch_size=8, lr=0.1, momentum=0.5, weight_decay=0.01, schedule="constant", warmup=0.0
    )
    fit_network(model, data, settings, seed=0)
    weight, bias = expected[1].weight, expected[1].bias
    # The first nesterov step is lr * (1 + momentum) * gradient.
    torch.testing.assert_close(model[1].weight, weight - 0.15 * (weight.grad + 0.01 * weight))
    torch.testing.assert_close(model[1].bias, bias - 0.15 * bias.grad)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_loss_is_the_published_one(weight):
    model, teacher, data = linear_network(), network(5).eval(), images(8)
    expected = copy.deepcopy(model)
    batch, labels = data.batch(torch.arange(8))
    logits = expected(batch)
    soft = F.softmax(teacher(batch).detach() / 2, 1)
    divergence = (soft * (soft.log() - F.log_softmax(logits / 2, 1))).sum(1).mean()
    ((1 - weight) * F.cross_entropy(logits, labels) + weight * 4 * divergence).backward()
    settings = TrainSettings(
        epochs=1,
        batch_size=8,
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        distill_weight=weight,
        temperature=2.0,
    )
    fit_network(model, data, settings, seed=0, teacher=teacher)
    torch.testing.assert_close(model[1].weight, expected[1].weight - expected[1].weight.grad)


def test_learning_rate_rises_then_falls():
    rates = [TrainSettings(lr=1.0, warmup=0.2, final_lr=0.1).lr_at(step, 100) for step in range(100)]
    assert rates[:20] == sorted(rates[:20]) and rates[19:] == sorted(rates[19:], reverse=True)
    assert rates[0] == pytest.approx(0.05) and rates[19] == 1.0 and rates[99] == pytest.approx(0.1, abs=1e-3)
    linear = TrainSettings(lr=1.0, warmup=0.0, schedule="linear")
    assert [linear.lr_at(step, 4) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert TrainSettings(lr=0.3, warmup=1.0).lr_at(9, 10) > 0


@pytest.mark.parametrize(
    ("n_images", "epochs", "n_steps"), [(40, 2, 6), (40, 0.5, 2), (40, 0, 0), (33, 1, 2), (34, 1, 3)]
)
def test_number_of_steps(n_images, epochs, n_steps):
    """A ragged last batch is kept, one of a single image is not, and fractions of an epoch are possible."""
    model, before = network(), hash_state(network())
    result = fit_network(model, images(n_images), TrainSettings(epochs=epochs, batch_size=16), seed=0)
    assert result.n_steps == n_steps
    assert (hash_state(model) == before) == (n_steps == 0)
    counter = int(model.bn1.num_batches_tracked)
    assert counter == n_steps


def test_same_seed_same_weights_whatever_the_global_generator():
    class Dropping(nn.Sequential):
        """Dropout draws from the global generator."""

    def trained(seed, stir):
        model = Dropping(network(), nn.Dropout(0.3))
        torch.manual_seed(stir)
        state = torch.get_rng_state()
        fit_network(model, images(), TrainSettings(epochs=2, batch_size=16), seed=seed, augment=RandomCropFlip(1))
        assert torch.equal(torch.get_rng_state(), state)
        return hash_state(model)

    assert trained(0, 1) == trained(0, 2) != trained(1, 1)


def test_modes_frozen_parameters_layout_and_teacher_come_back():
    model, teacher = network().train(), network(3).train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    frozen, taught = model.conv1.weight.clone(), hash_state(teacher)
    strides = [parameter.stride() for parameter in model.parameters()]
    fit_network(model, images(), TrainSettings(epochs=1, batch_size=16, distill_weight=0.5), seed=0, teacher=teacher)
    assert model.training and model.bn1.training and not model.bn2.training and teacher.training
    assert torch.equal(model.conv1.weight, frozen) and not model.conv1.weight.requires_grad
    assert hash_state(teacher) == taught and all(p.grad is None for p in teacher.parameters())
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_bf16_computes_in_lower_precision_and_still_learns():
    weights = {}
    for bf16 in (False, True):
        model = network()
        result = fit_network(model, images(), TrainSettings(epochs=8, batch_size=16, bf16=bf16), seed=0)
        weights[bf16] = model.conv2.weight
        assert result.history[-1].loss < result.history[0].loss
        assert model.conv2.weight.dtype == torch.float32
    assert not torch.equal(weights[False], weights[True])
    torch.testing.assert_close(weights[False], weights[True], atol=0.1, rtol=0)


class Interrupted(Exception):  # noqa: N818
    """Stands for the end of the process."""


@pytest.mark.parametrize(("stop_after", "ema"), [(1, None), (2, None), (3, None), (2, 0.9)])
def test_resumes_from_its_snapshot_to_the_same_weights(tmp_path, stop_after, ema):
    settings = TrainSettings(epochs=3.5, batch_size=16, ema=ema)

    def train(model, **kwargs):
        return fit_network(model, images(), settings, seed=0, augment=RandomCropFlip(1), **kwargs)

    def stop(record):
        if record.epoch == stop_after:
            raise Interrupted

    whole = network()
    train(whole)
    with pytest.raises(Interrupted):
        train(network(), snapshot=tmp_path / "snapshot", progress=stop)
    resumed = network(9)
    result = train(resumed, snapshot=tmp_path / "snapshot")
    assert hash_state(resumed) == hash_state(whole)
    assert [record.epoch for record in result.history] == list(range(stop_after + 1, 5))
    again = network(9)
    assert train(again, snapshot=tmp_path / "snapshot").history == ()
    assert hash_state(again) == hash_state(whole)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_loop import TrainSettings, fit_network, images, network
torch.set_num_threads(1)
kill = lambda record: os.kill(os.getpid(), signal.SIGKILL) if record.epoch == 2 else None
settings = TrainSettings(epochs=4, batch_size=16)
fit_network(network(), images(), settings, seed=0, snapshot=Path(sys.argv[2]), progress=kill)
"""


def test_resumes_after_a_real_kill(tmp_path):
    path = tmp_path / "snapshot"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}).returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["snapshot"]
    whole, resumed = network(), network(7)
    settings = TrainSettings(epochs=4, batch_size=16)
    fit_network(whole, images(), settings, seed=0)
    assert len(fit_network(resumed, images(), settings, seed=0, snapshot=path).history) == 2
    assert hash_state(resumed) == hash_state(whole)


def test_the_average_is_what_its_formula_says_and_the_training_is_the_same(monkeypatch):
    """Steps 0, 1, 2, ... keep (1 + step) / (10 + step) of it, until that is more than `ema`."""
    plain, averaged, after = network(), network(), []
    settings = TrainSettings(epochs=2, batch_size=8)
    update = Average.update

    def noted(self, step):
        update(self, step)
        after.append({name: value.detach().clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(Average, "update", noted)
    seen = []

    def ends(record):
        seen.append(averaged.conv1.weight.detach().clone())

    begun = {name: value.detach().clone() for name, value in averaged.state_dict().items()}
    fit_network(plain, images(), settings, seed=0)
    fit_network(averaged, images(), replace(settings, ema=0.3), seed=0, epoch_ends=ends)
    assert len(after) == 10
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in after[-1].items())
    expected = begun["conv1.weight"]
    for step, state in enumerate(after):
        kept = min(0.3, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * state["conv1.weight"]
    torch.testing.assert_close(averaged.conv1.weight.detach(), expected)
    assert len(seen) == 2 and torch.equal(seen[-1], averaged.conv1.weight)
    assert not torch.equal(averaged.conv1.weight, plain.conv1.weight)
    # Statistics are averaged like the weights they describe, and counters stay counters.
    assert not torch.equal(averaged.bn1.running_mean, plain.bn1.running_mean)
    assert torch.equal(averaged.bn1.num_batches_tracked, plain.bn1.num_batches_tracked)


def test_an_average_gets_over_a_rate_that_ends_high():
    """What it is for: weights that jump about an optimum have a better mean."""
    data, generator = images(200), torch.Generator().manual_seed(0)
    data.labels[torch.randperm(200, generator=generator)[:60]] = 0  # noise to jump about
    settings = TrainSettings(epochs=12, batch_size=8, lr=0.1, schedule="constant", weight_decay=0.0)
    losses = {}
    for ema in (None, 0.95):
        model = linear_network()
        fit_network(model, data, replace(settings, ema=ema), seed=0)
        with torch.inference_mode():
            batch, labels = data.batch(torch.arange(len(data)))
            losses[ema] = float(F.cross_entropy(model(batch), labels))
    assert losses[0.95] < losses[None]


@pytest.mark.parametrize("ema", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(ema):
    with pytest.raises(UserError, match=r"ema must lie in \[0, 1\), such as 0.999, or be left out, got"):
        TrainSettings(ema=ema)


def test_snapshot_of_another_training_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "snapshot"
    settings = TrainSettings(epochs=1, batch_size=16)
    fit_network(network(), images(), settings, seed=0, snapshot=path)
    others = [
        (network(), images(), settings, 1),
        (network(), images(41), settings, 0),
        (network(widths=(2, 3, 4, 4, 5)), images(), settings, 0),
        (network(), images(), TrainSettings(epochs=2, batch_size=16), 0),
        (network(), images(), TrainSettings(epochs=1, batch_size=16, ema=0.9), 0),
    ]
    for model, data, chosen, seed in others:
        before = hash_state(model)
        with pytest.raises(UserError, match="belongs to a training with other settings, seed, data or network; delete"):
            fit_network(model, data, chosen, seed=seed, snapshot=path)
        assert hash_state(model) == before
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is damaged; delete it to train from the start\."):
        fit_network(network(), images(), settings, seed=0, snapshot=path)


def test_divergence_is_named():
    data = images()
    data._images *= 1e30
    with pytest.raises(UserError, match=r"Training diverged in epoch 1: the loss is nan; lower lr \(it is 1000.0\)\."):
        fit_network(linear_network(), data, TrainSettings(epochs=1, batch_size=8, lr=1000.0, warmup=0.0), seed=0)


def test_divergence_in_the_very_last_step_is_named():
    data = images(8)
    data._images *= 1e34
    with pytest.raises(UserError, match=r"Training diverged in epoch 1: the weights are no longer finite; lower lr"):
        fit_network(linear_network(), data, TrainSettings(epochs=1, batch_size=8, lr=1e6, warmup=0.0), seed=0)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(
        UserError, match=re.escape("distill_weight=0.5 needs a teacher network; give one or set it to 0.")
    ):
        fit_network(network(), images(), TrainSettings(distill_weight=0.5), seed=0)
    with pytest.raises(UserError, match=re.escape("Training needs at least 2 images, got 1.")):
        fit_network(network(), images(1), TrainSettings(), seed=0)
    with pytest.raises(UserError, match="The network has no parameters, and there is nothing to train"):
        fit_network(nn.Flatten(), images(), TrainSettings(), seed=0, device="cpu")


def test_a_frozen_network_is_trained_as_a_whole_and_frozen_again():
    frozen, free = network().requires_grad_(False), network()
    for model in (frozen, free):
        fit_network(model, images(), TrainSettings(epochs=1, batch_size=16), seed=0)
    assert hash_state(frozen) == hash_state(free) != hash_state(network())
    assert not any(each.requires_grad or each.grad is not None for each in frozen.parameters())
    head = network().requires_grad_(False)
    head.linear.requires_grad_(True)
    fit_network(head, images(), TrainSettings(epochs=1, batch_size=16), seed=0)
    assert torch.equal(head.conv1.weight, network().conv1.weight)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("epochs", -1, "epochs must be 0 or more, got -1."),
        ("lr", float("nan"), "lr must be 0 or more, got nan."),
        ("batch_size", 1, "batch_size must be 2 or more, got 1."),
        ("distill_weight", 1.5, "distill_weight must lie in [0, 1], got 1.5."),
        ("schedule", "steps", "schedule must be 'cosine', 'linear' or 'constant', got 'steps'."),
    ],
)
def test_impossible_settings_are_refused(field, value, text):
    with pytest.raises(UserError, match=re.escape(text)):
        TrainSettings(**{field: value})


def test_recalibration_measures_the_statistics_and_nothing_else():
    model, data = network().train(), images(40)
    model.bn2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert recalibrate_bn(model, data, n_images=40, seed=0, batch_size=20) == 40
    batch, _ = data.batch(torch.arange(40))
    torch.testing.assert_close(model.bn1.running_mean, model.conv1(batch).mean((0, 2, 3)))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("running" in name or "num_batches" in name for name in changed) and "bn5.running_var" in changed
    assert model.bn1.training and not model.bn2.training and model.bn1.momentum == 0.1
    assert recalibrate_bn(linear_network(), data, 40, seed=0) == 0


def test_recalibration_leaves_a_ragged_batch_out_and_repeats_with_its_seed():
    models = [network() for _ in range(3)]
    used = [
        recalibrate_bn(model, images(50), 45, seed=seed, batch_size=20)
        for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert used == [40, 40, 40]
    assert hash_state(models[0]) == hash_state(models[1]) != hash_state(models[2])
