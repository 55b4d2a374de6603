"""Metrics, the objective that images carry, and everything that scores by it."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from keepdrop.envs.data.images import ArrayImages, LabelledData
from keepdrop.envs.data.metrics import (
    F1,
    BalancedAccuracy,
    Closeness,
    MeanIoU,
    PixelAccuracy,
    Top1,
    TopK,
    Within,
    as_float64,
)
from keepdrop.envs.data.objective import GRID, TOP1, Objective, objective_of, output_of, with_objective
from keepdrop.envs.data.sources import from_datasets, npz
from keepdrop.envs.data.splits import split
from keepdrop.envs.evaluation.dense_baseline import measure_baseline
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator, accuracy_on, correct_flags
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.observation import STATISTIC_NAMES, observe
from keepdrop.envs.task import PruningTask
from keepdrop.errors import UserError
from keepdrop.experiments.oracle.single_removals import filter_oracle
from keepdrop.experiments.training.augment import check_augment
from keepdrop.experiments.training.loop import fit_network
from keepdrop.experiments.training.train_settings import TrainSettings
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

torch.set_num_threads(1)
IOU = Objective(MeanIoU())


def maps(n_images, seed, size=8):
    """Images with a bright square, and the map that is 1 on it."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = 0.3 * torch.randn(n_images, 1, size, size, generator=generator), torch.zeros(n_images, size, size)
    for image, target in zip(images, targets, strict=True):
        row, column = torch.randint(size - 3, (2,), generator=generator).tolist()
        image[0, row : row + 4, column : column + 4] += 1
        target[row : row + 4, column : column + 4] = 1
    return images, targets.long()


def segmenter(seed=0):
    torch.manual_seed(seed)
    body = (nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*body, nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()


def array_images(images, targets):
    return ArrayImages(images, targets, [0.0], [1.0], 0)


@pytest.fixture(scope="module")
def splits():
    data = LabelledData(array_images(*maps(200, 0)), array_images(*maps(90, 1)))
    return split(data, reward_from="test", reward_size=61, seed=0, objective=IOU)


@pytest.fixture(scope="module")
def trained(splits):
    model = segmenter()
    result = fit_network(model, splits.fit, TrainSettings(epochs=5, batch_size=20, lr=0.1), seed=0)
    assert result.history[-1].accuracy > result.history[0].accuracy > 0
    return model.eval()


def test_scores_of_hand_made_answers():
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    labels = torch.tensor([2, 0])
    assert Top1()(logits, labels).tolist() == [False, True]
    assert TopK(2)(logits, labels).tolist() == [True, True]
    with pytest.raises(UserError, match="k=9, and with 3 classes every answer is right"):
        TopK(9)(logits, labels)
    found = functional.one_hot(torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]]), 3).movedim(-1, 1).float()
    truth = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    assert PixelAccuracy()(found, truth).tolist() == [0.75, 1.0]
    # Class 0: 1 of 2, class 1: 2 of 3; class 2 occurs in neither.
    assert MeanIoU()(found, truth).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0])
    truth[0, 0, 1], truth[1] = 255, 255
    assert MeanIoU(255)(found, truth).tolist() == [1.0, 1.0] == PixelAccuracy(255)(found, truth).tolist()
    numbers = torch.tensor([[1.0, 2.0], [3.0, 3.5]])
    assert Within(0.25)(numbers, torch.tensor([[1.2, 2.4], [3.0, 3.5]])).tolist() == [0.5, 1.0]
    assert Closeness(2.0)(numbers, torch.tensor([[1.0, 2.0], [5.0, 5.5]])).tolist() == [1.0, 0.5]


def test_mean_iou_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(5, 4, 6, 7, generator=generator), torch.randint(4, (5, 6, 7), generator=generator)
    truth[:, :2] = 9
    for row, (answer, target) in enumerate(zip(logits.argmax(1).numpy(), truth.numpy(), strict=True)):
        valid = target != 9
        each = [
            ((answer == c) & (target == c) & valid).sum() / (((answer == c) | (target == c)) & valid).sum()
            for c in range(4)
        ]
        assert MeanIoU(9)(logits, truth)[row] == pytest.approx(np.mean(each), abs=1e-12)


