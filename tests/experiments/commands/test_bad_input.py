"""Every mistake a user can make: one sentence that names it, exit code 2, nothing written."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from keepdrop.envs.networks import built_in as networks
from safetensors.torch import load_file, save_file

NETWORKS = """
import torch
from torch import nn
from keepdrop.envs.networks.built_in import small_cnn

def one_filter():
    return small_cnn(widths=(1, 8))

class Crash(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, images):
        raise KeyError("my own bug")

def wrong_logits():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def no_network():
    return "a string"

def policy(n_filters):
    raise ValueError("never fits")

def one_dataset():
    return [(torch.zeros(1, 8, 8), 0)]
"""


@pytest.fixture
def mine(tmp_path):
    """A user's module in the working folder, under a name of its own: modules of one name would be kept by Python."""
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    # Importing it must not count as something that was written.
    (tmp_path / "__pycache__").write_text("")
    return name


@pytest.fixture
def arrays(tmp_path):
    """Writes an .npz like digits with some arrays changed; returns the overrides that use it."""

    def write(**changed):
        rng = np.random.default_rng(0)
        content = {
            "x_train": rng.integers(0, 255, (60, 8, 8, 1), dtype=np.uint8),
            "y_train": np.arange(60) % 10,
            "x_test": rng.integers(0, 255, (30, 8, 8, 1), dtype=np.uint8),
            "y_test": np.arange(30) % 10,
        }
        np.savez(tmp_path / "data.npz", **{k: v for k, v in (content | changed).items() if v is not None})
        return "data=npz", "data.path=data.npz", "split.reward_size=20"

    return write


def test_missing_checkpoint(refused):
    assert refused("prune", "checkpoint=no.pt") == "Checkpoint 'no.pt' does not exist; check the path."


def test_truncated_checkpoint(refused, checkpoint, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(checkpoint.read_bytes()[:3000])
    assert "half.safetensors' (3000 bytes) is truncated" in refused("prune", "checkpoint=half.safetensors")
    torch.save(networks.small_cnn().state_dict(), tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:3000])
    assert "half.pt' (3000 bytes) is truncated" in refused("prune", "checkpoint=half.pt")


def test_checkpoint_of_another_architecture(refused, checkpoint, tmp_path):
    save_file(networks.small_cnn(widths=(16, 8)).state_dict(), tmp_path / "other.safetensors")
    sentence = refused("prune", "checkpoint=other.safetensors")
    assert "is for another architecture; keys: 15 missing (conv3.weight, " in sentence
    assert "conv2.weight is (8, 16, 3, 3), the model has (16, 16, 3, 3)" in sentence


def test_checkpoint_that_wants_unpickling(refused, tmp_path):
    torch.save(networks.small_cnn(), tmp_path / "whole.pt")
    assert "holds pickled Python objects, which can run any code" in refused("prune", "checkpoint=whole.pt")


def test_base_accuracy_at_chance(refused, tmp_path):
    torch.manual_seed(0)
    save_file(networks.small_cnn().state_dict(), tmp_path / "untrained.safetensors")
    assert "which is chance level" in refused("prune", "checkpoint=untrained.safetensors")
    assert "which is chance level" in refused("train-agent", "layer=conv1", "checkpoint=untrained.safetensors")


@pytest.mark.parametrize(("given", "meant"), [("1", "0.01"), ("2", "0.02"), ("0.5", "0.005")])
def test_drop_bound_in_percent(refused, given, meant):
    sentence = refused("prune", f"drop_bound={given}")
    assert sentence.startswith(f"drop_bound is {given}, but it is a fraction") and sentence.endswith(f"give {meant}")


def test_drop_bound_out_of_range(refused):
    assert refused("prune", "drop_bound=-0.1").endswith("give a number in (0, 0.5)")
    assert refused("prune", "drop_bound=0").startswith("drop_bound is 0, but")


@pytest.mark.parametrize("command", [("prune", "layers=[conv22]"), ("train-agent", "layer=conv22")])
def test_unknown_layer(refused, checkpoint, command):
    expected = "No prunable layer is called 'conv22'; the nearest are 'conv2', "
    assert refused(*command, f"checkpoint={checkpoint}").startswith(expected)
    assert refused(*command).startswith(expected)  # before a base is trained for minutes


def test_pattern_for_one_agent(refused):
    assert refused("train-agent", "layer=conv*").endswith("expected one name: train several with -m layer=a,b,c.")


