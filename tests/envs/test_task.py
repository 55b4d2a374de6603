"""A mask's outcome is that of the network that is really cut; the baseline is measured once, and must beat chance."""

import copy
import dataclasses
import math

import pytest
import torch
from digits_task import MASKED, QUICK, make_task, trained
from keepdrop.envs import task as task_module
from keepdrop.envs.evaluation.mask_evaluator import count_correct
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.observation import Observation
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.compensation import Compensation
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.envs.task import LayerTask, PruningTask, measure_baseline, replace_model
from keepdrop.errors import UserError
from stepped_meter import clock


def _masks(n_filters, count=4, seed=0):
    masks = torch.rand(count, n_filters, generator=torch.Generator().manual_seed(seed)) < 0.6
    masks[:, 0] = True
    return masks


def _accuracy(model, data):
    correct, total = count_correct(model, data)
    return correct / total


@pytest.fixture(scope="module", params=[MASKED, QUICK], ids=["masked", "compensated"])
def task(request):
    return make_task(request.param)


@pytest.mark.parametrize("name", ["conv1", "conv3"])
def test_a_masks_outcome_is_that_of_the_cut_network(task, name):
    layer, splits = task.layer(name), task.splits
    masks = _masks(layer.n_filters)
    dense = count_cost(task.model, task.example)
    for mask, outcome in zip(masks, layer.outcomes(masks), strict=True):
        model = layer.cut(mask)
        cost = count_cost(model, task.example)
        assert outcome.pruned_accuracy == _accuracy(model, splits.reward)
        assert outcome.base_accuracy == _accuracy(task.model, splits.reward) == task.base.accuracy
        assert (outcome.n_filters, outcome.n_kept) == (layer.n_filters, int(mask.sum()))
        assert (outcome.base_macs, outcome.base_params) == (dense.macs, dense.params)
        assert (outcome.pruned_macs, outcome.pruned_params) == (cost.macs, cost.params)


def test_keeping_everything_changes_nothing(task):
    (outcome,) = task.layer("conv2").outcomes(torch.ones(1, 10, dtype=torch.bool))
    assert outcome.accuracy_drop == 0 and outcome.macs_fraction == 1 and outcome.params_fraction == 1


def test_compensation_helps():
    plain, helped = make_task(MASKED).layer("conv2"), make_task(QUICK).layer("conv2")
    masks = _masks(10, 12) & _masks(10, 12, 1)
    lost, left = (sum(each.accuracy_drop for each in layer.outcomes(masks)) for layer in (plain, helped))
    assert plain.compensation is None and helped.compensation is not None
    assert left < 0.8 * lost


def test_image_indices_pick_the_same_images_for_the_base(task):
    layer, model = task.layer("conv2"), task.model
    mask = _masks(10, 1)[0]
    indices = torch.tensor([3, 200, 17, 249, 60, 61, 62])
    (outcome,) = layer.outcomes(mask[None], indices)
    chosen = task.splits.reward.select(indices)
    assert outcome.base_accuracy == _accuracy(model, chosen)
    assert outcome.pruned_accuracy == _accuracy(layer.cut(mask), chosen)
    wrong = torch.nonzero(~task.base.correct).flatten()
    (outcome,) = layer.outcomes(torch.ones(1, 10, dtype=torch.bool), wrong)
    assert len(wrong) > 0 and outcome.base_accuracy == outcome.pruned_accuracy == 0


def test_later_layers_are_judged_against_the_dense_network():
    task = make_task()
    keep = torch.arange(8) < 5
    later = replace_model(task, task.layer("conv1").cut(keep))
    assert later.base is task.base and later.groups[0].n_filters == 5
    assert later.cost.macs < task.cost.macs == later.base.cost.macs
    masks = _masks(10, 2)
    for mask, outcome in zip(masks, later.layer("conv2").outcomes(masks), strict=True):
        model = later.layer("conv2").cut(mask)
        assert outcome.pruned_accuracy == _accuracy(model, task.splits.reward)
        assert outcome.pruned_macs == count_cost(model, task.example).macs
        assert outcome.base_macs == task.base.cost.macs and outcome.base_accuracy == task.base.accuracy
    assert later.accuracy == _accuracy(later.model, task.splits.reward)