def test_scores_are_whole_points():
    assert (TOP1.unit, TOP1.dtype, TOP1.name) == (1, torch.bool, "Top1")
    objective = Objective(lambda outputs, _: outputs)
    points = objective.points(torch.tensor([0.0, 0.3125, 1.0, 1 + 1e-7]), torch.zeros(4))
    assert points.dtype == torch.int32 and points.tolist() == [0, 5 * GRID // 16, GRID, GRID]
    assert objective.fraction(points[:3]) == 1.3125 / 3
    assert Objective(TopK(3)).name == "TopK(k=3)" and Objective(functional.mse_loss).name == "mse_loss"


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (
            lambda outputs, _: outputs,
            "<lambda> returns torch.float32 (3, 2) for 3 images; expected a tensor of shape (3,)",
        ),
        (lambda *_: 0.5, "<lambda> returns float for 3 images"),
        (
            lambda outputs, _: outputs[:, 0] * torch.nan,
            "returns scores from nan to nan; expected fractions from 0 to 1",
        ),
        (lambda outputs, _: outputs[:, 0] + 7, "returns scores from 7 to 7; expected fractions from 0 to 1, higher is"),
        (lambda *_: 1 / 0, "<lambda> fails on outputs torch.float32 (3, 2) and targets torch.int64 (3,) (ZeroDivision"),
    ],
)
def test_what_is_no_score_is_refused(metric, text):
    with pytest.raises(UserError, match=re.escape(text)):
        Objective(metric).try_out(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


def test_losses_that_do_not_fit_are_refused():
    outputs, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for loss, text in (
        (functional.l1_loss, "The loss l1_loss fails on outputs torch.float32 (3, 2) and targets torch.int64 (3,)"),
        (lambda outputs, _: outputs, "returns torch.float32 (3, 2) for outputs"),
        (lambda *_: torch.tensor(torch.inf), "expected one finite number, the mean over the batch."),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            Objective(TopK(1), loss).try_out(outputs, labels)
    with pytest.raises(
        UserError, match=re.escape("The network returns (3, 2) for targets of shape (3,); expected one")
    ):
        Objective(Within(1.0)).try_out(outputs, torch.zeros(3))
    with pytest.raises(UserError, match=r"label_smoothing is 0.1, which goes with cross-entropy only"):
        Objective(Within(1.0)).check_smoothing(0.1, torch.zeros(3))
    with pytest.raises(UserError, match=re.escape("hold classes 0..7, but the network has 2; give the class")):
        IOU.try_out(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 7]]]))
    with pytest.raises(UserError, match="returns list; expected a tensor, or a dictionary"):
        output_of([outputs])


def test_default_losses():
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])
    objective = Objective(Within(1.0))
    assert objective.mean_loss(outputs, targets) == 2 and objective.summed_loss(outputs, targets) == 4
    logits, truth = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    truth[0, 0] = 255
    plain = functional.cross_entropy(logits, truth, ignore_index=255)
    assert torch.equal(Objective(MeanIoU(255)).mean_loss({"out": logits}, truth), plain)
    far = objective.distilled(torch.tensor(2.0), outputs, outputs + 3, targets, 0.5, 4.0)
    assert far == 0.5 * 2 + 0.5 * 9
    same = IOU.distilled(torch.tensor(2.0), logits, logits, truth.clamp(max=2), 0.5, 4.0)
    assert float(same) == pytest.approx(1.0)


