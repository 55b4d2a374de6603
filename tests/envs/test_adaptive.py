"""Adaptive evaluation: how often it is wrong, what it saves, and that memory changes nothing."""

import numpy as np
import pytest
import torch
from judged import make_task
from keepdrop.envs.adaptive import AdaptiveSettings, judge_in_turn, strata_of
from keepdrop.envs.evaluation.settings import EvaluationSettings
from keepdrop.envs.filter_pruning import FilterPruningVectorEnv
from keepdrop.envs.margins import margins
from keepdrop.envs.networks.modes import evaluating
from keepdrop.envs.search_judge import adaptive_outcomes
from keepdrop.envs.sequential import SequentialTask
from keepdrop.errors import UserError
from keepdrop.rewards.outcome import Outcome
from keepdrop.rewards.try_and_learn import TryAndLearn

REWARD = TryAndLearn(0.05)


def _worth(kept):
    def worth(mask, base, accuracy):
        return REWARD(Outcome(base, accuracy, 64, int(kept[mask]), 10, 9, 10, 9)).value

    return worth


def _population(generator, n_masks, n_images, widest):
    """A base at 92 % and masks that lose up to `widest` of it, mostly on the same, hard images."""
    base, hard = torch.rand(n_images, generator=generator) < 0.92, torch.rand(n_images, generator=generator)
    margins = {"telling": hard, "empty": torch.rand(n_images, generator=generator), "none": None}
    flags = []
    for drop in torch.rand(n_masks, generator=generator) * widest:
        noise = torch.rand(2, n_images, generator=generator)
        flags.append((base & ~((hard < 1.5 * drop) & (noise[0] < 0.67))) | (~base & (noise[1] < 0.1)))
    return base, torch.stack(flags), margins


def _trial(seed, settings, n_images=1000, widest=0.08, n_masks=8, margins="none"):
    generator = torch.Generator().manual_seed(seed)
    base, flags, known = _population(generator, n_masks, n_images, widest)
    kept = torch.randint(8, 60, (n_masks,), generator=generator)
    order = torch.randperm(n_images, generator=generator)
    same = torch.eye(n_masks, dtype=torch.bool)
    worth = _worth(kept)
    strata = None if known[margins] is None else strata_of(known[margins][order])
    verdict = judge_in_turn(
        lambda rows, images: flags[rows][:, images], worth, base[order], same, order, settings, strata=strata
    )
    accuracy = float(base.double().mean())
    truth = torch.tensor([worth(i, accuracy, float(row.double().mean())) for i, row in enumerate(flags)])
    return verdict, truth, (base, flags, order)


@pytest.mark.parametrize("margins", ["none", "telling", "empty"])
@pytest.mark.parametrize("widest", [0.02, 0.2])
def test_pairs_are_settled_in_the_wrong_order_less_often_than_stated(widest, margins):
    wrong = called = 0
    for seed in range(40):
        verdict, truth, _ = _trial(seed, AdaptiveSettings(error=0.1, resolution=0.0), widest=widest, margins=margins)
        signs = (truth[:, None] - truth[None, :]).sign()
        called += int((verdict.order != 0).sum())
        wrong += int(((verdict.order != 0) & (verdict.order * signs < 0)).sum())
    assert called > 500
    assert wrong / called < 0.1


def test_near_ties_are_called_wrongly_less_often_than_stated():
    # The hardest case: two masks alike but for chance. Stated: at most 10 % of all pairs, called or not.
    wrong = called = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        base = torch.rand(1000, generator=generator) < 0.9
        flags = base & (torch.rand(2, 1000, generator=generator) < 0.95)
        settings = AdaptiveSettings(error=0.1, resolution=0.0)
        verdict = judge_in_turn(
            lambda rows, images, flags=flags: flags[rows][:, images],
            _worth([32, 32]),
            base,
            torch.eye(2, dtype=torch.bool),
            torch.arange(1000),
            settings,
        )
        truth = int((flags[0].sum() - flags[1].sum()).sign())
        called += int(verdict.order[0, 1] != 0)
        wrong += int(verdict.order[0, 1] not in (0, truth))
    assert called > 10
    assert wrong / 100 <= 0.1


def test_counts_are_those_of_the_images_seen():
    verdict, _, (base, flags, order) = _trial(3, AdaptiveSettings())
    assert 64 <= int(verdict.n_images.min()) < 1000
    for n, accuracy, dense, row in zip(verdict.n_images, verdict.accuracy, verdict.base_accuracy, flags, strict=True):
        assert int(n) in AdaptiveSettings().looks(1000)
        assert int(row[order[:n]].sum()) / int(n) == accuracy
        assert int(base[order[:n]].sum()) / int(n) == dense


