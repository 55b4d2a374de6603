"""CUDA graphs of a training step: the same steps, what cannot be captured, ragged batches, averages, resuming.

Without a GPU a recorder of operations stands for the graphs (`recorded_graphs`).
"""

import random
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from keepdrop.envs.data.metrics import BinaryAccuracy
from keepdrop.envs.data.objective import ImagesWithObjective, Objective
from keepdrop.envs.data.sources import ArrayImages, digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.training import feed, loop
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.graphs import WARM, Graphed, _host_randomness
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from recorded_graphs import RecordedCapture
from torch import nn

SETTINGS = TrainSettings(epochs=3, batch_size=16, distill_weight=0.5, ema=0.9, lr=0.02)
N_FULL = 3 * 8  # steps on 128 images; each epoch ends with a ragged one of 4


@pytest.fixture(scope="module")
def data():
    return digits().train.select(torch.arange(132))


@pytest.fixture
def captured(monkeypatch):
    """A training as on a GPU, with a recorder for its graphs."""

    def prepared(*reasons):
        capture = RecordedCapture(reasons)
        monkeypatch.setattr(loop, "runs_ahead", lambda device: True)
        monkeypatch.setattr(feed, "free_bytes", lambda device: 2**40)
        monkeypatch.setattr(loop, "capture_of", lambda device: capture)
        return capture

    return prepared


class Dropping(nn.Module):
    """Dropout draws from a generator in every step."""

    def __init__(self):
        super().__init__()
        self.body, self.dropout = small_cnn(), nn.Dropout(0.1)

    def forward(self, images):
        return self.dropout(self.body(images))


def network(seed=0, kind=Dropping):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind()


def trained(data, settings=SETTINGS, kind=Dropping, **options):
    model = network(kind=kind)
    options = {"seed": 3, "augment": RandomCropFlip(1, flip=False), "teacher": network(1)} | options
    return model, fit_network(model, data, settings, **options)


@pytest.mark.parametrize("changed", [{}, {"bf16": True, "ema": None}, {"momentum": 0.0}])
def test_a_replayed_step_is_the_step(data, captured, changed):
    """Rates, the ramp of the average, momentum, statistics and chance: nothing is frozen that changes."""
    settings, capture = replace(SETTINGS, **changed), captured()
    seen = []
    model, result = trained(data, settings, epoch_ends=lambda record: seen.append(record.step))
    assert (capture.captures, capture.replays) == (2, 2 * (N_FULL - WARM))
    captured("it is looked at")
    eager, alike = trained(data, settings, epoch_ends=lambda record: None)
    assert hash_state(model) == hash_state(eager) and result == alike
    assert seen == [9, 18, 27]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_graphs_train_as_a_cpu_does(data, captured):
    settings = replace(SETTINGS, distill_weight=0.0)
    plain, expected = trained(data, settings)
    captured()
    model, result = trained(data, settings)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    for record, each in zip(result.history, expected.history, strict=True):
        assert record.loss == pytest.approx(each.loss, rel=1e-4) and record.lr == each.lr


def test_resumes_from_its_snapshot_to_the_same_weights(data, captured, tmp_path):
    captured()
    whole, _ = trained(data)

    def interrupt(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data, snapshot=tmp_path / "snapshot", progress=interrupt)
    resumed, result = trained(data, snapshot=tmp_path / "snapshot")
    assert hash_state(resumed) == hash_state(whole) and len(result.history) == 1


def test_weights_that_move_in_memory_are_followed(data, captured):
    """As where somebody loads or orders weights between two epochs: a graph would go on with those that were."""
    kept = []

    def move(record):
        for parameter in model.parameters():
            kept.append(parameter.data)
            parameter.data = parameter.data.clone()

    found = []
    for reasons in ((), ("it is looked at",)):
        capture, model = captured(*reasons), network()
        fit_network(model, data, SETTINGS, seed=3, teacher=network(1), epoch_ends=move)
        found.append((hash_state(model), capture.captures))
    assert found[0][0] == found[1][0] and (found[0][1], found[1][1]) == (4, 0)


def test_few_steps_and_graphs_off_capture_nothing(data, captured):
    for settings in (replace(SETTINGS, epochs=1), replace(SETTINGS, graphs=False)):
        capture = captured()
        trained(data, settings)
        assert capture.captures == 0


