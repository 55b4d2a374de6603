"""The guides run: their files are written, their commands and their Python are executed, made small."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import run_main
from keepdrop import AgentSettings, MeanAveragePrecision, from_datasets
from keepdrop.errors import Notice

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
SMALL = {
    "train-cnn": [],
    "inspect": [],
    "prune": [
        "agent.updates=2",
        "search.masks=4",
        "search.images=60",
        "recovery.train.epochs=0",
        "finetune.epochs=0.2",
        "latency.repeats=1",
        "latency.warmup=0",
        "evaluation.compensation_images=100",
        "evaluation.statistics_images=100",
        "drop_bound=0.4",
        "quiet=true",
    ],
}
LAUNCHERS = {"processes": "joblib", "slurm_here": "submitit", "ray_here": "ray"}  # of the presets their plugins
BASE = ["base.epochs=2", "base.lr=0.05", "layers=[conv1,conv2]"]
torch.set_num_threads(1)


def blocks(page, kind):
    """(title, text) of the fenced blocks of a kind."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    return re.findall(rf'^```{kind}(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def write_files(page, folder):
    for title, text in blocks(page, "python"):
        if title:
            (folder / title).write_text(text, encoding="utf-8")


def run_command(line, *more):
    """Run one `keepdrop ...` line in this process."""
    words = line.split()[1:]
    return run_main(*words, *SMALL[words[0]], *more)


