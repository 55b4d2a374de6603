"""Networks by `torch.compile` while they train: the batch they were compiled for, and what does not compile."""

import pytest
import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.errors import Notice
from keepdrop.experiments.training.loop import TrainSettings, fit_network

SETTINGS = TrainSettings(epochs=2, batch_size=16, lr=0.02, distill_weight=0.5)


@pytest.fixture(scope="module")
def data():
    return digits().train.select(torch.arange(36))


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return small_cnn()


def trained(data, **settings):
    model = network()
    values = {name: getattr(SETTINGS, name) for name in ("epochs", "batch_size", "lr", "distill_weight")}
    result = fit_network(model, data, TrainSettings(**values, **settings), seed=0, teacher=network())
    return model, [record.loss for record in result.history]


def test_full_batches_are_compiled_and_ragged_ones_are_not(data, monkeypatch):
    seen = []

    def compiler(model, **options):
        assert options == {"dynamic": False}
        return lambda images: seen.append((model.training, len(images))) or model(images)

    plain, expected = trained(data)
    monkeypatch.setattr(torch, "compile", compiler)
    model, losses = trained(data, compile=True)
    assert losses == pytest.approx(expected, rel=1e-4)  # weights lie channels-last, which rounds otherwise
    assert seen == [(True, 16), (False, 16)] * 4
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        assert ours.stride() == theirs.stride()


def test_what_does_not_compile_runs_as_it_is_after_one_sentence(data, monkeypatch):
    def broken(images):
        raise RuntimeError("no C++ compiler\nand how to get one")

    _, expected = trained(data)
    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    with pytest.warns(Notice) as said:
        _, losses = trained(data, compile=True)
    text = (
        "Sequential does not compile (no C++ compiler); it runs operation by operation, which is slower and as right."
    )
    assert [str(each.message) for each in said] == [text] * 2  # network and teacher
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_network_does(data):
    _, expected = trained(data)
    _, losses = trained(data, compile=True)
    assert losses == pytest.approx(expected, rel=1e-3)
