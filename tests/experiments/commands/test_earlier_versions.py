"""Runs and pruned files that version 0.1.0 wrote are still read, resumed, reported and applied."""

import json
import shutil
from pathlib import Path
from pydoc import locate

import pytest
import torch
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.envs.files.renamed import MODULES, RETIRED, current_config, current_target
from keepdrop.experiments.runs.folder import RunFolder

OLD = Path(__file__).parents[3] / "tests" / "fixtures" / "v0_1_0"
PRUNES = ["layers", "network"]


@pytest.fixture
def old(tmp_path):
    """Copies one of the old runs into the empty folder that commands run in."""

    def copy(name):
        shutil.copytree(OLD / name, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.mark.parametrize("name", ["layers", "network", "iterate"])
def test_pruned_files_load(name):
    network = load_pruned(OLD / name / "pruned")
    facts = json.loads((OLD / name / "metrics.json").read_text())
    assert sum(parameter.numel() for parameter in network.parameters()) == facts["pruned_params"]
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_finished_run_is_shown_again(keepdrop, old):
    for name in PRUNES:
        old(name)
        result = keepdrop("prune", f"resume={name}")
        assert result.code == 0 and "MACs per image" in result.out, result.err


def test_an_interrupted_run_ends_as_it_would_have(keepdrop, old):
    run = old("interrupted")
    assert keepdrop("prune", "resume=interrupted", "quiet=true").code == 0
    for decision in sorted((OLD / "layers/layers").glob("*/decision.json")):
        ours = json.loads((run / "layers" / decision.parent.name / "decision.json").read_text())
        assert ours["keep"] == json.loads(decision.read_text())["keep"]


def test_its_agents_are_applied(keepdrop, old):
    for name in ("agent", "layers"):
        run = old(name)
        weights = OLD / "layers/base/model.safetensors"
        options = ["controls=[]", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
        result = keepdrop("apply", f"agents={run}", f"checkpoint={weights}", f"run_dir=applied-{name}", *options)
        assert result.code == 0, result.err


def test_it_gets_a_report(keepdrop, old):
    for name in ("layers", "network", "iterate", "agent"):
        old(name)
        assert keepdrop("report", name).code == 0
    assert keepdrop("report", *PRUNES).code == 0


def test_the_table_leads_to_what_exists():
    assert all(locate(module) for module in MODULES.values())
    config = RunFolder.open(OLD / "layers").config()
    assert "judge" not in config and config.evaluation.compensate is True
    for node in (config.data, config.network, config.augment, config.metric, config.policy, config.reward):
        assert callable(locate(node["_target_"])), node


def test_names_of_others_stay():
    assert current_target("mine.network") == "mine.network"
    assert current_config({"judge": {"judge": 1}, "data": {"_target_": "mine.f"}}) == {
        "evaluation": {"judge": 1},
        "data": {"_target_": "mine.f"},
    }


def test_retired_settings_are_dropped_where_stored_and_unknown_where_typed(keepdrop):
    for name in ("layers", "network", "agent"):
        stored = (OLD / name / "config.yaml").read_text()
        config = RunFolder.open(OLD / name).config()
        for retired in RETIRED:
            section, key = retired.split(".")
            assert f"{key}:" in stored and key not in config[section] and config[section], (name, retired)
            assert current_config({section: {key: True, "kept": 1}, key: 2}) == {section: {"kept": 1}, key: 2}
    for retired in RETIRED:
        result = keepdrop("prune", f"{retired}=true")
        assert result.code == 2 and retired.split(".")[1] in result.err
