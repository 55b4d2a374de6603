"""One agent for a whole network at a MACs target: prune, resume, apply, and what is refused."""

import json

import pytest
import torch
from keepdrop.agent.saved_agent import load_agent, save_agent
from keepdrop.envs.files.pruned_network import load_pruned

TARGET = [
    "target.removed=0.5",
    "network_search.masks=4",
    "network_search.images=60",
    "network_search.agent.updates=3",
    "repair.images=100",
    "repair.places=8",
    "recovery.train.epochs=0.3",
    "finetune.epochs=0.5",
    "latency.repeats=1",
    "latency.warmup=0",
    "evaluation.statistics_images=100",
]


def read(path):
    return json.loads(path.read_text())


def tensors(model):
    return model.state_dict().values()


def test_a_macs_target_is_met_by_one_agent_and_the_result_loads(keepdrop, checkpoint, tmp_path):
    assert keepdrop("prune", *TARGET, f"checkpoint={checkpoint}", "run_dir=run").code == 0
    metrics = read(tmp_path / "run/metrics.json")
    assert 0.4 < metrics["pruned_macs"] / metrics["base_macs"] <= 0.5
    assert [group["name"] for group in metrics["groups"]] == [f"conv{i}" for i in range(1, 6)]
    agent = load_agent(tmp_path / "run/network/agent")
    assert agent.facts["target"] == {"removed": 0.5, "of": "network"} and len(agent.facts["reward_curve"]) == 3
    assert agent.facts["widths"] == [group["n_filters"] for group in metrics["groups"]]
    # The replay cuts and repairs as the run did, so its last point is the run's own accuracy.
    replay = read(tmp_path / "run/curves.json")["controls"]["methods"]
    assert replay["agent"][-1] == read(tmp_path / "run/network/decisions.json")[0]["pruned_accuracy"]
    assert list(replay) == ["agent", "l1", "random"] and {len(each) for each in replay.values()} == {5}
    # Recovery follows the repair as it follows the cut of a layer, and is kept where it helps.
    decided = read(tmp_path / "run/network/decisions.json")
    assert all(each["recovered_accuracy"] >= each["pruned_accuracy"] for each in decided)
    assert metrics["recovery_seconds"] > 0
    model = load_pruned(tmp_path / "run/pruned")
    assert sum(p.numel() for p in model.parameters()) == metrics["pruned_params"]
    assert not list((tmp_path / "run").rglob("*state*"))


def test_widths_are_multiples_where_wished_and_the_target_still_met(keepdrop, checkpoint, tmp_path):
    extra = ["surgery.round_to=8", "surgery.protect={conv5:[3]}", f"checkpoint={checkpoint}", "run_dir=run"]
    assert keepdrop("prune", *TARGET, *extra).code == 0
    metrics = read(tmp_path / "run/metrics.json")
    assert all(group["n_kept"] % 8 == 0 for group in metrics["groups"])
    assert metrics["pruned_macs"] <= 0.5 * metrics["base_macs"]
    decided = {record["name"]: record["keep"] for record in read(tmp_path / "run/network/decisions.json")}
    assert decided["conv5"][3]