def test_layer_with_one_filter(refused, mine):
    own = ("network=custom", f"network._target_={mine}.one_filter")
    sentence = refused("prune", *own, "layers=[conv1]")
    assert sentence.startswith("Layer 'conv1' cannot be pruned: ") and "a single filter" in sentence


BAD_ARRAYS = [
    ({"x_train": np.zeros((60, 8, 8), np.uint8)}, "x_train"),
    ({"x_train": np.zeros((60, 8, 8, 1), np.int64)}, "int64"),
    ({"x_train": np.full((60, 1, 8, 8), np.nan, np.float32), "x_test": np.zeros((30, 1, 8, 8), np.float32)}, "NaN"),
    ({"y_train": np.arange(60) % 10 - 1}, "-1"),
    ({"y_test": np.arange(30)}, "y_test"),
    ({"y_train": np.arange(50) % 10}, "50"),
    ({"y_train": np.linspace(0, 1, 60)}, "float64"),
    ({"y_test": None}, "y_test"),
    ({"x_test": np.zeros((0, 8, 8, 1), np.uint8), "y_test": np.zeros(0, np.int64)}, "x_test"),
    ({"x_test": np.zeros((30, 9, 8, 1), np.uint8)}, "image_shape"),
]


@pytest.mark.parametrize(("changed", "named"), BAD_ARRAYS)
def test_bad_arrays(refused, arrays, changed, named):
    assert named in refused("prune", *arrays(**changed))


def test_no_arrays(refused, tmp_path):
    assert "no.npz" in refused("prune", "data=npz", "data.path=no.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    assert "text.npz" in refused("prune", "data=npz", "data.path=text.npz")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps({"x_train": 1}))
    assert "pickled.npz" in refused("train-cnn", "data=npz", "data.path=pickled.npz")


def test_overlapping_data(refused, arrays):
    same = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), dtype=np.uint8)
    sentence = refused("prune", *arrays(x_train=same, x_test=same[:30]))
    assert "30 of 30 test images are training images too" in sentence and "the splits overlap" in sentence


def test_empty_splits(refused):
    assert refused("prune", "split.reward_size=0").startswith("split.reward_size is 0; expected a number from 1 to ")
    assert refused("prune", "split.reward_from=both") == "reward_from must be 'train' or 'test', got 'both'."


def test_a_reward_split_that_is_too_large_is_said_and_halved(keepdrop):
    """The README's command on a small test set."""
    done = keepdrop("train-cnn", "base.epochs=1", "split.reward_from=test", "split.reward_size=2000", "run_dir=run")
    assert done.code == 0, done.err
    sentence = "reward_size=2000 would take all 449 test images and leave none for the report split; 224 are taken,"
    assert done.err == f"warning: {sentence} half of them.\n" and "225 report images" in done.out


@pytest.mark.parametrize("layers", ["[conv3]", "[conv3,conv4]"])
def test_agents_of_other_layers(refused, finished, layers):
    sentence = refused("prune", f"warm_start={finished}", f"layers={layers}")
    assert "were trained for conv1, conv2, but the layers are conv3" in sentence


def edited_agents(finished, target, **changed):
    """A copy of a run whose agents claim something else."""
    shutil.copytree(finished, target)
    for path in target.glob("layers/*/agent"):
        weights = load_file(path / "policy.safetensors")
        facts = json.loads((path / "facts.json").read_text()) | changed
        facts.pop("weights_sha256")
        (path / "facts.json").unlink()
        save_file(weights, path / "policy.safetensors", metadata={"facts": json.dumps(facts)})
    return target


def test_agents_of_another_observation_format(refused, finished, checkpoint, tmp_path):
    agents = edited_agents(finished, tmp_path / "old", statistic_names=["l1", "luck"])
    for command in (("apply", f"agents={agents}"), ("prune", f"warm_start={agents}", "layers=[conv1,conv2]")):
        sentence = refused(*command, f"checkpoint={checkpoint}")
        assert "was trained for statistic_names ['l1', 'luck'], but is to be used for ['l1', 'l2', " in sentence


def test_agents_of_a_layer_the_network_lacks(refused, finished, checkpoint, tmp_path):
    agents = edited_agents(finished, tmp_path / "old", group="stem.conv")
    assert refused("apply", f"agents={agents}", f"checkpoint={checkpoint}").startswith(
        "No prunable layer is called 'stem.conv'; the nearest are "
    )


