"""Detection: boxes as targets, and mean average precision as a metric of a whole set."""

import importlib.util

import numpy as np
import pytest
import torch
from keepdrop import AgentSettings, MeanAveragePrecision, Settings, boxes_of, from_datasets, prune
from keepdrop.envs.data.boxes import as_boxes, padded
from keepdrop.envs.data.objective import Objective, with_objective
from keepdrop.envs.data.splits import split
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator, MaskMemory, accuracy_on, correct_flags
from keepdrop.envs.task import PruningTask
from keepdrop.errors import UserError
from keepdrop.experiments.oracle.single_removals import filter_oracle
from keepdrop.experiments.training.augment import RandomCropFlip, check_augment
from torch import nn
from torch.utils.data import DataLoader

BOX, ELSEWHERE = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]


def targets_of(*images):
    """Padded targets of lists of (box, label)."""
    rows = [torch.tensor([[*box, label] for box, label in boxes]).reshape(-1, 5) for boxes in images]
    return torch.stack([padded(each, 3) for each in rows])


def found(*detections):
    boxes, scores, labels = zip(*detections, strict=True) if detections else ((), (), ())
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def score(metric, detections, targets):
    return metric.of_set(metric(detections, targets))


def test_average_precision_by_hand():
    """Right, wrong, right of two boxes: precision 1 up to half of the recalls, 2/3 beyond."""
    truth = targets_of([(BOX, 0)], [(BOX, 0)])
    detections = [found((BOX, 0.9, 0)), found((ELSEWHERE, 0.8, 0), (BOX, 0.7, 0))]
    expected = (51 + 50 * 2 / 3) / 101
    assert score(MeanAveragePrecision(iou=0.5), detections, truth) == pytest.approx(expected)
    assert score(MeanAveragePrecision(iou=0.5, max_detections=1), detections, truth) == pytest.approx(51 / 101)
    assert score(MeanAveragePrecision(), detections, truth) == pytest.approx(expected)
    shifted = [found(([0.0, 0.0, 10.0, 7.0], 0.9, 0))]  # 0.7 of the box: five of ten thresholds, 0.5 to 0.7
    assert score(MeanAveragePrecision(), shifted, truth[:1]) == pytest.approx(0.5)
    assert score(MeanAveragePrecision(iou=0.75), shifted, truth[:1]) == 0


def test_doubles_other_classes_and_images_without_boxes():
    metric = MeanAveragePrecision(iou=0.5)
    twice = [found((BOX, 0.9, 0), (BOX, 0.8, 0)), found((BOX, 0.7, 0))]
    truth = targets_of([(BOX, 0)], [(BOX, 0)])
    assert score(metric, twice, truth) == pytest.approx((51 + 50 * 2 / 3) / 101)  # the double is wrong
    assert score(metric, [found((BOX, 0.9, 1))], truth[:1]) == 0
    two = targets_of([(BOX, 0), (ELSEWHERE, 4)])
    assert score(metric, [found((BOX, 0.9, 0))], two) == 0.5  # a class that is never found counts
    nothing = targets_of([], [])
    assert score(metric, [found(), found()], nothing) == 1
    assert score(metric, [found(), found((BOX, 0.5, 0))], nothing) == 0
    assert score(metric, [found(), found()], truth) == 0
    assert score(metric, [found(), found((BOX, 0.9, 0))], targets_of([], [(BOX, 0)])) == 1


def a_set(n_images, seed):
    """Random detections, right ones among them, with equal scores here and there; and boxes, none in some images."""
    random = np.random.default_rng(seed)
    detections, truth = [], []
    for _ in range(n_images):
        count, more = random.integers(5), random.integers(1, 12)
        corners = random.random((count, 2)) * 40
        boxes = np.concatenate([corners, corners + 8 + random.random((count, 2)) * 10], 1)
        labels = random.integers(3, size=count)
        wrong = np.concatenate([each := random.random((more, 2)) * 40, each + 10], 1)
        detections.append(
            {
                "boxes": torch.tensor(np.concatenate([boxes + random.normal(size=boxes.shape), wrong])),
                "scores": torch.tensor((1 + random.integers(50, size=count + more)) / 51, dtype=torch.float32),
                "labels": torch.tensor(np.concatenate([labels, random.integers(3, size=more)])),
            }
        )
        truth.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return detections, truth


@pytest.fixture
def torchmetrics(torchvision):
    """torchmetrics imports torchvision where it is installed, and asks for it."""
    if importlib.util.find_spec("torchmetrics") is None or importlib.util.find_spec("faster_coco_eval") is None:
        pytest.skip("torchmetrics or faster-coco-eval is not installed (extra 'detection')")
    return pytest.importorskip("torchmetrics.detection")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("iou", [None, 0.5, 0.75])