def test_own_model(folder):
    write_files("own-model.md", folder)
    commands = [text.strip() for _, text in blocks("own-model.md", "sh")]
    assert [command.split()[1] for command in commands] == ["inspect", "train-cnn", "prune"]
    for command in commands:
        assert run_command(command) == 0
    names = {}
    exec(next(text for title, text in blocks("own-model.md", "python") if not title), names)
    assert names["small"](torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_networks_of_others(torchvision, folder, capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    for _, command in blocks("networks-of-others.md", "sh"):
        capsys.readouterr()
        assert run_command(command) == 0
        assert "layer1.0.conv1" in capsys.readouterr().out
    for _, text in blocks("networks-of-others.md", "python"):
        exec(text, {})
    assert re.match(r"\d+ groups can be pruned", capsys.readouterr().out)
    assert (folder / "renamed.safetensors").is_file()


def test_bring_your_own(folder, capsys):
    write_files("bring-your-own.md", folder)
    with pytest.warns(Notice, match=r"came wrapped \(DataParallel\); it is pruned and given back plain"):
        small = importlib.import_module("heartbeats").main(epochs=5, updates=2)
    assert float(re.match(r"BalancedAccuracy ([\d.]+)%", capsys.readouterr().out)[1]) > 90
    signals = torch.zeros(2, 2, 64)
    assert small.first[0].out_channels < 12 and small(signals).shape == (2, 1)
    assert [each.shape for each in small.train()(signals)] == [(2, 1), (2, 1)]


def test_reuse(folder, monkeypatch):
    """The whole way: two networks, one agent over both, asked about a third one, shared."""
    write = blocks("reuse.md", "yaml")[0]
    (folder / write[0]).write_text(write[1])
    lines = [line for _, text in blocks("reuse.md", "sh") for line in text.splitlines()]
    train, (pretrain, asked) = lines[3:5], lines[5:]
    for line in train:
        assert run_main(*line.split()[1:], "base.epochs=3", "base.lr=0.05") == 0
    small = ["rounds=1", "targets=[0.5]", "hidden=6", "fit_images=60", "sampling.samples=4", "sampling.images=40"]
    small += ["sampling.repair_images=20", "sampling.repair_places=4", "gradient.steps=3"]
    few = ["split.reward_size=60", "workers=1", "quiet=true"]
    assert run_main(*pretrain.split()[1:], *(f"training.{each}" for each in small), *few) == 0
    quick = ["evaluation.statistics_images=60", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
    quick += ["base.epochs=2", "base.lr=0.05", "run_dir=asked", "latency.repeats=1", "repair.images=60", "controls=[]"]
    assert run_main(*asked.split()[1:], *quick) == 0
    assert json.loads((folder / "asked/metrics.json").read_text())["pruned_macs"] > 0
    called = []
    import keepdrop

    for name in ("share_agent", "fetch_agent"):
        monkeypatch.setattr(keepdrop, name, lambda *given: called.append(given), raising=False)
    exec(next(text for _, text in blocks("reuse.md", "python") if "share_agent" in text), {})
    assert called == [("over-both", "me/my-pruner"), ("me/my-pruner",)]


def test_several_inputs(folder, capsys):
    write_files("several-inputs.md", folder)
    train, prune = (text.strip() for _, text in blocks("several-inputs.md", "sh"))
    assert run_command(train) == 0
    assert run_command(prune, "layers=[conv1,conv2]", "export=[program]") == 0
    names = {}
    exec(next(text for title, text in blocks("several-inputs.md", "python") if not title), names)
    answer = names["answer"]
    assert {name: tuple(value.shape) for name, value in answer.items()} == {"brightness": (2, 1), "defect": (2, 4)}
    program = torch.export.load("pruned/pruned/model.pt2").module()
    inputs = {"image": torch.rand(5, 1, 8, 8), "kind": torch.arange(5) % 3}
    for name, value in program(**inputs).items():
        assert torch.allclose(value, names["small"](**inputs)[name], atol=1e-5)


@pytest.mark.filterwarnings("ignore::keepdrop.errors.Notice")
def test_hugging_face(folder, capsys, request):
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")
    if find_spec("torchvision"):  # transformers imports it
        request.getfixturevalue("torchvision")
    write_files("hugging-face.md", folder)
    quick = {"masks": 4, "images": 60, "reward_size": 100, "agent": AgentSettings(updates=2)}
    result, again = importlib.import_module("flowers").main(**quick)
    answer = result.model(pixel_values=result.example, labels=torch.tensor([0]))
    assert result.macs < result.base_macs and result.base_accuracy > 0.5 and answer.loss.item() > 0
    assert type(again) is type(result.model) and torch.equal(again(result.example).logits, answer.logits)
    assert "'resnet.embedder.embedder.convolution'" in capsys.readouterr().out
    result.model.save_pretrained("theirs")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(result.model).from_pretrained("theirs")


def test_own_metric_for_segmentation(folder):
    write_files("own-metric.md", folder)
    commands = [" ".join(text.replace("\\\n", " ").split()) for _, text in blocks("own-metric.md", "sh")]
    for command, name in zip(commands, ("MeanIoU", "dice"), strict=True):
        assert run_command(command, "base.epochs=3", "layers=['3']", "controls=[]", "split.reward_size=100") == 0
        metrics = json.loads((folder / command.split("run_dir=")[1] / "metrics.json").read_text())
        assert metrics["metric"] == name and metrics["base_accuracy"] > 0.4
        assert metrics["pruned_macs"] < metrics["base_macs"]


def test_own_metric_for_regression(folder):
    write_files("own-metric.md", folder)
    result = importlib.import_module("regression").main(epochs=6, updates=1)
    assert result.macs < result.base_macs and result.base_accuracy > 0.5
    assert result.accuracy > result.base_accuracy - 0.15


@pytest.fixture
def detector(folder, monkeypatch):
    """The example as the guide includes it, and a checkpoint of a detector trained for a few seconds."""
    write_files("detection.md", folder)
    monkeypatch.syspath_prepend(str(GUIDES.parents[1] / "examples"))
    (folder / "detection.py").unlink()  # the guide's block only names the file that it includes
    module = importlib.import_module("detection")
    small = module.data(120)
    monkeypatch.setattr(module, "data", lambda: small)
    torch.manual_seed(0)
    model = module.Detector()
    module.fit(model, small[0], 12, lr=1e-2)
    torch.save(model.state_dict(), "detector.pt")
    yield module, model.eval()
    del sys.modules["detection"]


def test_detection(detector, folder):
    ((_, text),) = blocks("detection.md", "sh")
    command = " ".join(text.replace("\\\n", " ").split())
    more = ["layers=['head3.0.0','head4.0.0']", "controls=[]", "split.reward_size=40", "search.images=20"]
    assert run_command(command, *more) == 0
    metrics = json.loads((folder / "runs/detector/metrics.json").read_text())
    assert metrics["metric"] == "MeanAveragePrecision(decode=decode, iou=0.5)" and metrics["base_accuracy"] > 0.05
    assert metrics["pruned_macs"] < metrics["base_macs"]
    small, again = importlib.import_module("train_further").main(images=40, epochs=1)
    images = torch.rand(2, 3, 64, 64)
    assert type(small) is detector[0].Detector and torch.equal(small(images), again(images))
    assert small.head3[0][0].out_channels < 48 and small.head3[1].out_channels == 7


@pytest.mark.filterwarnings("ignore")  # of torchmetrics
def test_detection_with_torchmetrics(torchvision, detector):
    for name in ("torchmetrics", "faster_coco_eval"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (extra 'detection')")
    module, model = detector
    data = from_datasets(*module.data()).test
    images, targets = data.batch(torch.arange(len(data)))
    metric = MeanAveragePrecision(module.decode, iou=0.5)
    with torch.no_grad():
        ours = metric.of_set(metric(model(images), targets))
    theirs = importlib.import_module("with_torchmetrics").figure(model, module.data()[1])
    assert ours == pytest.approx(theirs, abs=1e-3) and ours > 0.05


def test_own_reward(folder):
    write_files("own-reward.md", folder)
    ((_, command),) = blocks("own-reward.md", "sh")
    assert run_command(command, *BASE) == 0
    assert "my_reward.ParametersFirst" in (folder / "mine/config.yaml").read_text()


def test_own_policy(folder):
    write_files("own-policy.md", folder)
    ((_, command),) = blocks("own-policy.md", "sh")
    assert run_command(command, *BASE) == 0
    from keepdrop.agent.saved_agent import load_agent

    policy = importlib.import_module("my_policy").LinearPolicy
    agent = load_agent(folder / "mine/layers/00-conv1/agent", {"LinearPolicy": policy})
    assert agent.policy.kwargs["bias"] == 1.5


def run_program(line, *more):
    """Run one `keepdrop ...` line as a process of its own."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("keepdrop")), *line.split()[1:], *more, "quiet=true"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_many_machines(folder, ray_folder):
    """The lines that need no second machine: processes, and clusters that runs start for themselves."""
    pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
    ((_, text),) = blocks("many-machines.md", "sh")
    processes, ray, compare = text.splitlines()
    quick = ["base.epochs=2", "base.lr=0.05", "network_search.masks=4", "network_search.images=60"]
    quick += ["network_search.agent.updates=2", "repair.images=60", "recovery.train.epochs=0", "finetune.epochs=0"]
    quick += ["latency.repeats=1", "latency.warmup=0", "controls=[]"]
    for name, line in (("processes", processes), ("ray", ray)):
        run_program(line, *quick, f"run_dir={name}")
    decisions = [json.loads((folder / name / "network/decisions.json").read_text()) for name in ("ray", "processes")]
    assert [each["keep"] for each in decisions[0]] == [each["keep"] for each in decisions[1]]
    few = [
        "layers=[conv2]",
        "targets.removed=[0.1]",
        "seeds=[0]",
        "compensate=[false]",
        "methods=[l1-uniform,fpgm-uniform]",
    ]
    run_program(compare, "base.epochs=2", "base.lr=0.05", *few, "run_dir=compare")
    assert json.loads((folder / "compare/metrics.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("launcher", [None, *LAUNCHERS])
def test_sweeps(launcher, folder, ray_folder):
    if launcher and importlib.util.find_spec(f"hydra_plugins.hydra_{LAUNCHERS[launcher]}_launcher") is None:
        pytest.skip(f"hydra-{LAUNCHERS[launcher]}-launcher is not installed (extra 'sweeps' or 'ray-sweeps')")
    lines = {next((name for name in LAUNCHERS if name in text), None): text for _, text in blocks("sweeps.md", "sh")}
    line = lines[launcher]
    run_program(line)
    where = line.split("run_dir=")[1].split()[0]
    assert sorted(path.parent.name for path in Path(where).glob("*/model.safetensors")) == ["0", "1"]
