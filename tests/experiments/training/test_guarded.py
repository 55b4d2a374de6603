"""Guarded fine-tuning and its learning rate: what is kept, at which rate, and that no good network gets lost."""

import copy
from dataclasses import replace

import pytest
import torch
from keepdrop.envs.data.metrics import Closeness
from keepdrop.envs.data.objective import TOP1, Objective
from keepdrop.envs.data.sources import ArrayImages
from keepdrop.envs.data.splits import LabelledData, split
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.experiments.training import guarded
from keepdrop.experiments.training.guarded import best_file, fine_tune, keep_better, snapshots_of, train_base
from keepdrop.experiments.training.loop import DivergedError, TrainSettings, fit_network
from keepdrop.experiments.training.rate import bearable_rate, usable_rate
from torch import nn

SHORT = TrainSettings(epochs=4, batch_size=16)


def splits(scale=0.0):
    """Images of noise whose mean is the target times `scale`, or with 0 whether it is positive."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(360, generator=generator)
    pixels = level.view(-1, 1, 1, 1) + 0.5 * torch.randn(360, 1, 6, 6, generator=generator)
    targets = level * scale if scale else (level > 0).long()
    made = ArrayImages(pixels, targets, (0.0,), (1.0,), 0 if scale else 2)
    objective = Objective(Closeness(scale)) if scale else TOP1
    data = LabelledData(made.select(torch.arange(240)), made.select(torch.arange(240, 360)))
    return split(data, reward_from="test", reward_size=60, seed=0, objective=objective)


def network(n_outputs, norm=False):
    torch.manual_seed(1)
    conv = [nn.Conv2d(1, 6, 3), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, n_outputs))


def trained(data, n_outputs, norm=False, lr=0.05, epochs=6):
    model = network(n_outputs, norm)
    fit_network(model, data.fit, TrainSettings(epochs=epochs, batch_size=16, lr=lr), seed=0)
    return model.eval()


def test_a_rate_is_lowered_until_the_network_bears_it():
    data = splits(scale=100.0)
    model = trained(data, 1, lr=1e-5)
    before = hash_state(model)
    rate = bearable_rate(model, data.fit, SHORT, seed=0)
    usable = usable_rate(data.fit, SHORT)
    assert rate < usable and rate == bearable_rate(model, data.fit, SHORT, seed=0) and hash_state(model) == before
    assert f"{usable / rate:.1e}".startswith("1.0e")  # by tenths
    assert bearable_rate(model, data.fit, replace(SHORT, lr=0.3), seed=0) == 0.3  # one's own is one's own
    short = replace(SHORT, epochs=1)
    assert bearable_rate(model, data.fit, short, seed=0) == usable_rate(data.fit, short)  # too short for a trial
    _, judged = fine_tune(model, data, SHORT, seed=0)
    assert max(judged.lr, judged.other_lr or 0) == rate and judged.lowered and judged.kept_accuracy >= judged.before
    assert judged.sentence("m").startswith("The network does not bear a higher") or judged.other_lr is not None


@pytest.mark.parametrize(("steps", "rate"), [(20, 0.0032), (200, 0.01), (1125, 0.024), (5000, 0.05), (20000, 0.05)])
def test_a_short_training_takes_smaller_steps(steps, rate):
    data = splits()
    settings = TrainSettings(epochs=steps / 15, batch_size=16)
    assert usable_rate(data.fit, settings) == rate
    assert usable_rate(data.fit, replace(settings, lr=0.4)) == 0.4


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("epochs", [2, 20, 300])
def test_a_trial_costs_less_than_a_twentieth_of_the_training(monkeypatch, batch_size, epochs):
    """In images that pass forward: a backward pass is worth two."""
    data, settings = splits(), TrainSettings(epochs=epochs, batch_size=batch_size)
    model, passed = network(2), []
    monkeypatch.setattr(
        nn.Flatten, "forward", lambda _, x: passed.append(len(x) * (1 + 2 * torch.is_grad_enabled())) or x.flatten(1)
    )
    nn.init.constant_(model[-1].weight, 1e3)  # bears little, so that every trial is made
    bearable_rate(model, data.fit, settings, seed=0)
    trial = sum(passed)
    passed.clear()
    fit_network(model, data.fit, replace(settings, lr=0.0, epochs=1), seed=0)
    assert trial <= 0.05 * sum(passed) * epochs
    assert (trial > 0) == (epochs > 2)


def test_a_network_with_batch_norm_keeps_the_rate_that_works():
    data = splits()
    model = trained(data, 2, norm=True)
    assert bearable_rate(model, data.fit, replace(SHORT, epochs=340), seed=0) == SHORT.top_lr
    rate = bearable_rate(model, data.fit, SHORT, seed=0)
    assert rate == usable_rate(data.fit, SHORT)
    same = copy.deepcopy(model)
    fit_network(same, data.fit, replace(SHORT, lr=rate), seed=0)
    tuned, judged = fine_tune(model, data, SHORT, seed=0)
    if judged.kept == "last epoch" and judged.other_lr is None:
        assert hash_state(tuned) == hash_state(same) and judged.sentence(None) is None
    assert judged.kept_accuracy >= judged.before


@pytest.mark.parametrize("lr", [3.0, 1e6])
def test_a_training_that_ruins_the_network_leaves_it_as_cut(lr):
    data = splits()
    model = trained(data, 2)
    tuned, judged = fine_tune(model, data, replace(SHORT, lr=lr, momentum=0.0, warmup=0.0), seed=0)
    assert hash_state(tuned) == hash_state(model) and tuned is not model and not tuned.training
    assert (judged.kept, judged.epoch, judged.kept_accuracy) == ("as cut", None, judged.before)
    assert judged.sentence(None).endswith("(accuracy on the reward images): the network is kept as it was cut.")
    assert ("diverged" in judged.sentence(None)) == (judged.after is None) == (lr == 1e6)


def scripted(monkeypatch, accuracies):
    """Accuracies on the reward split as given, in order."""
    left = iter(accuracies)
    monkeypatch.setattr(guarded, "accuracy_on", lambda *_: next(left))


def test_the_best_epoch_is_kept_where_the_last_is_worse(monkeypatch):
    data = splits()
    model, states = trained(data, 2, epochs=1), []
    scripted(monkeypatch, [0.5, 0.4, 0.7, 0.6, 0.3])
    given = replace(SHORT, lr=0.01)
    fit_network(
        copied := copy.deepcopy(model), data.fit, given, seed=0, progress=lambda _: states.append(hash_state(copied))
    )
    tuned, judged = fine_tune(model, data, given, seed=0)
    assert (judged.kept, judged.epoch, judged.kept_accuracy, judged.after) == ("best epoch", 2, 0.7, 0.3)
    assert hash_state(tuned) == states[1]
    assert judged.sentence(None).endswith(": epoch 2 is kept, at 70.00 %.")


def test_the_best_epoch_survives_a_kill(monkeypatch, tmp_path):
    data = splits()
    model, given, snapshot = trained(data, 2, epochs=1), replace(SHORT, lr=0.01), tmp_path / "snapshot.pt"
    scripted(monkeypatch, [0.5, 0.7, 0.6, 0.4, 0.3])
    whole, _ = fine_tune(model, data, given, seed=0)
    scripted(monkeypatch, [0.5, 0.7, 0.6])

    def killed(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, data, given, seed=0, snapshot=snapshot, progress=killed)
    assert best_file(snapshot).exists()
    scripted(monkeypatch, [0.5, 0.4, 0.3])
    resumed, judged = fine_tune(model, data, given, seed=0, snapshot=snapshot)
    assert hash_state(resumed) == hash_state(whole) and (judged.kept, judged.epoch) == ("best epoch", 1)


# On the reward split: as cut, after two epochs, after two at a tenth of the rate. What is kept, and what is said.
TENTH = {
    "the tenth": (
        [0.5, 0.4, 0.3, 0.6, 0.7],
        "last epoch",
        "at 30.00 % and then at a learning rate of {tenth:g} ended at 70",
    ),
    "its best": ([0.5, 0.4, 0.3, 0.6, 0.4], "best epoch", " reward images): epoch 1 at {tenth:g} is kept, at 60.00 %."),
    "the first": ([0.5, 0.6, 0.4, 0.6, 0.5], "best epoch", "ended at 50.00 %, from 50.00 % (accuracy on the reward "),
    "neither": (
        [0.5, 0.4, 0.3, 0.5, 0.5],
        "as cut",
        "from 50.00 % (accuracy on the reward images): the network is kept",
    ),
}


@pytest.mark.parametrize("case", TENTH)
def test_what_ended_no_better_is_tried_at_a_tenth(monkeypatch, tmp_path, case):
    """With a kill in the second attempt, and without."""
    accuracies, kept, said = TENTH[case]
    data, settings, snapshot = splits(), replace(SHORT, epochs=2), tmp_path / "snapshot.pt"
    model = trained(data, 2, norm=True, epochs=1)
    scripted(monkeypatch, accuracies)
    whole, judged = fine_tune(model, data, settings, seed=0)
    rate = usable_rate(data.fit, settings)
    tenth = float(f"{rate / 10:g}")
    assert judged.kept == kept and {judged.lr, judged.other_lr} == {rate, tenth}
    assert said.format(tenth=tenth) in judged.sentence(None)
    calls = []

    def killed(progress):
        calls.append(progress.epoch)
        if len(calls) == 3:
            raise KeyboardInterrupt

    scripted(monkeypatch, accuracies)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, data, settings, seed=0, snapshot=snapshot, progress=killed)
    scripted(monkeypatch, [accuracies[0], accuracies[2], accuracies[4]])
    resumed, again = fine_tune(model, data, settings, seed=0, snapshot=snapshot)
    assert again == judged and hash_state(resumed) == hash_state(whole)
    assert {each.name for each in tmp_path.iterdir()} <= {each.name for each in snapshots_of(snapshot)}


def test_a_second_attempt_that_changes_nothing_is_not_spoken_of(monkeypatch):
    data = splits()
    scripted(monkeypatch, [0.5, 0.4, 0.5, 0.5, 0.5])
    _, judged = fine_tune(trained(data, 2, norm=True, epochs=1), data, replace(SHORT, epochs=2), seed=0)
    assert (judged.kept, judged.other_after) == ("last epoch", 0.5) and judged.lr > judged.other_lr
    assert judged.sentence(None) is None


def test_no_second_attempt_where_the_rate_was_given_or_the_network_ended_better(monkeypatch):
    data, settings = splits(), replace(SHORT, epochs=2)
    model = trained(data, 2, norm=True, epochs=1)
    for chosen, accuracies in (
        (settings, [0.5, 0.4, 0.6]),
        (settings, [1.0, 1.0, 1.0]),
        (replace(settings, lr=0.01), [0.5, 0.4, 0.3]),
    ):
        scripted(monkeypatch, accuracies)
        assert fine_tune(model, data, chosen, seed=0)[1].other_lr is None


def test_the_better_of_two_is_kept():
    data = splits()
    model, other = trained(data, 2), network(2).eval()
    assert keep_better(other, model, data)[0] is model
    kept, judged = keep_better(model, other, data)
    assert hash_state(kept) == hash_state(model) and judged.kept == "as cut" and judged.lr is None
    assert judged.sentence(None).startswith("Fine-tuning ended at ")


def test_divergence_is_told_from_a_metric_that_meets_no_numbers():
    data = splits(scale=100.0)
    with pytest.raises(DivergedError, match="lower lr"):
        fit_network(network(1), data.fit, TrainSettings(epochs=3, batch_size=16, lr=1e4, warmup=0.0), seed=0)


BASE = TrainSettings(epochs=6, batch_size=16, top_lr=0.1)


class Raw(nn.Sequential):
    """Takes pixels that nobody normalised."""

    def forward(self, images):
        return super().forward(40 * images)


def raw():
    return Raw(*network(2))


def test_a_base_network_that_ends_guessing_is_trained_again_at_a_tenth(tmp_path):
    data, model, tenth = splits(), raw(), raw()
    found = train_base(model, data, BASE, seed=0, snapshot=tmp_path / "a.pt")
    fit_network(tenth, data.fit, replace(BASE, lr=0.01), seed=0)
    assert hash_state(model) == hash_state(tenth) and found.lr == 0.01
    (_, first, guesses), (_, second, still) = found.attempts
    assert guesses and not still and second > 0.9 and (first is None or first < 0.7)
    assert "at 0.01 is kept" in found.sentence(None)
    again = raw()  # resumed after its end: nothing is trained anew
    assert train_base(again, data, BASE, seed=0, snapshot=tmp_path / "a.pt") == found
    assert hash_state(again) == hash_state(model) and {*tmp_path.iterdir()} <= {*snapshots_of(tmp_path / "a.pt")}


def test_a_base_network_that_learns_is_trained_once_and_a_given_rate_is_taken():
    data, model, same = splits(), network(2), network(2)
    found = train_base(model, data, BASE, seed=0)
    fit_network(same, data.fit, replace(BASE, lr=0.1), seed=0)
    assert hash_state(model) == hash_state(same) and len(found.attempts) == 1 and found.sentence(None) is None
    found = train_base(raw(), data, replace(BASE, lr=0.0), seed=0)
    assert len(found.attempts) == 1 and found.lr == 0 and "the network guesses" in found.sentence(None)
    with pytest.raises(DivergedError):
        train_base(raw(), data, replace(BASE, lr=1e6), seed=0)
    found = train_base(model := raw(), data, replace(BASE, top_lr=0.0), seed=0)
    assert [attempt[0] for attempt in found.attempts] == [0, 0] and hash_state(model) == hash_state(raw())