def _after_first_cut(settings):
    """The task once conv1 has lost filters, and its layer conv2."""
    task = make_task(settings)
    first, keep = task.layer("conv1"), torch.arange(8) % 3 > 0
    kept = task.kept.after(task.model, {first.group: keep})
    later = replace_model(task, first.cut(keep), kept)
    return task, later, later.layer("conv2")


@pytest.mark.parametrize("target", ["trained", "dense", "current"])
def test_compensation_aims_at_the_dense_network(target):
    settings = dataclasses.replace(QUICK, target=target)
    task, later, layer = _after_first_cut(settings)
    images, _ = later.fit_images(settings.compensation_images)
    there = {"dense": task.model, "dense_group": task.layer("conv2").group} if target != "current" else {}
    expected = Compensation.fit(later.model, layer.group, images, ridge=settings.ridge, **there)
    masks = _masks(10)
    masks[0], masks[1] = True, torch.arange(10) > 0
    mixes = layer.mixes(masks)
    assert all(torch.equal(mixes[key], value) for key, value in expected.matrices(masks).items())
    # Where something is dropped, kept channels are corrected too with the dense network as target: they drift as well.
    identity = torch.eye(10, dtype=torch.float64)
    kept = mixes["conv2", "conv3"][1][1:, 1:]
    assert torch.allclose(kept, identity[1:, 1:], atol=1e-6) == (target == "current")
    assert torch.equal(mixes["conv2", "conv3"][0], identity)
    for mask, outcome in zip(masks, layer.outcomes(masks), strict=True):
        assert outcome.pruned_accuracy == _accuracy(layer.cut(mask), task.splits.reward)


def _cut(task, name, keep, **how):
    """The task once a layer has kept these filters."""
    layer = task.layer(name)
    return replace_model(task, layer.cut(keep), task.kept.after(task.model, {layer.group: keep}), **how)


def test_compensation_aims_at_the_network_as_it_was_trained_last():
    dense = make_task(QUICK)
    assert dense.compensation_target(dense.layer("conv1").group) is None
    trained = _cut(dense, "conv1", torch.arange(8) % 3 > 0, trained=True)
    group = trained.layer("conv2").group
    assert trained.compensation_target(group) is None
    drifted = _cut(trained, "conv2", torch.arange(10) % 4 > 0)
    again = drifted.with_settings(dataclasses.replace(QUICK, memory=8))
    for task in (drifted, again, replace_model(drifted, copy.deepcopy(drifted.model))):
        model, twin = task.compensation_target(task.layer("conv2").group)
        assert model is trained.model
        # Filters of the trained network: conv2 lost 0, 4 and 8, and what it reads lost nothing since.
        assert twin.cuts[0].channels.flatten().tolist() == [1, 2, 3, 5, 6, 7, 9]
        assert task.compensation_target(task.layer("conv1").group)[1].n_filters == 5
        assert task.dense_twin(task.layer("conv1").group).cuts[0].channels.flatten().tolist() == [1, 2, 4, 5, 7]
    settled = replace_model(drifted, drifted.model, trained=True)
    assert settled.compensation_target(settled.layer("conv3").group) is None
    assert settled.with_settings(MASKED).trained is not settled
    dense_again = settled.with_settings(dataclasses.replace(QUICK, target="dense"))
    assert dense_again.compensation_target(dense_again.layer("conv3").group)[0] is dense.model


def _left_behind(settings):
    """conv2 of a network that was cut and then trained on, away from the dense one: `settings` decide its target."""
    _, later, _ = _after_first_cut(settings)
    model = copy.deepcopy(later.model)
    with torch.no_grad():
        for name in ("conv2", "conv3"):  # the same function, in other units than the dense network's
            model.get_submodule(name.replace("conv", "bn")).weight.mul_(4)
            model.get_submodule(name.replace("conv", "bn")).bias.mul_(4)
        model.conv3.weight.div_(4)
        model.linear.weight.div_(4)
    return replace_model(later, model).layer("conv2")