@pytest.mark.parametrize("odd", [False, True])
def test_one_logit_per_target_is_captured_where_all_targets_are_known(data, captured, odd):
    """To look at targets asks the device for them; a third value is an error, as ever."""
    images, labels = data.batch(torch.arange(len(data)))
    binary = ArrayImages(images, (labels % 2).float()[:, None], [0.0], [1.0], 0)
    binary.labels[7] += 5 * odd
    binary = ImagesWithObjective(binary, Objective(BinaryAccuracy(), binary=True))
    capture = captured()
    with pytest.raises(UserError, match=r"targets hold [56]; expected 0 and 1") if odd else nullcontext():
        fit_network(network(kind=lambda: small_cnn(n_classes=1)), binary, replace(SETTINGS, distill_weight=0.0), seed=0)
    assert capture.captures == (not odd)


class Asking(Dropping):
    """Looks at a value in every step."""

    def forward(self, images):
        answer = super().forward(images)
        return answer * (0.5 if float(answer.detach().mean()) > 1e9 else 1.0)


class Counting(Dropping):
    """Does something else in every step, which a graph would freeze without an error."""

    steps = 0

    def forward(self, images):
        self.steps += self.training
        return super().forward(images) * (1 + 0.01 * self.steps)


class Branching(Counting):
    """Another operation in every second step."""

    def forward(self, images):
        self.steps += 1
        answer = self.dropout(self.body(images))
        return answer.tanh() if self.steps % 2 else answer


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Asking, "operation not permitted when stream is capturing"),
        (Counting, "it does something else in every step"),
        (Branching, "it does something else in every step"),
    ],
)
def test_what_cannot_be_captured_runs_as_ever(data, captured, kind, reason):
    captured("it is looked at")
    expected, _ = trained(data, kind=kind)
    capture = captured()
    with pytest.warns(Notice) as said:
        model, _ = trained(data, kind=kind)
    assert [str(each.message) for each in said] == [
        f"The step of this training is not captured as a CUDA graph: {reason}. It runs operation by operation, which "
        "is slower and as right."
    ]
    assert capture.captures == 1  # the teacher, all the same
    assert hash_state(model) == hash_state(expected)


def test_a_graph_keeps_its_memory_and_other_shapes_are_called():
    capture, calls = RecordedCapture(), []

    def function(tensors, numbers):
        calls.append(len(tensors[0]))
        return (tensors[0] * numbers[0],)

    graphed = Graphed(function, capture, "It")
    for number in range(WARM):
        (found,) = graphed((torch.full((2,), float(number)),), (2.0,))
        assert found.tolist() == [2.0 * number] * 2
    (first,) = graphed((torch.ones(2),), (3.0,))
    assert first.tolist() == [3.0, 3.0]
    assert graphed((torch.ones(5),), (3.0,))[0].tolist() == [3.0] * 5
    (second,) = graphed((torch.ones(2),), (7.0,))
    assert second is first and first.tolist() == [7.0, 7.0]
    assert calls == [2] * WARM + [2, 5] and capture.replays == 2  # the first of the last two is the capture


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, lambda: np.random.rand()])
def test_drawing_on_the_host_is_seen(draw):
    before = _host_randomness()
    assert before == _host_randomness()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    draw()
    try:
        assert before != _host_randomness()
    finally:
        for restore, state in zip((torch.set_rng_state, random.setstate, np.random.set_state), states, strict=True):
            restore(state)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gpu_trains_by_graphs_what_it_trains_step_by_step(data, bf16, monkeypatch):
    """Within 1 % of the loss of each epoch; no notice, so both graphs were captured."""
    found = {}
    for graphs in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Notice)
            _, found[graphs] = trained(data, replace(SETTINGS, bf16=bf16, graphs=graphs), device="cuda")
    losses = [[record.loss for record in found[graphs].history] for graphs in (True, False)]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)


@needs_gpu
@pytest.mark.parametrize("kind", [Asking, Counting])
def test_a_gpu_says_what_it_does_not_capture(data, kind):
    with pytest.warns(Notice, match="not captured as a CUDA graph: it (asks the GPU for values|does something else)"):
        trained(data, kind=kind, device="cuda")


@needs_gpu
def test_a_gpu_resumes_and_draws_as_a_cpu_does(data, tmp_path):
    def interrupt(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    _, whole = trained(data, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        trained(data, device="cuda", snapshot=tmp_path / "snapshot", progress=interrupt)
    _, rest = trained(data, device="cuda", snapshot=tmp_path / "snapshot")
    losses = [[record.loss for record in each.history[-1:]] for each in (whole, rest)]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
    order = list(torch.arange(64).split(32))
    batches = [
        list(feed.Feed(data, RandomCropFlip(1), torch.device(name), stay=True).epoch(order, generator))
        for name, generator in ((name, torch.Generator().manual_seed(0)) for name in ("cpu", "cuda"))
    ]
    for (images, labels), (theirs, others) in zip(*batches, strict=True):
        assert torch.equal(images, theirs.cpu()) and torch.equal(labels, others.cpu())
