"""The objective: loss and distillation by what targets are, and what a metric of one's own gets to see."""

import pytest
import torch
from keepdrop.envs.data.metrics import BinaryAccuracy, Closeness, Dice, MeanIoU, PixelAccuracy, Top1, Within
from keepdrop.envs.data.objective import TOP1, Objective, with_objective
from keepdrop.envs.data.sources import ArrayImages
from keepdrop.errors import UserError
from torch.nn import functional

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def yes_or_no(*shape):
    return torch.randint(2, shape, generator=GENERATOR)


@pytest.mark.parametrize("metric", [Top1(), BinaryAccuracy(), Dice(), PixelAccuracy(), MeanIoU()])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((6, 1), (6,)), ((6,), (6,)), ((6, 1), (6, 1)), ((4, 1, 5, 5), (4, 5, 5)), ((4, 1, 5, 5), (4, 1, 5, 5))],
)
def test_one_logit_is_a_binary_question(metric, kind, outputs, targets):
    logits, truth = noise(*outputs), yes_or_no(*targets)
    objective, given = Objective(metric), truth.to(kind)
    wanted = functional.binary_cross_entropy_with_logits(logits.reshape(targets), truth.float())
    torch.testing.assert_close(objective.mean_loss(logits, given), wanted)
    torch.testing.assert_close(objective.summed_loss(logits, given), wanted * len(truth))
    soft, ours = torch.sigmoid(noise(*outputs) / 4), logits / 4
    apart = functional.binary_cross_entropy_with_logits(ours, soft) - functional.binary_cross_entropy(soft, soft)
    torch.testing.assert_close(
        objective.distilled(torch.tensor(9.0), logits, torch.logit(soft) * 4, given, 1.0, 4.0), 16 * apart
    )
    maps = len(outputs) > 2
    if not isinstance(metric, PixelAccuracy | MeanIoU if not maps else Top1):
        perfect = (truth.float() * 2 - 1).reshape(outputs)
        assert objective.fraction(objective.points(perfect, given)) == 1.0
        assert objective.fraction(objective.points(-perfect, given)) == 0.0


def test_scores_of_several_labels_and_of_masks():
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    truth = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert BinaryAccuracy()(logits, truth).tolist() == pytest.approx([1 / 3, 1, 1])
    assert Dice()(logits, truth).tolist() == [0.5, 1.0, 1.0]
    likely = torch.tensor([[0.9, 0.2, 0.6]])
    assert BinaryAccuracy(probabilities=True)(likely, truth[:1].float()).tolist() == pytest.approx([1 / 3])
    loss = Objective(Dice(probabilities=True)).mean_loss(likely, truth[:1])
    assert float(loss) == pytest.approx(float(functional.binary_cross_entropy(likely, truth[:1].float())), abs=1e-5)
    ignored = torch.tensor([[[255, 1], [0, 255]]])
    assert MeanIoU(255)(torch.tensor([[[[3.0, 3.0], [-3.0, -3.0]]]]), ignored).tolist() == [1.0]
    assert MeanIoU(255)(torch.tensor([[[[3.0, -3.0], [-3.0, -3.0]]]]), ignored).tolist() == [0.25]


def test_one_logit_for_many_classes_is_refused():
    with pytest.raises(UserError, match="one number per target, and targets hold 3; expected 0 and 1 for one logit"):
        TOP1.mean_loss(noise(4, 1), torch.tensor([0, 1, 3, 1]))


def test_masks_of_0_and_255_are_told_what_to_become():
    with pytest.raises(UserError, match=r"targets hold 255; .* \(of masks that hold 0 and 255: mask == 255\)"):
        Objective(Dice()).mean_loss(noise(2, 1, 4, 4), 255 * torch.ones(2, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (functional.one_hot(torch.tensor([0, 2, 1])), r"(these look one-hot: targets.argmax(1) are their labels)"),
        (torch.tensor([0.0, 2.0, 1.0]), "(these are whole numbers: targets.long() are labels)"),
        (torch.tensor([0.5, 2.0, 1.0]), "one integer label per image; choose another metric"),
    ],
)
def test_labels_in_another_form_are_named(targets, said):
    images = ArrayImages(noise(3, 1, 4, 4), targets, [0.0], [1.0], 0)
    with pytest.raises(UserError) as refused:
        with_objective(images, TOP1)
    assert said in str(refused.value)


def test_floating_targets_are_classes_where_all_are_0_and_1():
    def images(targets):
        return ArrayImages(noise(len(targets), 1, 4, 4), targets, [0.0], [1.0], 0)

    def own(outputs, targets):
        return ((outputs > 0) == (targets > 0.5)).double()

    binary = with_objective(images(yes_or_no(9).float()), Objective(own)).objective
    numbers = with_objective(images(noise(9)), Objective(own)).objective
    logits, truth = noise(9, 1), yes_or_no(9).float()
    wanted = functional.binary_cross_entropy_with_logits(logits[:, 0], truth)
    torch.testing.assert_close(binary.mean_loss(logits, truth), wanted)
    torch.testing.assert_close(numbers.mean_loss(logits, truth), functional.mse_loss(logits[:, 0], truth))
    assert binary.identity != numbers.identity == Objective(own).identity
    assert with_objective(images(yes_or_no(9).float()), TOP1).objective.metric == BinaryAccuracy()
    kept = with_objective(images(yes_or_no(9).float()), Objective(Within(0.5))).objective
    torch.testing.assert_close(kept.mean_loss(logits, truth), functional.mse_loss(logits[:, 0], truth))


def test_numbers_may_be_whole():
    ages, outputs = torch.tensor([20, 30, 41]), torch.tensor([[20.0], [30.0], [40.0]])
    objective = Objective(Closeness(1.0))
    assert objective.mean_loss(outputs, ages) == pytest.approx(1 / 3)
    assert objective.fraction(objective.points(outputs, ages)) == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_metric_of_ones_own_sees_the_shape_that_its_error_names():
    def own(outputs, targets):
        raise ValueError(f"seen {tuple(outputs.shape)}")

    with pytest.raises(UserError, match=r"fails on outputs torch.float32 \(3,\) and .* \(3,\) \(ValueError: seen \(3,"):
        Objective(own).try_out(noise(3, 1), noise(3))


def test_outputs_that_are_no_logits_of_the_targets_classes_are_distilled_by_their_difference():
    def ctc(outputs, targets):
        return outputs.square().mean()

    ours, theirs, words = noise(4, 7, 11), noise(4, 7, 11), yes_or_no(4, 5)
    objective = Objective(lambda outputs, _: torch.ones(len(outputs)), ctc)
    found = objective.distilled(torch.tensor(2.0), ours, theirs, words, 0.5, 4.0)
    torch.testing.assert_close(found, 1 + 0.5 * functional.mse_loss(ours, theirs))

    class WithDistance:
        def __call__(self, outputs, targets):
            return ctc(outputs, targets)

        def distance(self, outputs, dense):
            return torch.tensor(3.0)

    assert (
        Objective(objective.metric, WithDistance()).distilled(torch.tensor(2.0), ours, theirs, words, 0.5, 4.0) == 2.5
    )
