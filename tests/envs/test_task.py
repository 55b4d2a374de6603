import pytest
import torch
from judged import MASKED, QUICK, make_task, trained
from keepdrop.envs.cost import count_cost
from keepdrop.envs.evaluate import correct_flags
from keepdrop.envs.networks import small_cnn
from keepdrop.envs.task import measure_base, replace_model
from keepdrop.envs.whole_network import NetworkTask
from keepdrop.rewards.errors import UserError


def half_masks(n_filters, n_masks=3):
    masks = torch.rand(n_masks, n_filters, generator=torch.Generator().manual_seed(1)) < 0.6
    masks[:, 0] = True
    return masks


@pytest.mark.parametrize("settings", [MASKED, QUICK], ids=["masked", "compensated"])
def test_a_mask_is_worth_what_the_cut_network_is(settings):
    task = make_task(settings)
    layer = task.layer("conv2")
    for mask, outcome in zip(half_masks(10), layer.outcomes(half_masks(10)), strict=True):
        cut = layer.cut(mask)
        right = int(correct_flags(cut, *task.reward_images).sum())
        cost = count_cost(cut, task.example)
        assert outcome.pruned_accuracy == right / len(task.splits.reward)
        assert (outcome.pruned_macs, outcome.pruned_params) == (cost.macs, cost.params)
        assert outcome.n_kept == int(mask.sum())


def test_compensation_keeps_more_of_the_accuracy():
    masks = half_masks(10, 8)
    plain = sum(each.pruned_accuracy for each in make_task(MASKED).layer("conv2").outcomes(masks))
    helped = sum(each.pruned_accuracy for each in make_task(QUICK).layer("conv2").outcomes(masks))
    assert helped > plain


@pytest.mark.parametrize("settings", [MASKED, QUICK], ids=["masked", "compensated"])
def test_whole_network_is_worth_what_the_cut_network_is(settings):
    network = NetworkTask(make_task(settings))
    masks = [half_masks(layer.n_filters, 2) for layer in network.layers]
    for index, outcome in enumerate(network.outcomes(masks)):
        cut = network.cut([mask[index] for mask in masks])
        right = int(correct_flags(cut, *network.task.reward_images).sum())
        assert outcome.pruned_accuracy == right / network.n_images
        assert outcome.pruned_macs == count_cost(cut, network.task.example).macs


def test_base_is_measured_on_the_images_of_the_mask():
    task = make_task()
    few = torch.tensor([3, 5, 8, 13])
    outcome = task.layer("conv1").outcomes(torch.ones(1, 8, dtype=torch.bool), few)[0]
    assert outcome.base_accuracy == int(task.base.correct[few].sum()) / 4
    assert outcome.accuracy_drop == 0


def test_base_stays_that_of_the_dense_network():
    task = make_task()
    cut = task.layer("conv1").cut(half_masks(8)[0])
    later = replace_model(task, cut)
    assert later.base is task.base
    assert later.layer("conv2").outcomes(torch.ones(1, 10, dtype=torch.bool))[0].base_macs == task.cost.macs


def test_network_is_left_bit_for_bit():
    model, _ = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer = make_task(QUICK).layer("conv2")
    layer.outcomes(half_masks(10))
    layer.cut(half_masks(10)[0])
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_that_guesses_is_refused():
    _, splits = trained()
    with pytest.raises(UserError, match=r"which is chance level .* expected a trained network: check the checkpoint"):
        measure_base(small_cnn(widths=(8, 10, 12)), splits)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.bool), "keeps no filter at all; keep at least one"),
        (torch.ones(1, 9, dtype=torch.bool), r"have shape \(1, 9\), expected \(M, 8\)"),
    ],
)
def test_bad_masks_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        make_task().layer("conv1").outcomes(masks)


def test_a_layer_is_one_layer():
    with pytest.raises(UserError, match=r"One layer is decided at a time, but 'conv\*' matches conv1, conv2, conv3"):
        make_task().layer("conv*")
    with pytest.raises(UserError, match=r"No prunable layer is called 'conv9'; the nearest are"):
        make_task().layer("conv9")