def test_images_carry_their_measure():
    images = array_images(*maps(9, 0))
    ours = with_objective(images, IOU)
    assert objective_of(ours) is IOU and objective_of(ours.select(torch.arange(3))) is IOU and len(ours) == 9
    assert (ours.image_shape, ours.n_classes, ours.digest()) == ((1, 8, 8), 0, images.digest())
    assert objective_of(with_objective(ours, Objective(PixelAccuracy()))).name == "PixelAccuracy"
    with pytest.raises(
        UserError, match=re.escape("A target is torch.int64 (8, 8), but top-1 accuracy needs one integer")
    ):
        with_objective(ours, TOP1)
    labelled = ArrayImages(maps(9, 0)[0], torch.arange(9), [0.0], [1.0], 9)
    assert with_objective(with_objective(labelled, Objective(TopK(2))), TOP1) is labelled


def test_targets_of_every_source(tmp_path):
    images, targets = maps(12, 0)
    other, maps_of_other = maps(6, 1)
    arrays = {"x_train": images.numpy(), "x_test": other.numpy()}
    for y_train, y_test, shape, dtype in (
        (targets.byte(), maps_of_other.byte(), (8, 8), torch.int64),
        (targets.double().mean((1, 2)), maps_of_other.double().mean((1, 2)), (), torch.float32),
        (targets.sum(2).float(), maps_of_other.sum(2).float(), (8,), torch.float32),
    ):
        np.savez(tmp_path / "data.npz", y_train=y_train.numpy(), y_test=y_test.numpy(), **arrays)
        pairs = from_datasets(TensorDataset(images, y_train), TensorDataset(other, y_test))
        for data in (npz(tmp_path / "data.npz", [0.0], [1.0]), pairs):
            drawn = split(data, reward_from="test", reward_size=3, seed=0, objective=IOU)
            _, batch = drawn.reward.batch(torch.tensor([2, 0]))
            expected = y_test[torch.from_numpy(drawn.indices["reward"][[2, 0]])].to(dtype)
            assert batch.shape == (2, *shape) and batch.dtype == dtype and torch.equal(batch, expected)
            assert data.train.n_classes == 0 and len(drawn.fit.digest()) == 64
    np.savez(tmp_path / "ages.npz", y_train=np.arange(12) + 30, y_test=np.arange(6) + 90, **arrays)
    assert npz(tmp_path / "ages.npz", n_classes=0).test.batch(torch.tensor([1]))[1].tolist() == [91]
    spoilt = targets.double()
    spoilt[3, 0, 0] = torch.nan
    for y_train, y_test, text in (
        (spoilt, maps_of_other.double(), "y_train has NaN or infinite values; fix or remove them."),
        (targets[1:], maps_of_other, "y_train has shape (11, 8, 8); expected 12 targets, one per image."),
        (targets, maps_of_other[:, :4], "differ in target_shape: (8, 8) against (4, 8)"),
    ):
        np.savez(tmp_path / "bad.npz", y_train=y_train.numpy(), y_test=y_test.numpy(), **arrays)
        with pytest.raises(UserError, match=re.escape(text)):
            npz(tmp_path / "bad.npz")
    ragged = [(images[0], targets[0]), (images[1], targets[1, :4])]
    data = from_datasets(ragged, ragged)
    with pytest.raises(UserError, match="Dataset targets differ in shape"):
        data.train.batch(torch.arange(2))
    with pytest.raises(UserError, match="a target that is a number, an array or a tensor; got str"):
        from_datasets([(images[0], "cat")], ragged)