def test_no_agents(refused, checkpoint, tmp_path):
    assert refused("apply") == "agents is not set; expected keepdrop apply agents=RUN checkpoint=FILE."
    assert refused("apply", "agents=no", f"checkpoint={checkpoint}").startswith("'no' is not a folder;")
    (tmp_path / "empty").mkdir()
    assert refused("apply", "agents=empty", f"checkpoint={checkpoint}").startswith("No trained agent in 'empty';")
    assert "checkpoint is not set" in refused("apply", "agents=empty")
    assert refused("prune", "warm_start=empty").startswith("No trained agent in 'empty';")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("finetune.epoch=1", "keepdrop apply has no setting 'finetune.epoch'; did you mean 'finetune.epochs'?"),
        (
            "recovery.train.epoch=1",
            "keepdrop apply has no setting 'recovery.train.epoch'; did you mean 'recovery.train.epochs'?",
        ),
        (
            "data.path=x",
            "keepdrop apply has no setting 'data.path'; expected one of data._target_, data.seed, data.test_fraction. "
            "A new argument of your own function takes a plus: +data.path=VALUE.",
        ),
        ("drop_bound.x=1", "drop_bound.x is '1'; expected a number."),
        ("finetune.epochs=many", "finetune.epochs is 'many'; expected a number."),
        ("finetune=3", "finetune is '3'; expected settings below it: key.NAME=VALUE."),
        ("data=npz", "data.path is not set; expected a value: give data.path=VALUE."),
        (
            "data=nz",
            "The group 'data' has no option 'nz'; did you mean 'npz'? It has custom, digits, folder, npz, scenes.",
        ),
    ],
)
def test_apply_overrides_what_it_inherits(refused, checkpoint, finished, override, sentence):
    assert refused("apply", f"agents={finished}", f"checkpoint={checkpoint}", override) == sentence


def test_apply_with_an_option_of_a_group(refused, checkpoint, finished):
    sentence = refused("apply", f"agents={finished}", f"checkpoint={checkpoint}", "data=npz", "data.pth=x")
    assert sentence == "keepdrop apply has no setting 'data.pth'; did you mean 'data.path'?"


def test_unknown_control(refused, finished, checkpoint):
    sentence = refused("apply", f"agents={finished}", f"checkpoint={checkpoint}", "controls=[l3]")
    assert sentence.startswith("controls has 'l3'; expected any of l1, ")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("network=custom",), "network._target_ is not set; expected the import path"),
        (("policy=custom",), "policy._target_ is not set; expected the import path"),
        (("reward=custom",), "reward._target_ is not set; expected the import path"),
        (
            ("network._target_=nope.net",),
            "network could not be built from nope.net: ModuleNotFoundError: ",
        ),
        (("network=custom", "network._target_=MINE.netwrok"), "network could not be built from MINE.netwrok: "),
        (("network=custom", "network._target_=MINE.no_network"), "network._target_=MINE.no_network returned str;"),
        (
            ("network=custom", "network._target_=MINE.Crash"),
            "The network fails on images of shape (2, 1, 8, 8) (KeyE",
        ),
        (("network=custom", "network._target_=MINE.wrong_logits"), "The network returns (2, 3) for images of shape"),
        (("network=resnet20",), "The network fails on images of shape (2, 1, 8, 8) (RuntimeError: Given groups=1"),
        (("policy=custom", "policy._target_=MINE.policy"), "policy could not be built: never fits"),
        (("data=custom", "data._target_=MINE.one_dataset"), "data._target_=MINE.one_dataset returned list;"),
        (("order=sideways",), "order is 'sideways'; expected one of forward, backward, largest_first."),
        (("search.masks=1",), "search.masks is 1; expected 2 or more"),
        (("search.images=0",), "search.images is 0; expected 1 or more"),
        (("agent.updates=-1",), "agent.updates is -1, but it cannot be below 0"),
        (("finetune.epochs=-1",), "finetune.epochs must be 0 or more, got -1.0."),
        (("recovery.train.lr=-1",), "lr must be 0 or more, got -1.0."),
        (("latency.repeats=0",), "latency is batch_sizes=[1, 64], repeats=0, warmup=3; expected"),
        (("device=gpu",), "device is 'gpu'; expected cpu, cuda, cuda:1, mps or auto"),
        (("device=cuda:99",), "device is 'cuda:99', which is not to be had here"),
        (("policy.exploration=bold",), "policy could not be built: exploration is 'bold'; expected one of"),
        (("reward=budget", "reward.target=40"), "target"),
    ],
)
def test_wrong_settings(refused, mine, overrides, sentence):
    overrides = [override.replace("MINE", mine) for override in overrides]
    assert refused("prune", *overrides).startswith(sentence.replace("MINE", mine))