def test_it_is_the_figure_of_torchmetrics(torchmetrics, iou):
    for seed in range(3):
        detections, truth = a_set(60, seed)
        theirs = torchmetrics.MeanAveragePrecision(
            backend="faster_coco_eval", iou_thresholds=None if iou is None else [iou]
        )
        theirs.update(detections, truth)
        ours = score(MeanAveragePrecision(iou=iou), detections, torch.stack([padded(as_boxes(t), 5) for t in truth]))
        # Their thresholds and recalls are rounded to float32.
        assert ours == pytest.approx(float(theirs.compute()["map"]), abs=2e-4) and 0.05 < ours < 0.9


def test_batches_and_tensors_of_detections_change_nothing():
    detections, truth = a_set(40, 5)
    targets, metric = torch.stack([padded(as_boxes(each), 5) for each in truth]), MeanAveragePrecision()
    whole = metric(detections, targets)
    parts = [metric(detections[row : row + 7], targets[row : row + 7]) for row in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (40, 1 + 300 + 5) and bool((whole[:, 0] == 0).all())
    rows = [torch.cat([each["boxes"], each["scores"][:, None], each["labels"][:, None]], 1) for each in detections]
    tensor = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1.0)
    assert torch.equal(metric(tensor, targets), whole)
    assert metric.of_set(whole) != pytest.approx(np.mean([metric.of_set(each) for each in parts]), abs=1e-4)


@pytest.mark.parametrize(
    ("decoded", "text"),
    [
        (torch.zeros(2, 5), "detections (2, 5) for 2 images; expected `decode`"),
        ([{"boxes": torch.zeros(1, 4)}] * 2, "decode gave boxes for an image; expected a mapping of boxes, scores"),
        ([{"boxes": torch.zeros(1, 4), "scores": torch.ones(2), "labels": torch.ones(1)}] * 2, "(1, 4), (2,), (1,)"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3)), "decode gave Tensor for an image"),
    ],
)
def test_detections_of_another_form_are_refused(decoded, text):
    with pytest.raises(UserError) as refused:
        MeanAveragePrecision()(decoded, targets_of([], []))
    assert text in str(refused.value)


@pytest.mark.parametrize("arguments", [{"decode": "mine"}, {"iou": 0.0}, {"iou": float("nan")}, {"max_detections": 0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(UserError, match="MeanAveragePrecision was given"):
        MeanAveragePrecision(**arguments)


class Boxes:
    """Images (1, 8, 8) of bright quarters, and their boxes as mappings: 0 to 4 of them."""

    corners = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]])

    def __init__(self, count, seed, *, keys=("boxes", "labels"), nested=True):
        generator = torch.Generator().manual_seed(seed)
        self.keys, self.nested = keys, nested
        self.bright = torch.rand(count, 4, generator=generator) > 0.5
        self.bright[0], self.bright[-1] = False, True
        grid = self.bright.view(count, 1, 2, 2).float()
        noise = torch.randn(count, 1, 8, 8, generator=generator)
        self.images = nn.functional.interpolate(grid, scale_factor=4) + 1.5 * noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        boxes = self.corners[self.bright[index]]
        target = dict(zip(self.keys, (boxes, torch.zeros(len(boxes), dtype=torch.int64)), strict=True))
        return (self.images[index], target) if self.nested else {"image": self.images[index], **target}


