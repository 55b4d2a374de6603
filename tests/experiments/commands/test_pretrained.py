"""An agent that reads networks, asked by every door: prune, apply, compare, a search's start, and Python."""

import json

import keepdrop as public
import pytest
import torch
from keepdrop import prune
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.agent.saved_agent import load_agent, save_agent
from keepdrop.envs.data.sources import digits
from keepdrop.envs.group_descriptions import DESCRIPTION_NAMES
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import load_checkpoint
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.errors import UserError
from keepdrop.experiments.pruning.agent_places import BUNDLED
from keepdrop.experiments.pruning.pretrained import load_pretrained
from quick import QUICK

ASKED = [
    "target.removed=0.5",
    "evaluation.statistics_images=60",
    "repair.images=60",
    "repair.places=4",
    "recovery.train.epochs=0",
    "finetune.epochs=0",
    "latency.repeats=1",
    "latency.warmup=0",
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Folder of an agent that reads networks and has an opinion."""
    torch.manual_seed(3)
    policy = GroupPolicy(DESCRIPTION_NAMES, STATISTIC_NAMES, hidden=4)
    with torch.no_grad():
        policy.residual.weight.normal_(0, 0.3)
    facts = {"group": "any network", "description_names": list(DESCRIPTION_NAMES)}
    folder = tmp_path_factory.mktemp("reader") / "agent"
    save_agent(folder, policy, {**facts, "statistic_names": list(STATISTIC_NAMES)})
    return folder


@pytest.fixture(scope="module")
def architecture(checkpoint, tmp_path_factory):
    """Run folder with an agent of one architecture."""
    from command_line import run_main

    folder = tmp_path_factory.mktemp("architecture") / "run"
    few = ["network_search.masks=4", "network_search.images=40", "network_search.agent.updates=1"]
    typed = [*ASKED, *few, f"checkpoint={checkpoint}", "controls=[]", f"run_dir={folder}", "quiet=true"]
    assert run_main("prune", *typed) == 0
    return folder


def decisions(run):
    return json.loads((run / "network/decisions.json").read_text())


def test_the_command_asks_it(keepdrop, reader, checkpoint, tmp_path):
    done = keepdrop("prune", *ASKED, f"agents={reader}", f"checkpoint={checkpoint}", "run_dir=run")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["pruned_macs"] <= 0.5 * metrics["base_macs"] and metrics["target"]
    kept = load_agent(tmp_path / "run/network/agent").policy.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in load_agent(reader).policy.state_dict().items())
    # A run that asked it is a place of it: another network is asked about at that run's target and settings.
    again = keepdrop(
        "apply", f"agents={tmp_path / 'run'}", f"checkpoint={checkpoint}", "controls=[l1]", "run_dir=again"
    )
    assert again.code == 0, again.err
    ours = [each["keep"] for each in decisions(tmp_path / "run")]
    assert [each["keep"] for each in decisions(tmp_path / "again/methods/agent")] == ours
    methods = json.loads((tmp_path / "again/metrics.json").read_text())["methods"]
    assert list(methods) == ["agent", "l1"]


def test_apply_takes_it_with_a_network_and_data_as_prune_does(keepdrop, reader, checkpoint, tmp_path):
    done = keepdrop("apply", *ASKED, f"agents={reader}", f"checkpoint={checkpoint}", "controls=[]", "run_dir=run")
    assert done.code == 0, done.err
    assert len(decisions(tmp_path / "run/methods/agent")) == 5


def test_from_python_it_decides_what_the_command_decides_of(reader, checkpoint, tmp_path):
    model, data = small_cnn(), digits()
    load_checkpoint(model, checkpoint)
    call = {"macs_removed": 0.5, "settings": QUICK, "finetune": None}
    result = prune(model, data.train, data.test, agents=reader, **call)
    assert result.macs <= 0.5 * result.base_macs
    decided = {record.decided_by for record in result.layers}
    assert len(decided) == 1 and decided <= {"pretrained agent", "reconstruction", "uniform l2", "plan"}
    loaded = prune(model, data.train, data.test, agents=load_pretrained(reader), **call)
    applied = public.apply_agents(reader, model, data.train, data.test, **call)
    for other in (loaded, applied):
        assert [each.keep for each in other.layers] == [each.keep for each in result.layers]
    # A folder knows which agent it was asked of.
    run = tmp_path / "run"
    prune(model, data.train, data.test, agents=reader, folder=run, **call)
    with pytest.raises(UserError, match="holds another run: its agents differs"):
        prune(model, data.train, data.test, folder=run, **call)


def test_mistakes_from_python_are_said_before_anything_is_done(reader, architecture, tmp_path):
    def ask(**given):
        return prune(None, None, None, folder=tmp_path / "run", **given)

    with pytest.raises(UserError, match=r"decides at a target, and none is given; add one, as in macs_removed=0\.5"):
        ask(agents=reader)
    with pytest.raises(UserError, match="warm_start trains agents further; leave one of them out"):
        ask(agents=reader, warm_start="run", macs_removed=0.5)
    with pytest.raises(UserError, match="was trained for one architecture"):
        ask(agents=architecture, macs_removed=0.5)
    with pytest.raises(UserError, match="agents is 'nowhere'"):
        ask(agents="nowhere", macs_removed=0.5)
    with pytest.raises(UserError, match=r"none is given; add one, as in macs_removed=0\.5"):
        public.apply_agents(reader, None, None, None)
    assert not (tmp_path / "run").exists()


def test_mistakes_of_commands_are_said_before_anything_is_written(refused, reader, architecture, checkpoint):
    end = (f"checkpoint={checkpoint}", "run_dir=run")
    assert "add one, as in target.removed=0.5" in refused("prune", f"agents={reader}", *end)
    assert "add one, as in target.removed=0.5" in refused("apply", f"agents={reader}", *end)
    assert "was trained for one architecture" in refused("prune", f"agents={architecture}", "target.removed=0.5", *end)
    assert "agents is 'nowhere'" in refused("prune", "agents=nowhere", "target.removed=0.5", *end)
    assert "names no repository" in refused("prune", "agents=hf://nobody", "target.removed=0.5", *end)
    assert "target.params=0.0001 cannot be met" in refused("prune", f"agents={reader}", "target.params=0.0001", *end)
    start = "network_search.start"
    assert f"{start} is 'fast'; expected one of" in refused("prune", f"{start}=fast", "target.removed=0.5", *end)
    said = refused("prune", f"{start}={architecture}", "target.removed=0.5", *end)
    assert "was trained for one architecture" in said
    assert "would do nothing" in refused("prune", f"agents={reader}", f"{start}=uniform", "target.removed=0.5", *end)


def test_a_search_starts_from_it(keepdrop, reader, checkpoint, tmp_path, monkeypatch):
    """Without updates the agent is where it starts; the pretrained one's mask is judged as a control."""
    from keepdrop.agent.learning.natural_evolution import NetworkTrainer

    starts = []
    step = NetworkTrainer.step
    monkeypatch.setattr(
        NetworkTrainer, "step", lambda self: starts.append(self.policy.log_weight.detach().clone()) or step(self)
    )
    few = ["network_search.masks=4", "network_search.images=40", "network_search.agent.updates=1", "controls=[]"]
    typed = [*ASKED, *few, f"network_search.start={reader}", f"checkpoint={checkpoint}", "run_dir=run"]
    done = keepdrop("prune", *typed)
    assert done.code == 0, done.err
    facts = decisions(tmp_path / "run")[0]["facts"]
    assert {"uniform l2", "reconstruction", "pretrained"} <= set(facts["control_accuracy"])
    assert facts["judged_accuracy"] >= facts["control_accuracy"]["pretrained"]
    assert starts[0].std() > 0.01


def test_a_comparison_leaves_it_out_where_it_cannot_be_loaded(keepdrop, checkpoint, tmp_path, monkeypatch, reader):
    from keepdrop.experiments.pruning import agent_places

    small = ["methods=[l2-uniform,pretrained]", "stages=[zero]", "seeds=[0]", "targets.removed=[0.5]", "workers=1"]
    small += ["compensate=[false]", "evaluation.statistics_images=60", f"checkpoint={checkpoint}"]
    monkeypatch.setattr(agent_places, "BUNDLED", reader)
    assert keepdrop("compare", *small, "run_dir=run").code == 0
    rows = {each["method"] for each in json.loads((tmp_path / "run/metrics.json").read_text())["rows"]}
    assert rows == {"l2-uniform", "pretrained"}
    monkeypatch.setattr(agent_places, "BUNDLED", tmp_path / "none")
    assert keepdrop("compare", *small, "run_dir=without").code == 0
    assert json.loads((tmp_path / "without/metrics.json").read_text())["skipped"]


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="the agent that comes with keepdrop is not there yet")
def test_the_shipped_agent_is_small_and_has_a_card():
    agent = load_pretrained("pretrained")
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 500 * 1024
    assert "license: apache-2.0" in (BUNDLED / "README.md").read_text() and agent.facts["networks"]