def _same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("settings", [{"target": "dense"}, {"target": "current"}, {"dtype": "bfloat16"}])
@pytest.mark.filterwarnings("ignore:This processor does not compute in bfloat16:RuntimeWarning")
def test_keeping_everything_is_the_network_bit_for_bit(settings):
    layer = _left_behind(dataclasses.replace(QUICK, **settings))
    task, everything = layer.task, torch.ones(10, dtype=torch.bool)
    assert layer.compensation is not None and layer.compensation.moments
    for cut in (layer.cut(everything), layer.compensation.folded(task.model, everything)):
        assert _same_bits(cut, task.model)
    masks, some = torch.stack([everything, *_masks(10)]), torch.arange(1, 250, 3)
    assert layer.outcomes(masks)[0].pruned_accuracy == layer.outcomes(masks[:1])[0].pruned_accuracy == task.accuracy
    expected = _accuracy(task.model, task.splits.reward.select(some))
    assert layer.outcomes(masks, some)[0].pruned_accuracy == expected
    one_shot = OneShotTask(task, ReconstructionSettings(images=40))
    everything = torch.ones(one_shot.n_filters, dtype=torch.bool)
    assert _same_bits(one_shot.cut(everything), task.model)
    assert one_shot.outcomes(everything[None])[0].pruned_accuracy == task.accuracy
    assert one_shot.outcomes(everything[None], some)[0].pruned_accuracy == expected


def test_a_dense_network_left_behind_would_cost_what_is_kept():
    """What the identity is for: the same regression, asked to make up for one filter, wrecks the trained network."""
    layer = _left_behind(dataclasses.replace(QUICK, target="dense"))
    assert layer.outcomes((torch.arange(10) != 4)[None])[0].pruned_accuracy < layer.task.accuracy - 0.1


def test_a_cut_whose_channels_nobody_told_is_compensated_as_it_is():
    task, _, _ = _after_first_cut(QUICK)
    unknown = replace_model(task, task.layer("conv1").cut(torch.arange(8) % 3 > 0))
    assert unknown.kept is None and unknown.dense_twin(unknown.layer("conv2").group) is None
    same = replace_model(task, copy.deepcopy(task.model))
    assert same.kept is task.kept and same.origin is task


def test_an_unknown_target_is_refused():
    with pytest.raises(UserError, match=r"evaluation.target is 'dence'; expected one of trained, dense, current"):
        dataclasses.replace(QUICK, target="dence")