def test_train_cnn_tries_the_network(refused, mine):
    own = ("network=custom", f"network._target_={mine}.Crash")
    assert "KeyError: 'my own bug'" in refused("train-cnn", *own)


@pytest.mark.parametrize("command", ["prune", "train-cnn"])
def test_existing_run_folder(refused, tmp_path, command):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    sentence = refused(command, "run_dir=taken")
    assert sentence.startswith("The run folder 'taken' exists and is not empty; expected a new one:")


def test_run_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused("prune", "run_dir=file").startswith("The run folder 'file' exists")
    assert refused("prune", "run_dir=file/run").startswith("Could not write 'file/run'")
    assert refused("prune", "run_dir=/dev/null").startswith("The run folder '/dev/null' exists and is no folder")
    for impossible in ("/proc/run", "x" * 300):
        assert refused("prune", f"run_dir={impossible}").startswith(f"Could not write '{impossible}'")


@pytest.mark.parametrize("command", ["prune", "train-cnn", "apply"])
def test_resume_what_is_no_run(refused, tmp_path, command):
    (tmp_path / "other").mkdir()
    assert refused(command, "resume=other").startswith("'other' is not a keepdrop run folder (config.yaml is missing);")
    assert refused(command, "resume=no").startswith("'no' is not a keepdrop run folder")


def test_resume_with_another_command(refused, cnn):
    assert refused("prune", f"resume={cnn}").startswith(
        f"{str(cnn)!r} was not written by keepdrop prune (its config.yaml"
    )


def test_resume_with_other_settings(refused, finished):
    assert "takes its configuration from that folder, but seed=3 came with it" in refused(
        "prune", f"resume={finished}", "seed=3"
    )


def test_resume_with_another_checkpoint(keepdrop, finished, cnn, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    (tmp_path / "run/hashes.json").unlink()  # as runs of version 0.1 are
    shutil.copy(cnn / "model.safetensors", tmp_path / "run/base/model.safetensors")
    facts = json.loads((tmp_path / "run/facts.json").read_text())
    facts["base"]["sha256"] = "0" * 64
    (tmp_path / "run/facts.json").write_text(json.dumps(facts))
    result = keepdrop("prune", "resume=run", "quiet=true")
    assert result.code == 2 and "The base network is not what 'run' began with" in result.err


@pytest.fixture
def full_disk(monkeypatch):
    """From the given number of synced files on, the disk is full."""

    def after(files):
        real, calls = os.fsync, iter(range(10**9))

        def fsync(descriptor):
            if next(calls) >= files:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return after


def test_full_disk_at_the_start(refused, checkpoint, full_disk):
    full_disk(0)
    sentence = refused("prune", f"checkpoint={checkpoint}", "run_dir=new/run")
    assert sentence.startswith("Could not write 'new/run/config.yaml' (No space left on device);")


@pytest.mark.parametrize("files", [1, 2, 3, 4, 6, 8])
def test_full_disk_on_the_way(keepdrop, tiny, checkpoint, full_disk, monkeypatch, outcome, tmp_path, files):
    """What was finished stays whole, and the run goes on once there is room."""
    with monkeypatch.context():
        full_disk(files)
        result = keepdrop("prune", *tiny, f"checkpoint={checkpoint}", "run_dir=run", "quiet=true")
        monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "No space left on device" in result.err and "before is " in result.err
    finished_layers = {path: path.read_bytes() for path in tmp_path.glob("run/layers/*[0-9]/*.safetensors")}
    assert not list(tmp_path.glob("run/metrics.json"))
    assert keepdrop("prune", "resume=run", "quiet=true").code == 0
    assert all(path.read_bytes() == content for path, content in finished_layers.items())


def test_a_written_file_is_old_or_new(full_disk, tmp_path):
    from keepdrop.errors import UserError
    from keepdrop.experiments.runs.folder import RunFolder

    folder = RunFolder(tmp_path)
    folder.write_text("metrics.json", "old")
    full_disk(0)
    with pytest.raises(UserError, match=r"No space left on device.; what was there before is intact"):
        folder.write_text("metrics.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"metrics.json": "old"}
