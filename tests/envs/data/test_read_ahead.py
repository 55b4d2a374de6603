"""Workers that read a user's data set: the same batches, seeded randomness, one sentence for what goes wrong."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from keepdrop.envs.data import read_ahead as read_ahead_module
from keepdrop.envs.data.datasets import DatasetImages, from_datasets
from keepdrop.envs.data.images import batches_of
from keepdrop.envs.data.objective import Objective, with_objective
from keepdrop.envs.data.read_ahead import Buffers, Workers, read_ahead
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from torch.utils.data import DataLoader, Dataset, TensorDataset

PARTS = torch.randperm(30, generator=torch.Generator().manual_seed(0)).split(8)


class Items(Dataset):
    """Thirty images, plain or with something that happens while one is read."""

    def __init__(self, happens=lambda index, image: image):
        self.images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.happens = happens

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return self.happens(index, self.images[index]), index % 3


def drawn(index, image):
    return image + torch.rand(()) + random.random() + np.random.rand()


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch):
    for module in ("read_ahead", "datasets"):
        monkeypatch.setattr(f"keepdrop.envs.data.{module}.job_size", lambda item_bytes: 3)


def read(images, seed=0):
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    images, labels = zip(*batches_of(images, PARTS), strict=True)
    return torch.cat(images), torch.cat(labels), torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_those_of_one_process_bit_for_bit(workers):
    plain = from_datasets(Items(), Items()).train
    ours = from_datasets(Items(), Items(), workers=workers).train
    assert all(map(torch.equal, read(ours)[:2], read(plain)[:2]))
    assert torch.equal(ours.batch(PARTS[0])[0], plain.batch(PARTS[0])[0])
    assert ours.digest() == plain.digest() and ours.n_classes == 3
    some = torch.arange(5, 25)
    wrapped = with_objective(ours.select(some), Objective(loss=torch.nn.CrossEntropyLoss()))
    found = torch.cat([each for each, _ in batches_of(wrapped, torch.arange(20).split(7))])
    assert torch.equal(
        found, plain.images if hasattr(plain, "images") else plain.select(some).batch(torch.arange(20))[0]
    )


def test_what_is_drawn_at_random_depends_on_the_seed_and_not_on_the_workers():
    found = [from_datasets(Items(drawn), Items(), 3, workers=count).train for count in (1, 3)]
    one, many, later = read(found[0]), read(found[1]), read(found[1], seed=1)
    assert torch.equal(one[0], many[0]) and not torch.equal(many[0], later[0])
    noise = one[0] - Items().images[torch.cat(PARTS)]
    assert noise[:, 0, 0, 0].unique().numel() == 30  # every item has its own
    assert one[2] and many[2]  # and a training's own stream (dropout) is left alone


def test_training_with_workers_ends_in_the_same_weights():
    settings, hashes = TrainSettings(epochs=2, batch_size=8, lr=0.05), set()
    for workers in (0, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(small_cnn(n_classes=3, widths=(2, 2, 2, 2, 2)), torch.nn.Dropout(0.5))
        data = from_datasets(Items(), Items(), 3, workers=workers).train
        fit_network(model, data, settings, seed=0)
        hashes.add(hash_state(model))
    assert len(hashes) == 1


def test_a_generator_of_ones_own_keeps_a_data_set_in_this_process():
    generator = np.random.default_rng(0)
    with pytest.warns(Notice, match="random numbers from a generator of its own"):
        data = from_datasets(Items(lambda index, image: image + generator.random()), Items(), 3, workers=2)
    assert not data.train._workers.usable and data.test._workers.usable
    loader = DataLoader(Items(lambda index, image: image + generator.random()), num_workers=2, worker_init_fn=print)
    assert from_datasets(loader, Items(), 3).train._workers.usable


def opened(number):
    torch.utils.data.get_worker_info().dataset.images += 1


def test_a_data_loader_brings_its_workers():
    loader = DataLoader(Items(), num_workers=2, worker_init_fn=opened, multiprocessing_context="fork", timeout=60)
    data = from_datasets(loader, Items(), 3)
    assert data.train._workers == Workers(2, "fork", opened, loader.dataset, 60) and not data.test._workers.usable
    assert torch.equal(read(data.train)[0], Items().images[torch.cat(PARTS)] + 1)
    assert not from_datasets(loader, Items(), 3, workers=0).train._workers.usable
    with pytest.raises(UserError, match="workers is 1,000; expected a number from 0 to 256"):
        from_datasets(loader, Items(), 3, workers=1000)


def fails(index, image):
    if index == 20:
        raise OSError("the file is damaged")
    return image


def dies(index, image):
    if index == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return image


@pytest.mark.parametrize(
    ("happens", "text"),
    [
        (fails, "Item 20 of a dataset cannot be read (OSError: the file is damaged); repair it, or leave it out."),
        (dies, "One of 2 processes that read images ended (DataLoader worker (pid"),
        (lambda index, image: image * (float("nan") if index == 20 else 1), "gave images with NaN or infinite values"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_the_sentence_of_one_process(happens, text):
    data = DatasetImages(Items(happens), 3, workers=Workers(2))
    with pytest.raises(UserError, match=re.escape(text)):
        read(data)
    assert torch.equal(data.batch(torch.arange(3))[0], Items().images[:3])


def test_workers_end_with_the_iterator_and_inside_other_workers_there_are_none():
    data = DatasetImages(Items(), 3, workers=Workers(2))
    with closing(data.batches(PARTS)) as batches:
        next(batches)
        assert len(children()) == 2
    assert children() == []
    nested = DatasetImages(Items(lambda index, image: data.batch(torch.arange(9))[0][0]), 3)
    first = next(read_ahead(nested._read, PARTS, Workers(1), torch.empty(1, 8, 8), 8))[0]
    assert torch.equal(first[0], Items().images[0])


def children():
    return [each for each in torch.multiprocessing.active_children() if each.is_alive()]


def test_memory_of_a_batch_is_used_again_when_nobody_holds_it():
    buffers = Buffers(pinned=False)
    first = buffers.empty((2, 3))
    place, part = first.data_ptr(), first.fill_(1).view(6)[2:]
    del first
    other = buffers.empty((2, 3)).fill_(0)
    assert other.data_ptr() != place and part.tolist() == [1.0] * 4
    del part
    assert buffers.empty((2, 3)).data_ptr() == place and buffers.empty((4,)).shape == (4,)


ITEMS = """
import os, signal, torch
from keepdrop.envs.data.datasets import DatasetImages
from keepdrop.envs.data.read_ahead import Workers