def test_the_base_is_measured_once(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return measure_baseline(*arguments)

    monkeypatch.setattr(task_module, "measure_baseline", counted)
    task = make_task()
    layer = task.layer("conv1")
    for seed in range(3):
        layer.outcomes(_masks(8, 2, seed))
    later = replace_model(task, layer.cut(torch.arange(8) < 4))
    later.layer("conv2").outcomes(_masks(10))
    assert len(calls) == 1
    make_task(base=task.base)
    assert len(calls) == 1


def test_nothing_is_changed():
    model, splits = trained()
    before = copy.deepcopy(model.state_dict())
    task = PruningTask(model, splits, settings=QUICK)
    layer = task.layer("conv2")
    _ = layer.observation
    layer.outcomes(_masks(10))
    layer.cut(_masks(10)[0])
    OneShotTask(task, None).cut(torch.cat([_masks(n)[0] for n in (8, 10, 12)]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_seed_chooses_the_fit_images():
    one, same, other = make_task(seed=1), make_task(seed=1), make_task(seed=2)
    assert torch.equal(one.fit_images(20)[0], same.fit_images(20)[0])
    assert not torch.equal(one.fit_images(20)[0], other.fit_images(20)[0])
    assert len(one.fit_images(10**6)[0]) == len(one.splits.fit)


def test_the_report_split_is_never_opened():
    model, splits = trained()
    task = PruningTask(model, dataclasses.replace(splits, report=None), settings=QUICK)
    layer = task.layer("conv1")
    assert layer.observation.weights.shape == (8, 9)
    layer.outcomes(_masks(8))


def test_an_untrained_base_is_refused():
    _, splits = trained()
    torch.manual_seed(0)
    text = (
        r"The base network's accuracy on the 250 reward images is 0\.\d{4}, which is chance level \(the most frequent "
        r"class gives 0\.\d{4}\); expected a trained network: check the checkpoint, the normalisation"
    )
    with pytest.raises(UserError, match=text):
        PruningTask(small_cnn(widths=(4, 4)), splits)
    # One that always answers with the same class is no better.
    model = small_cnn(widths=(4, 4))
    with torch.no_grad():
        model.linear.bias[int(splits.reward.labels.mode().values)] += 100
    with pytest.raises(UserError, match="which is chance level"):
        PruningTask(model, splits)


def test_networks_whose_logits_are_not_finite_are_refused():
    _, splits = trained()
    model = small_cnn(widths=(4, 4))
    with torch.no_grad():
        model.linear.bias[:] = torch.nan
    with pytest.raises(UserError, match="which is chance level"):
        PruningTask(model, splits)


def test_bad_masks_are_refused():
    layer = make_task().layer("conv1")
    empty = torch.ones(3, 8, dtype=torch.bool)
    empty[1] = False
    with pytest.raises(ValueError, match=r"a mask of 'conv1' keeps no filter at all; keep at least one"):
        layer.outcomes(empty)
    with pytest.raises(ValueError, match=r"masks of 'conv1' have shape \(1, 9\), expected \(M, 8\)"):
        layer.outcomes(torch.ones(1, 9))
    with pytest.raises(ValueError, match=r"masks of 'conv1' have shape \(8,\), expected \(M, 8\)"):
        layer.outcomes(torch.ones(8))


def test_layers_by_name():
    task = make_task(layers=["conv[12]"])
    assert [group.name for group in task.groups] == ["conv1", "conv2"]
    assert task.layer("conv3").n_filters == 12
    with pytest.raises(UserError, match=r"One layer is decided at a time, but 'conv\*' matches conv1, conv2, conv3"):
        task.layer("conv*")
    with pytest.raises(UserError, match=r"No prunable layer is called 'conv22'; the nearest are 'conv2'"):
        task.layer("conv22")


def test_other_settings_share_what_does_not_depend_on_them(monkeypatch):
    task = make_task(QUICK, seed=1, layers=["conv[12]"])
    layer = task.layer("conv2")
    dense = layer.mixes(_masks(10))
    assert task.cost.macs > 0 and len(task.groups) == 2
    for name in ("measure_baseline", "find_groups", "count_cost"):
        monkeypatch.setattr(task_module, name, None)  # calling it would be an error
    other = task.with_settings(MASKED, seed=2)
    for name in ("model", "splits", "base", "plan", "groups", "limits", "cost", "reward_images"):
        assert getattr(other, name) is getattr(task, name), name
    assert (other.settings, other.seed, task.settings, task.seed) == (MASKED, 2, QUICK, 1)
    assert other.layer("conv2").compensation is None and other.origin is other
    assert not torch.equal(other.fit_images(20)[0], task.fit_images(20)[0])
    again = other.with_settings(QUICK, seed=1).layer("conv2").mixes(_masks(10))
    assert all(torch.equal(again[key], value) for key, value in dense.items())


def test_other_settings_of_a_pruned_network_keep_its_origin():
    task, later, _ = _after_first_cut(QUICK)
    other = later.with_settings(dataclasses.replace(QUICK, target="current"))
    assert other.origin is task and other.kept is later.kept and other.seed == later.seed
    assert [group.name for group in other.groups] == [group.name for group in later.groups]


def test_layers_and_networks_are_decided_alike():
    """What environments know of a task: the same members, by the same names."""
    members = {name for name in vars(task_module.DecisionTask) if not name.startswith("_")}
    for one in (make_task().layer("conv2"), OneShotTask(make_task(), None)):
        assert all(hasattr(one, name) for name in members)
        assert isinstance(one.observation, Observation) and len(one.observation.weights) == one.n_filters
        assert one.n_images == 250


def test_time_is_that_of_the_whole_network_as_it_was_cut():
    """By a clock of steps of 4 filters; a network cut before counts with what is left of it."""
    task = make_task(clock=clock(step=4))
    first, second = task.groups[:2]
    sizes = [group.n_filters for group in task.plan.groups]
    dense = 1e-3 * (1 + sum(math.ceil(n / 4) for n in sizes))
    keep = torch.arange(first.n_filters) < 3
    (outcome,) = LayerTask(task, first).outcomes(keep[None])
    assert outcome.base_seconds == pytest.approx(dense)
    assert outcome.pruned_seconds == pytest.approx(dense - 1e-3 * (math.ceil(first.n_filters / 4) - 1))
    cut = replace_model(task, LayerTask(task, first).cut(keep), KeptChannels().after(task.model, {first: keep}))
    half = torch.arange(second.n_filters) < 4
    (again,) = cut.layer(second.name).outcomes(half[None])
    assert again.base_seconds == outcome.base_seconds
    assert again.pruned_seconds == pytest.approx(outcome.pruned_seconds - 1e-3 * (math.ceil(second.n_filters / 4) - 1))
    assert make_task().outcome(0.9, 0.8, {first: 3}).pruned_seconds is None