def test_a_masks_points_are_the_same_whatever_is_around(trained, splits):
    """Batch, cache, order, memory and the way of evaluation do not show; the keep-all mask is the network."""
    images, targets = splits.reward.batch(torch.arange(len(splits.reward)))
    groups = find_groups(trained, images[:1]).groups
    generator = torch.Generator().manual_seed(0)
    masks = {group.name: torch.rand(4, group.n_filters, generator=generator) > 0.3 for group in groups}
    for mask in masks.values():
        mask[0] = True
    of = lambda **how: MaskEvaluator(trained, groups, images, targets, objective=IOU, **how)  # noqa: E731
    points = of(batch=61).correct_per_image(masks)
    assert points.dtype == torch.int32 and points.unique().numel() > 10
    for how in ({"batch": 7}, {"batch": 60, "memory": 0}, {"cache_gib": 0.0, "batch": 16}):
        evaluator = of(**how)
        assert torch.equal(evaluator.correct_per_image(masks), points)
        chosen = torch.tensor([40, 3, 17])
        assert torch.equal(evaluator.correct_per_image(masks, image_indices=chosen), points[:, chosen])
        assert torch.equal(evaluator.correct(masks), points.long().sum(1))
    naive = correct_flags(trained, images, targets, objective=IOU)
    assert (points[0] - naive).abs().max() <= GRID * 0.02 and points[0].double().mean() == pytest.approx(
        naive.double().mean().item(), rel=1e-3
    )
    assert accuracy_on(trained, splits.reward) == IOU.fraction(naive)


def test_a_task_evaluates_cuts_and_observes_by_the_objective(trained, splits):
    task = PruningTask(trained, splits)
    layer = task.layer(task.groups[1].name)
    assert task.base.accuracy == task.accuracy > 0.6
    keep = torch.ones(2, layer.n_filters, dtype=torch.bool)
    keep[1, ::2] = False
    whole, half = layer.outcomes(keep)
    assert whole.base_accuracy == task.base.accuracy and whole.pruned_accuracy == pytest.approx(task.accuracy, abs=1e-3)
    assert half.pruned_accuracy == pytest.approx(accuracy_on(layer.cut(keep[1]), splits.reward), abs=1e-3)
    taylor = layer.observation.statistics[:, STATISTIC_NAMES.index("taylor")]
    images, targets = task.fit_images(200)
    assert np.isfinite(taylor).all() and taylor.any()
    batched = observe(trained, layer.group, images, targets, batch=33, objective=IOU).statistics
    np.testing.assert_allclose(batched[:, STATISTIC_NAMES.index("taylor")], taylor, rtol=1e-3)
    oracle = filter_oracle(trained, layer.group, *task.reward_images, objective=IOU)
    alone = keep[:1].repeat(layer.n_filters, 1) ^ torch.eye(layer.n_filters, dtype=torch.bool)
    found = layer.evaluator.correct({layer.group.name: alone}).double() / (GRID * layer.n_images)
    torch.testing.assert_close(oracle.accuracy_change, found - whole.pruned_accuracy, atol=1e-6, rtol=0)


def test_a_network_that_guesses_is_refused(splits, trained):
    with pytest.raises(UserError, match=r"MeanIoU on the 61 reward images is 0\.\d+, and 0\.\d+ against other images'"):
        measure_baseline(segmenter(3), splits)
    assert measure_baseline(trained, splits).accuracy > 0.6


def test_augmentation_must_not_move_images_away_from_their_maps(splits):
    with pytest.raises(UserError, match=re.escape("Targets of shape (8, 8) are maps of the images, and augmentation")):
        check_augment(lambda images, _: images, splits.fit)
    check_augment(None, splits.fit)