class Quarters(nn.Module):
    """Images (B, 1, 8, 8) -> a logit for each quarter, (B, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        self.conv.weight.data = 0.15 + 0.1 * torch.randn(6, 1, 3, 3)
        self.out.weight.data = torch.rand(1, 6, 1, 1)

    def forward(self, images):
        return nn.functional.avg_pool2d(self.out(self.conv(images).relu()), 4).flatten(1) - 1


def quarters(outputs):
    """Detections (B, 4, 6)."""
    scores = outputs.sigmoid()[..., None]
    boxes = Boxes.corners.to(outputs.dtype).expand(len(outputs), 4, 4)
    return torch.cat([boxes, scores, torch.zeros_like(scores)], 2)


def loss(outputs, targets):
    """Cross-entropy of the quarters."""
    here = [(Boxes.corners[:, None] == each["boxes"]).all(2).any(1) for each in boxes_of(targets)]
    return nn.functional.binary_cross_entropy_with_logits(outputs, torch.stack(here).to(outputs.dtype))


OBJECTIVE = Objective(MeanAveragePrecision(quarters), loss)


@pytest.mark.parametrize(
    "made",
    [
        lambda data: data,
        lambda data: DataLoader(data, batch_size=4, collate_fn=lambda items: tuple(zip(*items, strict=True))),
        lambda data: Boxes(len(data), 0, keys=("bboxes", "class_labels"), nested=False),
    ],
)
def test_boxes_of_any_number_become_targets_of_one_shape(made):
    data = Boxes(30, 0)
    read = from_datasets(made(data), Boxes(5, 1))
    assert read.train.n_classes == 0 and read.train.target_shape == read.test.target_shape == (4, 5)
    images, targets = read.train.select(torch.arange(10, 30)).batch(torch.arange(20))
    assert torch.equal(images, data.images[10:]) and targets.dtype == torch.float32
    for index, each in enumerate(boxes_of(targets)):
        assert torch.equal(each["boxes"], data[10 + index][1]["boxes"])
        assert torch.equal(each["labels"], data[10 + index][1]["labels"])
    assert read.train.digest() == from_datasets(data, data).train.digest()


def test_both_parts_have_room_for_the_most_boxes():
    few = [(torch.rand(1, 8, 8), {"boxes": torch.zeros(0), "labels": torch.zeros(0)})] * 2
    read = from_datasets(Boxes(3, 0), few)
    assert read.test.target_shape == (4, 5) and bool((read.test.batch(torch.arange(2))[1][..., 4] == -1).all())


def test_a_training_set_that_augments_may_bring_more_boxes():
    class Changing(Boxes):
        def __getitem__(self, index):
            image, target = super().__getitem__(int(torch.randint(len(self), ())))
            return image + torch.rand(()), target

    torch.manual_seed(0)
    assert from_datasets(Changing(40, 0), Boxes(5, 1)).train.target_shape == (8, 5)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({"boxes": torch.tensor([[5.0, 5, 2, 2]]), "labels": [0]}, r"the box \[5.0, 5.0, 2.0, 2.0\]; expected corners"),
        ({"boxes": torch.rand(2, 3), "labels": [0, 0]}, r"boxes \(2, 3\) and labels \(2,\)"),
        ({"boxes": [BOX], "labels": [0, 1]}, r"boxes \(1, 4\) and labels \(2,\)"),
        ({"boxes": [BOX], "labels": [-1]}, "labels from -1; expected whole numbers from 0"),
        ({"boxes": [BOX]}, "has the entries boxes; expected boxes and labels"),
        ({"boxes": [BOX], "labels": ["cat"]}, "holds list; expected tensors or arrays"),
    ],
)
def test_boxes_of_another_form_are_refused(target, text):
    with pytest.raises(UserError, match=text):
        from_datasets([(torch.rand(1, 8, 8), target)] * 3, Boxes(3, 0))


def test_crowds_are_left_out_and_further_entries_do_not_matter():
    target = {"boxes": [BOX, ELSEWHERE], "labels": [3, 4], "iscrowd": [0, 1], "image_id": 7, "area": [100, 100]}
    assert as_boxes(target).tolist() == [[*BOX, 3.0]]


def test_boxes_may_be_views_and_read_only():
    boxes = np.array([BOX, ELSEWHERE], dtype=np.float32)[::-1]
    boxes.flags.writeable = False
    assert as_boxes({"boxes": boxes, "labels": np.array([4, 3])[::-1]}).tolist() == [[*ELSEWHERE, 3.0], [*BOX, 4.0]]


def test_no_boxes_and_no_loss_are_refused_in_a_sentence():
    objective = Objective(MeanAveragePrecision(quarters))
    with pytest.raises(UserError, match="Detection has no loss that fits every network"):
        objective.try_out(torch.rand(2, 4), targets_of([], []))
    with pytest.raises(UserError, match=r"Targets are torch.int64 \(2,\); expected boxes: items \(image, \{'boxes'"):
        OBJECTIVE.try_out(torch.rand(2, 4), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="MeanAveragePrecision for boxes"):
        with_objective(from_datasets(Boxes(3, 0), Boxes(3, 1)).train, Objective())
    data = with_objective(from_datasets(Boxes(3, 0), Boxes(3, 1)).train, OBJECTIVE)
    with pytest.raises(UserError, match="moves the images and not the boxes that are their targets"):
        check_augment(RandomCropFlip(1), data)


def task(n_reward=61, model=None):
    data = from_datasets(Boxes(90, 0), Boxes(120, 1))
    splits = split(data, reward_from="test", reward_size=n_reward, seed=0, objective=OBJECTIVE)
    return PruningTask((model or Quarters()).eval(), splits)


def test_a_set_is_scored_as_a_whole_under_masks_subsets_and_removals():
    whole = task()
    model, layer, generator = whole.model, whole.layer("conv"), torch.Generator().manual_seed(0)
    images, targets = whole.reward_images
    with torch.no_grad():
        answers = OBJECTIVE.metric(model(images), targets)
    assert whole.accuracy == OBJECTIVE.metric.of_set(answers) == accuracy_on(model, whole.splits.reward)
    assert alike(correct_flags(model, images, targets, 7, OBJECTIVE), answers) and 0.3 < whole.accuracy < 0.99
    masks = torch.rand(6, 6, generator=generator) > 0.4
    masks[0] = True
    outcomes = layer.outcomes(masks)
    for outcome, keep in zip(outcomes, masks, strict=True):
        assert outcome.pruned_accuracy == pytest.approx(accuracy_on(layer.cut(keep), whole.splits.reward), abs=1e-3)
    assert len({each.pruned_accuracy for each in outcomes}) > 3
    rows = torch.arange(0, 61, 3)
    part = OBJECTIVE.metric.of_set(answers[rows])
    assert [each.base_accuracy for each in layer.outcomes(masks, image_indices=rows)] == [
        part
    ] * 6 and part != whole.accuracy
    changes = filter_oracle(model, layer.group, images, targets, objective=OBJECTIVE, batch=20).accuracy_change
    alone = [accuracy_on(layer.cut(keep), whole.splits.reward) - whole.accuracy for keep in ~torch.eye(6).bool()]
    assert changes.tolist() == pytest.approx(alone, abs=1e-3)
    assert layer.disagreement_with_float32(masks)["accuracy"] < 1e-3


def alike(ours, theirs):
    """Whether answers agree up to rounding of the scores, whose last bits depend on how a convolution is computed."""
    return int((ours - theirs).abs().max()) < 64


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_rows_of_answers_do_not_depend_on_batch_cache_or_memory(stack, cache_gib):
    given = task()
    group, masks = given.layer("conv").group, torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    named, settings = {group.name: masks}, {"objective": OBJECTIVE}
    one_by_one = MaskEvaluator(given.model, [group], *given.reward_images, stack=False, **settings)
    plain = one_by_one.correct_per_image(named)
    settings |= {"stack": stack, "cache_gib": cache_gib, "batch": 10, "memory": 2}
    other = MaskEvaluator(given.model, [group], *given.reward_images, **settings)
    assert other.network.stacks == stack and (other.cached_bytes > 0) == (cache_gib > 0)
    assert plain.shape == (5, 61, 305) and not alike(plain[0], plain[1])
    rows = torch.tensor([3, 1, 60])
    assert alike(other.correct_per_image(named, image_indices=rows), plain[:, rows])
    assert alike(other.correct_per_image(named), plain)


def test_memory_of_rows_is_bounded():
    assert MaskMemory(2000, 1024, torch.int32, (400,)).size == 83
    assert MaskMemory(2000, 1024, torch.int32).size == 1024


def test_a_detector_that_guesses_is_refused():
    class Constant(Quarters):
        def forward(self, images):
            return super().forward(images) * 0 + torch.tensor([0.1, 0.2, 0.3, 0.4])

    with pytest.raises(UserError, match="against other images' targets, which is guessing"):
        task(model=Constant())


def test_the_name_says_which_function_reads_the_outputs():
    """It stands in files and digests, so it must be the same in another process."""
    assert OBJECTIVE.name == "MeanAveragePrecision(decode=quarters)"
    assert Objective(MeanAveragePrecision(quarters, iou=0.5)).name == "MeanAveragePrecision(decode=quarters, iou=0.5)"


def test_a_tuple_of_outputs_is_put_side_by_side_for_loss_and_decode():
    class Halves(Quarters):
        def forward(self, images):
            return super().forward(images).split(2, 1)

    settings = Settings(
        output=[0, 1], metric=OBJECTIVE.metric, loss=loss, agent=AgentSettings(updates=1), masks=4, images=20
    )
    train, test = Boxes(40, 0), Boxes(80, 1)
    result = prune(Halves().eval(), train, test, drop_bound=0.3, finetune=None, settings=settings)
    images, targets = from_datasets(train, test).test.batch(torch.arange(80))
    with torch.no_grad():
        halves = result.model(images)
    assert [each.shape for each in halves] == [(80, 2), (80, 2)] and result.macs < result.base_macs
    answers = OBJECTIVE.metric(torch.cat(halves, 1), targets)
    assert OBJECTIVE.metric.of_set(answers) == pytest.approx(result.accuracy, abs=0.1)


def test_answers_of_a_set_metric_of_ones_own_are_checked():
    class Most:
        is_of_set = True

        def __init__(self, answer):
            self.answer = answer

        def __call__(self, outputs, targets):
            return self.answer(outputs)

        def of_set(self, answers):
            return float(answers.float().mean())

    labels = torch.tensor([0, 1])
    Objective(Most(lambda outputs: outputs.argmax(1))).try_out(torch.rand(2, 3), labels)
    for odd in (lambda each: each[:, 0], lambda each: each.argmax(), lambda each: -1 - each.argmax(1)):
        with pytest.raises(UserError, match=r"of a set answers .* for 2 images; expected integers \(2,\), the first"):
            Objective(Most(odd)).try_out(torch.rand(2, 3), labels)
