"""From Python: trained agents on another network, warm starts, limits of the surgery; the guide's own examples."""

import importlib
import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from keepdrop import AgentSettings, Limits, Settings, UserError, apply_agents, prune
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state, load_checkpoint
from keepdrop.experiments.training.loop import fit_network
from keepdrop.experiments.training.train_settings import TrainSettings
from quick import CALL, QUICK

ASK = {"finetune": None, "settings": QUICK}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def first(checkpoint):
    model = small_cnn()
    load_checkpoint(model, checkpoint)
    return model


@pytest.fixture(scope="module")
def second(data):
    """Another training of the same architecture."""
    torch.manual_seed(1)
    model = small_cnn()
    fit_network(model, data.train, TrainSettings(epochs=2, batch_size=64, lr=0.05), seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def run(first, data, tmp_path_factory):
    """Folder of a pruning whose agents are asked again below, and its result."""
    folder = tmp_path_factory.mktemp("first") / "run"
    return folder, prune(first, data.train, data.test, **CALL, folder=folder)


def test_agents_decide_on_another_network_and_change_nothing(run, second, data):
    folder, _ = run
    before, files = hash_state(second), {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    one, other = (apply_agents(folder, second, data.train, data.test, **ASK) for _ in range(2))
    assert hash_state(second) == before and hash_state(one.model) == hash_state(other.model)
    assert [(layer.name, layer.decided_by) for layer in one.layers] == [
        ("conv1", "trained agent"),
        ("conv2", "trained agent"),
    ]
    assert one.macs < one.base_macs and one.model.conv1.out_channels == one.layers[0].n_kept
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == files


def test_it_is_what_the_command_line_does(run, second, data, keepdrop, tmp_path):
    """`keepdrop apply` on the same agents, images and seed keeps the same filters."""
    from keepdrop.envs.networks.checkpoint import save_weights

    folder, _ = run
    save_weights(second, tmp_path / "second.safetensors")
    shutil.copytree(folder / "layers", tmp_path / "agents/layers")
    evaluation = "evaluation={compensation_images:100,statistics_images:100}"
    (tmp_path / "agents/config.yaml").write_text(
        "data: {_target_: keepdrop.envs.data.sources.digits}\n"
        "network: {_target_: keepdrop.envs.networks.built_in.small_cnn}\n"
    )
    command = ["apply", "agents=agents", "checkpoint=second.safetensors", "controls=[]", evaluation, "quiet=true"]
    options = ["split={reward_from:test,reward_size:200}", "recovery.train.epochs=0", "finetune.epochs=0"]
    result = keepdrop(*command, *options, "latency={repeats:1,warmup:0}", "run_dir=applied")
    assert result.code == 0, result.err
    decisions = sorted(Path("applied/methods/agent/layers").glob("*/decision.json"))
    theirs = [json.loads(path.read_text())["keep"] for path in decisions]
    ours = apply_agents(folder, second, data.train, data.test, **ASK)
    assert theirs == [layer.keep for layer in ours.layers]


@pytest.mark.slow
def test_a_network_agent_is_asked_for_its_own_target_and_for_another(first, second, data, tmp_path):
    call = CALL | {"layers": None, "macs_removed": 0.3}
    prune(first, data.train, data.test, **call, folder=tmp_path / "run")
    own = apply_agents(tmp_path / "run", second, data.train, data.test, **ASK)
    assert 0.6 < own.macs / own.base_macs <= 0.7
    more = apply_agents(tmp_path / "run", second, data.train, data.test, **ASK, macs_removed=0.5)
    assert 0.4 < more.macs / more.base_macs <= 0.5
    assert not apply_agents(
        tmp_path / "run", second, data.train, data.test, **ASK, macs_removed=0.9, drop_bound=0.001
    ).bound_held


def test_warm_start_begins_with_the_saved_agents(run, first, data, tmp_path):
    """Without an update the agent is the saved one, to the bit; with some it is not."""
    from safetensors.torch import load_file

    folder, _ = run
    weights = "layers/00-conv1/agent/policy.safetensors"
    for updates in (0, 2):
        settings = Settings(
            reward_size=200,
            masks=4,
            images=60,
            agent=AgentSettings(updates=updates, sweep=False),
            evaluation=QUICK.evaluation,
        )
        call = CALL | {"settings": settings, "layers": ["conv1"]}
        prune(first, data.train, data.test, **call, warm_start=folder, folder=tmp_path / str(updates))
        saved, now = load_file(folder / weights), load_file(tmp_path / str(updates) / weights)
        assert all(torch.equal(saved[name], now[name]) for name in saved) is (updates == 0)


def test_limits_hold(first, data):
    settings = Settings(
        reward_size=200,
        masks=4,
        images=60,
        agent=QUICK.agent,
        evaluation=QUICK.evaluation,
        surgery=Limits(round_to=4, min_kept=8, protect={"conv1": [0, 15]}),
    )
    result = prune(first, data.train, data.test, **CALL | {"settings": settings, "drop_bound": 0.3})
    assert all(layer.n_kept in (8, 12, 16) for layer in result.layers)
    assert result.layers[0].keep[0] and result.layers[0].keep[15]


def test_mistakes_are_sentences(run, first, data, tmp_path):
    folder, _ = run
    (tmp_path / "empty").mkdir()
    images = (data.train, data.test)
    other = torch.nn.Sequential(OrderedDict(flatten=torch.nn.Flatten(), linear=torch.nn.Linear(64, 10)))
    fit_network(other, data.train, TrainSettings(epochs=1, batch_size=64, lr=0.05), seed=0)
    for message, call in {
        "is not a folder": lambda: apply_agents(tmp_path / "no", first, *images, **ASK),
        "No trained agent in": lambda: apply_agents(tmp_path / "empty", first, *images, **ASK),
        "decide layer by layer; leave it out": lambda: apply_agents(folder, first, *images, **ASK, macs_removed=0.3),
        "No prunable layer is called 'conv1'": lambda: apply_agents(folder, other, *images, **ASK),
        "leave one of them out": lambda: prune(first, *images, **CALL, warm_start=folder, macs_removed=0.3),
        "were trained for conv1, conv2, but the layers are conv3": lambda: prune(
            first, *images, **CALL | {"layers": ["conv3"]}, warm_start=folder
        ),
        "no chosen layer can lose": lambda: prune(
            first, *images, **CALL | {"settings": Settings(reward_size=200, surgery=Limits(round_to=64))}
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            call()


def test_the_guide(first, second, data, tmp_path, monkeypatch):
    """Its two examples, as they stand on the page."""
    import re

    page = Path(__file__).parents[3] / "docs/guides/python.md"
    for title, text in re.findall(r'^```python title="(\w+\.py)"\n(.*?)^```$', page.read_text(), re.M | re.S):
        (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    search = {"reward_size": 200, "masks": 4, "images": 60, "agent": QUICK.agent, "evaluation": QUICK.evaluation}
    limited = importlib.import_module("limits").main(first, data.train, data.test, ["conv1"], **search)
    assert limited.layers[0].n_kept % 4 == 0 and limited.layers[0].keep[0] and limited.layers[0].keep[3]
    call = CALL | {"layers": ["conv1"]}
    asked, trained_on = importlib.import_module("another_network").main(first, second, data.train, data.test, **call)
    assert asked.layers[0].decided_by == "trained agent" and trained_on.layers[0].decided_by != "trained agent"