def test_strata_say_the_same_with_fewer_images():
    once = AdaptiveSettings(first=100, resolution=100.0)
    apart = {"none": [], "telling": []}
    for kind, errors in apart.items():
        for seed in range(100):
            verdict, _, (base, flags, _) = _trial(seed, once, margins=kind)
            assert 100 <= int(verdict.n_images[0]) < 106
            dropped = verdict.base_accuracy - verdict.accuracy
            errors.append(dropped - (base.double().mean() - flags.double().mean(1)))
    spread = {kind: torch.stack(errors).std() for kind, errors in apart.items()}
    assert spread["telling"] < 0.85 * spread["none"]
    # Each mask's error averages out: no bias.
    mean = torch.stack(apart["telling"]).mean()
    assert mean.abs() < 3 * spread["telling"] / 100**0.5


def test_strata_are_by_margin():
    strata = strata_of(torch.tensor([5.0, 0.1, 9.0, 3.0, 2.0, 8.0, 7.0, 6.0, 4.0, 1.0]))
    assert strata.tolist() == [4, 0, 4, 3, 2, 4, 4, 4, 3, 1]
    everything, _, (base, flags, _) = _trial(2, AdaptiveSettings(first=1000), margins="telling")
    assert everything.accuracy.tolist() == [int(row.sum()) / 1000 for row in flags]
    assert set(everything.base_accuracy.tolist()) == {int(base.sum()) / 1000}


def test_margins_are_those_of_the_network():
    layer = make_task().layer("conv2")
    with torch.inference_mode(), evaluating(layer.task.model):
        logits = layer.task.model(layer.task.reward_images[0])
    top = logits.topk(2).values
    assert torch.allclose(margins(layer), top[:, 0] - top[:, 1], atol=1e-5)
    assert margins(layer) is margins(layer)


def test_no_patience_means_all_images_and_much_means_one_look():
    strict, _, (_, flags, _) = _trial(1, AdaptiveSettings(growth=2.0, error=1e-9, resolution=0.0))
    assert strict.n_images.tolist() == [1000] * 8
    assert strict.accuracy.tolist() == [int(row.sum()) / 1000 for row in flags]
    loose, _, _ = _trial(1, AdaptiveSettings(resolution=100.0))
    assert loose.n_images.tolist() == [64] * 8


def test_looks():
    assert AdaptiveSettings(first=64, growth=2).looks(300) == [64, 128, 256, 300]
    assert AdaptiveSettings(first=64).looks(64) == [64]
    assert AdaptiveSettings(first=64).looks(10) == [10]
    with pytest.raises(UserError, match=r"error=1\.5"):
        AdaptiveSettings(error=1.5)


def _env(settings=None, adaptive=None, images=100):
    evaluation = settings or EvaluationSettings(compensation_images=150, statistics_images=60)
    env = FilterPruningVectorEnv(make_task(evaluation).layer("conv2"), REWARD, 6, images, adaptive)
    env.reset(seed=4)
    return env


def _masks(step):
    masks = np.random.default_rng(step % 3).integers(0, 2, (6, 10)).astype(np.int8)
    masks[:, 0], masks[5] = 1, masks[4]
    return masks


@pytest.mark.parametrize("adaptive", [None, AdaptiveSettings(first=16)])
def test_memory_changes_no_reward_and_disturbs_no_stream(adaptive):
    plain = EvaluationSettings(compensation_images=150, statistics_images=60, memory=0)
    with_memory, without = _env(None, adaptive), _env(plain, adaptive)
    for step in range(7):
        one, other = with_memory.step(_masks(step)), without.step(_masks(step))
        assert np.array_equal(one[1], other[1])
        assert np.array_equal(one[4]["images"], other[4]["images"])
    assert len(with_memory.layer.evaluator._memory) == 15 and len(without.layer.evaluator._memory) == 0


def test_adaptive_steps_report_the_images_seen():
    env = _env(adaptive=AdaptiveSettings(first=16), images=None)
    *_, infos = env.step(_masks(0))
    assert all(16 <= n <= 250 for n in infos["images"])
    order = torch.from_numpy(np.random.default_rng(0).permutation(250))
    settings = AdaptiveSettings(growth=2.0, error=1e-12, resolution=0.0)
    masks = torch.from_numpy(_masks(0)).bool()[:4]
    found, n_images = adaptive_outcomes(env.layer, REWARD, masks, order, settings)
    assert n_images == [250] * 4 and found == env.layer.outcomes(masks)


def test_a_network_is_not_judged_adaptively():
    with pytest.raises(UserError, match=r"search\.adaptive=true works on one layer at a time"):
        FilterPruningVectorEnv(SequentialTask(make_task()), REWARD, adaptive=AdaptiveSettings())
