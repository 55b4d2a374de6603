"""The teacher's answers: remembered for batches and for images, and only where that changes nothing."""

import pytest
import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.experiments.training import teaching
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from keepdrop.experiments.training.teaching import TRIALS, Remembering, RowMemory
from torch import nn

SETTINGS = TrainSettings(epochs=4, batch_size=32, lr=0.02, distill_weight=0.5)
N_FULL = 8  # steps of an epoch, and a ragged one


@pytest.fixture(scope="module")
def data():
    return digits().train.select(torch.arange(260))


class Counted(nn.Module):
    """Counts the batches that it answers; with `company`, an answer depends on the whole batch."""

    def __init__(self, company=False):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.body = small_cnn()
        self.calls, self.company = [], company

    def forward(self, images):
        self.calls.append(len(images))
        answer = self.body(images)
        return answer + 0.1 * answer.mean(0) if self.company else answer


def trained(data, teacher, augment=None, settings=SETTINGS):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = small_cnn()
    result = fit_network(model, data, settings, seed=3, augment=augment, teacher=teacher)
    return hash_state(model), result


def test_the_teacher_answers_the_same_images_once():
    calls = []

    class Flat(nn.Flatten):
        def forward(self, images):
            calls.append(len(images))
            return super().forward(images)

    teacher = Remembering(Flat())
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.equal(teacher(images), images.flatten(1))
    teacher(images.to(memory_format=torch.channels_last))
    teacher(images + 1)
    assert len(calls) == 3
    teacher.room = 0
    for _ in range(2):
        teacher(images + 2)
    assert len(calls) == 5


def test_images_that_do_not_change_are_answered_once(data, monkeypatch):
    """In the first epoch, in a few batches that prove it, and where the ragged end of the first epoch comes back."""
    teacher = Counted()
    found = trained(data, teacher)
    calls = len(teacher.calls)
    assert (N_FULL + TRIALS + 3) <= calls < 4 * N_FULL
    monkeypatch.setattr(teaching, "REMEMBERED", 0)
    teacher = Counted()
    assert trained(data, teacher) == found and len(teacher.calls) == 4 * (N_FULL + 1)


def test_an_answer_that_depends_on_its_company_is_never_looked_up(data):
    first = Counted(company=True)
    trained(data, first)
    assert len(first.calls) == 4 * (N_FULL + 1)


def test_augmented_images_are_answered_every_time(data):
    teacher = Counted()
    trained(data, teacher, RandomCropFlip(1))
    assert len(teacher.calls) == 4 * (N_FULL + 1)


def test_a_second_training_on_the_same_batches_asks_nothing(data):
    """As candidates of a halving do; another seed, rate of mirroring or precision brings other batches."""
    counted = Counted()
    teacher = Remembering(counted)
    one = TrainSettings(epochs=1, batch_size=32, lr=0.02, distill_weight=0.5)
    plain = trained(data, Counted(), RandomCropFlip(1), one)
    for _ in range(2):
        assert trained(data, teacher, RandomCropFlip(1), one) == plain
        assert len(counted.calls) == N_FULL + 1
    trained(data, teacher, RandomCropFlip(2), one)
    assert len(counted.calls) == 2 * (N_FULL + 1)


def test_rows_of_other_images_are_not_mixed_up():
    memory, asked = RowMemory(6), []

    def answer(images):
        asked.append(len(images))
        return 10 * images

    for _ in range(TRIALS + 2):
        for order in ([0, 1, 2], [5, 4, 3], [2, 4, 0]):
            indices = torch.tensor(order)
            assert torch.equal(memory.answer(indices, indices[:, None].float(), answer), 10.0 * indices[:, None])
    assert len(asked) == 2 + TRIALS
    assert torch.equal(memory.answer(torch.tensor([1, 2]), torch.ones(2, 1), answer), torch.full((2, 1), 10.0))