def test_regression_trains_with_distillation():
    images, targets = maps(64, 0)
    means = targets.float().mean((1, 2)) + images.mean((1, 2, 3))
    data = with_objective(array_images(images, means), Objective(Closeness(0.1)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    before = accuracy_on(model, data)
    fit_network(model, data, TrainSettings(epochs=30, batch_size=16, lr=0.05), seed=0)
    assert accuracy_on(model, data) > before + 0.1
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    settings = TrainSettings(epochs=30, batch_size=16, lr=0.02, distill_weight=1.0)
    untaught = accuracy_on(student, data)
    fit_network(student, data, settings, seed=0, teacher=model)
    assert accuracy_on(student, data) > untaught


class _OnMps:
    """A tensor on a device without float64."""

    device = SimpleNamespace(type="mps")

    def __init__(self, values):
        self._values = values

    def cpu(self):
        return self._values

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_float64_where_the_device_has_none():
    values = torch.rand(3)
    assert torch.equal(as_float64(_OnMps(values)), values.double())
    assert as_float64(values).dtype == torch.float64


def answers_of(metric, truth, found, n_classes=4):
    logits = functional.one_hot(torch.tensor(found), n_classes).float()
    return metric(logits, torch.tensor(truth))


def test_metrics_of_a_set_are_the_textbook_figures():
    """By hand: class 0 has 3 of 4 right, class 1 has 1 of 2, class 2 none of 1, and class 3 is answered once."""
    truth, found = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 3]
    balanced = BalancedAccuracy()
    assert balanced.of_set(answers_of(balanced, truth, found)) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    per_class = [6 / 8, 2 / 4, 0, 0]
    assert F1().of_set(answers_of(F1(), truth, found)) == pytest.approx(sum(per_class) / 4)
    assert [F1(each).of_set(answers_of(F1(each), truth, found)) for each in range(4)] == pytest.approx(per_class)
    assert F1(3).of_set(answers_of(F1(3), truth[:4], found[:4])) == 1
    with pytest.raises(UserError, match="positive=4, and the network answers 4 classes; expected 0 to 3"):
        answers_of(F1(4), truth, found)
    one_logit = F1(1)(torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1, 0, 0]))
    assert F1(1).of_set(one_logit) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="The metric F1 was given positive=-1; expected a class, 0 or above"):
        F1(-1)
    with pytest.raises(UserError, match="one row of at most 32768 logits and one label per image"):
        F1()(torch.zeros(3, 2, 5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("metric", [BalancedAccuracy(), F1(), F1(positive=2)])
def test_a_set_is_scored_as_a_whole_however_it_is_batched(metric):
    """Masks, subsets, whole data sets and the oracle: the metric of all answers, not a mean over batches."""
    generator, objective = torch.Generator().manual_seed(0), Objective(metric)
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 10)
    pixels = 0.5 * torch.randn(2, 90, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    data = LabelledData(*(ArrayImages(each, labels, [0.0], [1.0], 3) for each in pixels))
    splits = split(data, reward_from="test", reward_size=61, seed=0, objective=objective)
    torch.manual_seed(0)
    body = (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(4, 3))
    done = fit_network(model, splits.fit, TrainSettings(epochs=12, batch_size=16, lr=0.05), seed=0)
    assert all(0 <= each.accuracy <= 1 for each in done.history) and done.history[-1].accuracy > 0.4
    model.eval()
    reward = splits.reward.batch(torch.arange(61))
    with torch.no_grad():
        whole = metric.of_set(metric(model(reward[0]), reward[1]))
    assert accuracy_on(model, splits.reward) == objective.fraction(correct_flags(model, *reward, 7, objective)) == whole
    task = PruningTask(model, splits)
    layer, masks = task.layer("0"), torch.rand(5, 6, generator=generator) > 0.4
    masks[0] = True
    for outcome, keep in zip(layer.outcomes(masks), masks, strict=True):
        assert outcome.base_accuracy == whole
        assert outcome.pruned_accuracy == pytest.approx(accuracy_on(layer.cut(keep), splits.reward), abs=0.02)
    rows = torch.arange(0, 61, 3)
    with torch.no_grad():
        part = metric.of_set(metric(model(reward[0][rows]), reward[1][rows]))
    assert [each.base_accuracy for each in layer.outcomes(masks, image_indices=rows)] == [part] * 5
    oracle = filter_oracle(model, layer.group, *reward, objective=objective, batch=20)
    alone = ~torch.eye(6).bool()
    with torch.no_grad():
        expected = [accuracy_on(masked_by(model, each), splits.reward) - whole for each in alone]
    assert oracle.accuracy_change.tolist() == pytest.approx(expected, abs=1e-6)


def masked_by(model, keep):
    """A copy of the network whose first convolution puts out zeros for what `keep` drops."""
    copied = copy.deepcopy(model)
    copied[0].weight.data[~keep], copied[0].bias.data[~keep] = 0, 0
    return copied
