"""Which networks are refused as guessing, with which reason, and which are not, with few or imbalanced images too."""

import re

import pytest
import torch
from keepdrop.envs.data.images import ArrayImages, LabelledData
from keepdrop.envs.data.metrics import F1, BalancedAccuracy, MeanIoU, PixelAccuracy
from keepdrop.envs.data.objective import TOP1, Objective
from keepdrop.envs.data.splits import splits_at
from keepdrop.envs.evaluation.dense_baseline import measure_baseline
from keepdrop.errors import UserError
from torch import nn


def answering(answers, labels, objective=TOP1, n_classes=2):
    """A network that gives these answers (B,) to reward images of these labels (B,), and the splits around them."""
    codes = torch.nn.functional.one_hot(torch.tensor(answers), n_classes).float().view(-1, n_classes, 1, 1)
    codes = codes + 0.01 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    images = ArrayImages(codes, torch.tensor(labels), [0.0] * n_classes, [1.0] * n_classes, n_classes)
    rows = {"fit": [0, 1], "reward": range(len(labels)), "report": [0, 1]}
    indices = {role: torch.as_tensor(list(each)).numpy() for role, each in rows.items()}
    # Each of another source, so that they may share images.
    data = LabelledData(images, images)
    sources = {"fit": "train", "reward": "test", "report": "train"}
    indices["report"] = indices["fit"] + 2
    head = nn.Conv2d(n_classes, n_classes, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(n_classes)[:, :, None, None])
    return nn.Sequential(head, nn.Flatten()), splits_at(data, indices, sources, objective)


def shares(n_images, share):
    """Labels of two classes of which the first has this share."""
    return [int(index >= share * n_images) for index in range(n_images)]


@pytest.mark.parametrize(("n_images", "share"), [(82, 0.9), (441, 0.98), (10, 0.5), (6, 0.5), (50, 0.98)])
def test_perfect_answers_pass_on_few_and_on_imbalanced_images(n_images, share):
    labels = shares(n_images, share)
    assert measure_baseline(*answering(labels, labels)).accuracy == 1


def test_good_answers_pass_where_the_usual_interval_cannot_be_passed():
    """90 % are of one class; 97 % right is less than three standard deviations above that."""
    labels = shares(82, 0.9)
    answers = labels.copy()
    answers[0], answers[-1] = 1, 0
    assert measure_baseline(*answering(answers, labels)).accuracy == pytest.approx(80 / 82)


GUESSES = {
    "one class for all": ([0] * 60, shares(60, 0.7), "chance level (the most frequent class gives 0.7000); expected"),
    "the class is named": (
        [1] * 60,
        shares(60, 0.5),
        "order of the classes (it answers class 1 to every image).",
    ),
    "random": (
        [0, 1] * 100,
        shares(200, 0.5),
        "chance level (the most frequent class gives 0.5000); expected",
    ),
    "one class of images": (
        [0] * 9,
        [0] * 9,
        "which is chance level: all of them are of class 0; give reward",
    ),
    "few images": (
        [0, 0, 0, 1, 1, 1, 1, 0],
        shares(8, 0.5),
        "is chance level on so few images (the most frequent class gives 0.5000, the answers in another order 0.5000)",
    ),
    "less than the most frequent class": (
        [1] * 60 + [0] * 330 + [1] * 10,
        [0] * 390 + [1] * 10,
        "(the most frequent class gives 0.9750), though the answers are no guesses: accuracy says little where one "
        "class is so frequent; choose Settings(metric=keepdrop.BalancedAccuracy()) or keepdrop.F1().",
    ),
}


@pytest.mark.parametrize("case", GUESSES)
def test_guesses_are_refused_with_the_reason(case):
    answers, labels, text = GUESSES[case]
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        measure_baseline(*answering(answers, labels))
    assert caught.value.typed.endswith("metric=f1.") is (case == "less than the most frequent class")


def test_metrics_of_a_set_are_for_those_networks():
    answers, labels, _ = GUESSES["less than the most frequent class"]
    objective = Objective(BalancedAccuracy())
    base = measure_baseline(*answering(answers, labels, objective))
    assert base.accuracy == pytest.approx((330 / 390 + 1) / 2)
    for metric, shown in ((BalancedAccuracy(), "BalancedAccuracy"), (F1(), "F1")):
        with pytest.raises(UserError, match=rf"network's {shown} on the 200 reward images is 0\.\d+, which is chance"):
            measure_baseline(*answering([0, 1] * 100, shares(200, 0.5), Objective(metric)))


def maps(targets, objective):
    """A network that answers class 0 everywhere, surer here than there, with these targets (B, H, W)."""
    pixels = torch.rand(len(targets), 2, *targets.shape[1:], generator=torch.Generator().manual_seed(0))
    images = ArrayImages(pixels, targets, [0.0, 0.0], [1.0, 1.0], 0)
    rows = {"fit": [0, 1], "reward": list(range(len(targets))), "report": [2, 3]}
    sources = {"fit": "train", "reward": "test", "report": "train"}
    indices = {role: torch.tensor(each).numpy() for role, each in rows.items()}
    head = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]])[:, :, None, None])
    return nn.Sequential(head), splits_at(LabelledData(images, images), indices, sources, objective)


def never_wrong(outputs, targets):
    """A metric that does not look at the targets."""
    return torch.ones(len(targets))


@pytest.mark.parametrize("metric", [MeanIoU(ignore_index=1), PixelAccuracy(ignore_index=1), never_wrong])
def test_a_metric_that_cannot_tell_right_from_wrong_is_refused(metric):
    """Class 0 alone is left of two where 1 is ignored, so that whoever answers 0 everywhere scores 1."""
    targets = torch.randint(2, (20, 4, 4), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"scores each of the 20 reward images the same .* \(1\.0000 on average\)"):
        measure_baseline(*maps(targets, Objective(metric)))


def test_a_metric_is_not_blamed_where_all_targets_are_alike():
    assert measure_baseline(*maps(torch.zeros(20, 4, 4).long(), Objective(never_wrong))).accuracy == 1


class OfSet:
    """A metric of a set that writes into the outputs it is given."""

    is_of_set = True

    def __call__(self, outputs, targets):
        right = (outputs.argmax(1) == targets).to(torch.int32)
        outputs.zero_()
        return right

    def of_set(self, answers):
        return float(answers.float().mean())


@pytest.mark.parametrize("metric", [OfSet(), lambda outputs, targets: OfSet()(outputs, targets).double()])
def test_guesses_of_any_metric_are_told_in_one_pass(metric):
    """Other images' targets are scored against the same outputs, whatever the metric does to them."""
    passes, labels = [], shares(60, 0.5)
    model, splits = answering(labels, labels, Objective(metric))
    measure_baseline(model, splits)  # the layout has been tried
    model.register_forward_hook(lambda *_: passes.append(1))
    assert measure_baseline(model, splits).accuracy == 1
    n_alone = len(passes)
    plain, drawn = answering(labels, labels)
    measure_baseline(plain, drawn)
    passes.clear()
    plain.register_forward_hook(lambda *_: passes.append(1))
    measure_baseline(plain, drawn)
    assert n_alone == len(passes)
    with pytest.raises(UserError, match="against other images' targets, which is guessing"):
        measure_baseline(*answering([0, 1] * 30, labels, Objective(metric)))