class Items:
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        return torch.zeros(1, 64, 64), index % 3

"""
KILLED = f"""{ITEMS}
batches = DatasetImages(Items(), 3, workers=Workers(2)).batches(torch.arange(4000).split(400))
next(batches)
print(*[each.pid for each in torch.multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told by Linux")
def test_workers_do_not_outlive_a_killed_run():
    """They would hold the lock of its folder, which is the next run's."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and len(done.stdout.split()) == 2, done
    deadline = time.monotonic() + 3
    while any(running(int(pid)) for pid in done.stdout.split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Interrupted:
    """A loader at whose start somebody presses Ctrl-C, or a batch system ends the run."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        signal.raise_signal(self.number)
        return self

    def __next__(self):
        raise StopIteration

    def _shutdown_workers(self):
        self.ended = True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_a_run_while_workers_start_is_not_lost(number, monkeypatch):
    """Python drops what is raised inside a fork; the interrupt is to come right after it."""
    loader = Interrupted(number)
    monkeypatch.setattr(read_ahead_module, "_loader", lambda *arguments: loader)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        for each in before:  # a shell's background jobs ignore the one
            signal.signal(each, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), read_ahead_module._started(None, [], Workers(1), 1, torch.empty(1)):
            pass
        assert loader.ended and all(signal.getsignal(each) is signal.default_int_handler for each in before)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


TERMINATED = f"""{ITEMS}
def stop(number, frame):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, stop)
batches = DatasetImages(Items(), 3, workers=Workers(2)).batches(torch.arange(4000).split(400))
next(batches)
try:
    for each in torch.multiprocessing.active_children():
        os.kill(each.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    batches.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_to_all_processes_of_a_run_ends_it_without_an_error():
    """As batch systems and `timeout` send it; torch would raise that a worker was killed."""
    done = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")


class Locked(TensorDataset):
    """Not to be pickled."""

    def __init__(self):
        super().__init__(torch.zeros(80, 1, 2, 2), torch.arange(80) % 3)
        self.lock = threading.Lock()


def fails(number):
    raise ValueError("no such device")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"multiprocessing_context": "spawn"}, r"cannot be handed to .* \(TypeError: cannot pickle .*workers=0\.$"),
        (
            {"worker_init_fn": fails},
            r"worker_init_fn of a DataLoader fails \(ValueError: no such device\); fix or",
        ),
    ],
)
def test_workers_that_cannot_begin_are_a_sentence(options, text):
    loader = DataLoader(Locked(), num_workers=2, **options)
    with pytest.raises(UserError, match=text):
        list(from_datasets(loader, loader).train.batches(torch.arange(80).split(20)))


def test_a_worker_that_takes_too_long_is_not_said_to_lack_memory():
    error = read_ahead_module._ended(RuntimeError("DataLoader timed out after 1 seconds"), 2)
    assert "longer timeout" in str(error) and "memory" not in str(error)
