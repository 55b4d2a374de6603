"""Training on two CPU processes against one: losses within a tolerance, snapshots, resuming, mistakes."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.data.splits import split
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.errors import UserError
from keepdrop.experiments.training import devices
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.devices import check_devices, is_helper, part, synchronised
from keepdrop.experiments.training.loop import DivergedError, TrainSettings, fit_network
from torch import nn

ONE = TrainSettings(epochs=2, batch_size=64, lr=0.02)
TWO = replace(ONE, devices=2, sync_batch_norm=True)
TOLERANCE = 0.01  # of a loss: rounding, which two epochs of training enlarge
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fit():
    """640 images and a ragged end of 3, which two processes cannot halve."""
    images = split(digits(), reward_from="test", reward_size=100, seed=0).fit
    return images.select(torch.arange(643))


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    part()


@pytest.fixture
def fabric():
    pytest.importorskip("lightning_fabric", reason="lightning_fabric is not installed (extra 'lightning')")


def model():
    torch.manual_seed(0)
    return small_cnn()


def losses(result):
    return [(each.loss, each.accuracy) for each in result.history]


def test_two_processes_learn_what_one_does(fabric, fit, tmp_path):
    one, two, resumed = model(), model(), model()
    augment = RandomCropFlip(1, flip=False)
    alone = fit_network(one, fit, ONE, seed=0, augment=augment)
    torch.random.manual_seed(7)
    before = torch.random.get_rng_state()
    snapshot = tmp_path / "snapshot.pt"
    shared = fit_network(two, fit, TWO, seed=0, augment=augment, snapshot=snapshot)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(two.bn1) is nn.BatchNorm2d and not torch.distributed.get_rank()
    assert shared.n_steps == alone.n_steps == 22
    assert shared.history[0].loss == pytest.approx(alone.history[0].loss, abs=1e-3)
    torch.testing.assert_close(losses(shared), losses(alone), atol=TOLERANCE, rtol=0)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=0.05, rtol=0)
    # Stopped after an epoch of two processes, resumed by one.
    stopped = tmp_path / "stopped.pt"
    with pytest.raises(KeyboardInterrupt):
        fit_network(resumed, fit, TWO, seed=0, augment=augment, snapshot=stopped, progress=interrupt)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["snapshot.pt", "stopped.pt"]
    rest = fit_network(resumed, fit, ONE, seed=0, augment=augment, snapshot=stopped)
    torch.testing.assert_close(losses(rest), losses(alone)[1:], atol=TOLERANCE, rtol=0)


def interrupt(record):
    raise KeyboardInterrupt


class Branched(nn.Module):
    """Of two layers one is never used."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, images):
        return self.used(images.flatten(1))


def test_unused_parameters_divergence_and_a_killed_process(fabric, fit):
    network = Branched()
    alone = fit_network(copy.deepcopy(network), fit, replace(ONE, epochs=1), seed=0)
    shared = fit_network(network, fit, replace(TWO, epochs=1), seed=0)
    torch.testing.assert_close(losses(shared), losses(alone), atol=1e-4, rtol=0)
    with pytest.raises(DivergedError, match="diverged in epoch 1"):
        fit_network(model(), fit, replace(TWO, lr=1e6), seed=0)
    again = fit_network(Branched(), fit, replace(TWO, epochs=1), seed=0)  # the helpers are still there
    assert again.n_steps == 11
    (helper,) = devices._team.helpers

    def kill(record):
        os.kill(helper.pid, signal.SIGKILL)
        helper.wait()

    with pytest.raises(UserError, match=r"A process of the training on 2 devices ended \(exit codes \[-9\]\)"):
        fit_network(model(), fit, TWO, seed=0, progress=kill)
    assert devices._team is None


def test_synchronised_statistics_alone_are_the_layers_own(monkeypatch):
    """Of one process: what the layer itself does, forward and backward, running statistics included."""
    torch.manual_seed(0)
    ours, theirs, images = nn.BatchNorm2d(3), nn.BatchNorm2d(3), torch.randn(8, 3, 5, 5)
    monkeypatch.setattr(devices, "_summed", lambda value: value.clone())
    monkeypatch.setattr(devices, "_active", type("Alone", (), {"size": 1}))
    left, right = images.clone().requires_grad_(), images.clone().requires_grad_()
    with synchronised(ours, True):
        (ours(left) ** 3).sum().backward()
    (theirs(right) ** 3).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert type(ours) is nn.BatchNorm2d


def test_one_device_needs_no_lightning(fit):
    code = (
        "import sys; from keepdrop.experiments.training import loop, devices; import keepdrop;"
        "print([name for name in sys.modules if 'lightning' in name])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match="batch_size is 64, which 3 devices cannot share; expected a multiple of 3"):
        replace(ONE, devices=3)
    with pytest.raises(UserError, match="devices"):
        replace(ONE, devices=0)
    check_devices([ONE, replace(TWO, epochs=0)], CPU)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Lightning Fabric, .* pip install 'keepdrop\[lightning\]'"):
        check_devices([TWO], CPU)
    monkeypatch.setattr(devices, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="devices is 2, and this machine has 1; expected 1 or fewer"):
        check_devices([TWO], torch.device("cuda"))
    with pytest.raises(UserError, match="expected cpu or cuda"):
        check_devices([TWO], torch.device("mps"))


@pytest.mark.parametrize(
    "given",
    [
        {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_processes_of_torchrun_and_slurm(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert is_helper(4) and not is_helper(1)
    monkeypatch.setattr(devices, "find_spec", lambda name: "there")
    with pytest.raises(UserError, match="devices is 2, and torchrun or Slurm started 4 processes"):
        check_devices([TWO], CPU)
    monkeypatch.setenv(list(given)[1], "0")
    assert not is_helper(4)


def test_a_command_under_torchrun(fabric, tmp_path):
    """The first process prunes and writes; the second one trains with it and says nothing."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = ["train-cnn", "base.epochs=1", "base.devices=2", "run_dir=run"]
    done = subprocess.run(
        [torchrun, "--nproc-per-node=2", "--no-python", Path(sys.executable).with_name("keepdrop"), *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder: run") == 1 and (tmp_path / "run/model.safetensors").is_file()