def test_an_interrupted_search_goes_on_bit_for_bit(keepdrop, checkpoint, tmp_path, monkeypatch):
    command = ["prune", *TARGET, f"checkpoint={checkpoint}"]
    assert keepdrop(*command, "run_dir=whole").code == 0
    from keepdrop.agent.learning.natural_evolution import NetworkTrainer

    step, calls = NetworkTrainer.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(NetworkTrainer, "step", interrupted)
    stopped = keepdrop(*command, "run_dir=run")
    assert stopped.code == 130 and "resume=run" in stopped.err
    monkeypatch.setattr(NetworkTrainer, "step", step)
    assert (tmp_path / "run/network-state.pt").is_file()
    assert keepdrop("prune", "resume=run").code == 0
    for name in ("network/decisions.json", "metrics.json"):
        whole, again = read(tmp_path / "whole" / name), read(tmp_path / "run" / name)
        kept = [[record.get("keep", record.get("n_kept")) for record in each] for each in _records(whole, again)]
        assert kept[0] == kept[1]
    first, second = (load_pruned(tmp_path / run / "pruned") for run in ("whole", "run"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_finalists_are_trained_and_said(keepdrop, checkpoint, tmp_path):
    """The decision is the best finalist's, and the network is cut and repaired as ever: training follows anyhow."""
    halving = ["network_search.halving.candidates=[3,2]", "network_search.halving.minibatches=[4,12]", "augment=null"]
    small = ["network_search.agent.updates=1", "controls=[]", "recovery.train.epochs=0", "finetune.ema=0.9"]
    done = keepdrop("prune", *TARGET, *small, *halving, f"checkpoint={checkpoint}", "run_dir=run")
    assert done.code == 0, done.err
    said = [line for line in (done.out + done.err).splitlines() if line.startswith("Finalist ")]
    decided = read(tmp_path / "run/network/decisions.json")[0]
    rungs = decided["facts"]["halving"]
    assert len(said) == sum(len(rung["candidates"]) for rung in rungs) and "after 12 minibatches" in said[-1]
    assert decided["decided_by"] == rungs[-1]["candidates"][0]["name"] == decided["facts"]["decided_by"]
    assert decided["pruned_accuracy"] == rungs[-1]["candidates"][0]["repaired"]


def _records(*found):
    return [each if isinstance(each, list) else each["groups"] for each in found]


def test_a_trained_agent_prunes_a_checkpoint_it_has_never_seen(keepdrop, checkpoint, tmp_path):
    assert keepdrop("prune", *TARGET, f"checkpoint={checkpoint}", "run_dir=run").code == 0
    other = ["train-cnn", "seed=5", "base.epochs=2", "base.lr=0.05", "run_dir=other", "quiet=true"]
    assert keepdrop(*other).code == 0
    command = ["apply", "agents=run", "checkpoint=other/model.safetensors", "target={removed:0.6}", "run_dir=applied"]
    result = keepdrop(*command)
    assert result.code == 0, result.err
    rows = read(tmp_path / "applied/metrics.json")["methods"]
    assert list(rows) == ["agent", "l1", "random"]
    assert len({row["pruned_macs"] for row in rows.values()}) == 1
    base = read(tmp_path / "applied/metrics.json")["base_macs"]
    assert 0.3 < rows["agent"]["pruned_macs"] / base <= 0.4
    assert [group["decided_by"] for group in rows["agent"]["groups"]] == ["trained agent"] * 5

    # The same agent stands beside the criteria in front of the oracle, and is refused for other layers.
    ask = ["oracle", "checkpoint=other/model.safetensors", "agents=run", "criteria=[taylor]", "run_dir=oracle"]
    assert keepdrop(*ask).code == 0
    found = read(tmp_path / "oracle/metrics.json")["correlations"]
    row = next(row for row in found if row["method"] == "network agent")
    assert list(row["layers"]) == [f"conv{i}" for i in range(1, 6)] and row["all"] is not None
    refusal = keepdrop(*ask, "layers=[conv2]", "run_dir=refused")
    assert refusal.code == 2 and "conv2" in refusal.err and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("target.removed=40", "did you mean 0.4?"),
        ("target.removed=0.9999", "with one filter per layer"),
        ("target.of=layers", "targets.of is 'layers'"),
        ("network_search.masks=5", "network_search.masks is 5; expected an even number of 4 or more."),
        ("network_search.agent.weight_scale=0", "above 0"),
        ("network_search.halving.candidates=[8]", "expected as many numbers in one as in the other"),
        ("finetune.ema=1", "finetune.ema must lie in [0, 1), such as 0.999, or be left out, got 1.0."),
        ("repair.ridge=0", "above 0"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(refused, checkpoint, setting, sentence):
    assert sentence in refused("prune", *TARGET, f"checkpoint={checkpoint}", setting)


def test_limits_under_which_the_target_cannot_be_met_are_said(keepdrop, checkpoint):
    result = keepdrop("prune", *TARGET, f"checkpoint={checkpoint}", "surgery.min_kept=0.9", "run_dir=run")
    assert result.code == 2 and "under surgery.round_to, min_kept and protect" in result.err


def test_an_agent_of_layers_that_are_not_there_is_refused(keepdrop, checkpoint, tmp_path):
    assert keepdrop("prune", *TARGET, f"checkpoint={checkpoint}", "run_dir=run").code == 0
    folder = tmp_path / "run/network/agent"
    agent = load_agent(folder)
    save_agent(folder, agent.policy, {**agent.facts, "groups": ["conv1", "conv2", "conv3", "conv4", "conv6"]})
    result = keepdrop("apply", "agents=run", f"checkpoint={checkpoint}")
    assert result.code == 2 and result.err.count("\n") == 1 and "conv6" in result.err
