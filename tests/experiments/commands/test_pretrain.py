"""`keepdrop pretrain`: an agent over a zoo, resumed bit for bit, shared by processes, and what is refused."""

import json
import shutil

import pytest
import torch
from command_line import run_main
from keepdrop.agent.saved_agent import load_agent
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import save_weights
from keepdrop.experiments.config.entry_point import resuming
from keepdrop.experiments.pretraining import rounds
from keepdrop.experiments.runs.folder import RunFolder
from omegaconf import OmegaConf
from tiny_zoo import SMALL, entry, write_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory):
    """Folder of a whole, tiny pretraining."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert run_main("pretrain", f"zoo={zoo}", *SMALL, f"run_dir={folder}", "quiet=true") == 0
    return folder


def weights(folder):
    return load_agent(folder / "agent").policy.state_dict()


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_an_agent_its_card_and_its_figures(run):
    agent = load_agent(run / "agent")
    assert agent.facts["group"] == "any network" and agent.facts["rounds"] == 2
    assert agent.facts["networks"] == {"one": "family one", "two": "family two"}
    metrics = json.loads((run / "metrics.json").read_text())
    gains = metrics["gain_over_uniform"]
    assert metrics["worlds"] == 4 and metrics["mask_evaluations"] == 2 * 4 * (4 + 3)
    # The untrained policy is the plan, and equal shares gain nothing over themselves.
    assert gains[0]["policy"] == gains[0]["plan"] and {each["uniform"] for each in gains} == {0.0}
    card = (run / "agent/README.md").read_text()
    assert "license: apache-2.0" in card and "| family one | one |" in card and "30 %, 60 % of the MACs" in card
    assert str(run) not in card and (run / "report.html").is_file()


def test_a_killed_run_is_resumed_bit_for_bit(run, tmp_path, monkeypatch):
    """The last files of the second round are not there; of the first nothing is tried again."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("agent", "agents/2", "metrics.json", "worlds/two/removed-0.6.round-1.json"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (again / "agents/2").mkdir()  # killed before the weights were written
    before, tried = rounds.tried, []
    monkeypatch.setattr(rounds, "tried", lambda world, *rest: tried.append(world) or before(world, *rest))
    assert run_main("pretrain", f"resume={again}", "quiet=true") == 0
    assert len(tried) == 1 and same(weights(run), weights(again))


def test_processes_share_the_networks_and_change_nothing(run, zoo, tmp_path):
    small = [each for each in SMALL if not each.startswith("workers")]
    assert run_main("pretrain", f"zoo={zoo}", *small, "workers=2", f"run_dir={tmp_path / 'two'}", "quiet=true") == 0
    assert same(weights(run), weights(tmp_path / "two"))


def test_a_folder_does_not_decide_what_code_runs(run, tmp_path, capsys):
    """`modules` in a run's configuration allows nothing: whoever resumes it has to type them."""
    again, made = tmp_path / "again", tmp_path / "made"
    shutil.copytree(run, again)
    (again / "metrics.json").unlink()
    (again / "hashes.json").unlink()
    evil = entry("one", tmp_path, network={"_target_": "os.mkdir", "path": str(made)})
    file = write_zoo(tmp_path, evil)
    config = OmegaConf.load(again / "config.yaml")
    config.zoo, config.modules = str(file), ["os"]
    OmegaConf.save(config, again / "config.yaml")
    assert run_main("pretrain", f"resume={again}", "quiet=true") == 2
    assert "calls 'os.mkdir', which is not keepdrop's; if it may run, add modules=[os]" in capsys.readouterr().err
    assert not made.exists()
    assert resuming(RunFolder(again)) == f"resume={again} modules=[os]"
    assert run_main("pretrain", f"resume={again}", "modules=[os]", "quiet=true") == 2
    assert made.exists() and "returned NoneType; expected a nn.Module" in capsys.readouterr().err
    assert run_main("pretrain", f"resume={again}", "modules=[sys]", "quiet=true") == 2
    assert "leave the other overrides out" in capsys.readouterr().err


def test_damaged_files_are_named(run, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "metrics.json").unlink()
    record, seen = (again / "worlds/one" / name for name in ("removed-0.3.round-1.json", "removed-0.3.safetensors"))
    whole = json.loads(record.read_text())
    odd = [{}, {**whole, "rows": [[1.0]]}, {**whole, "rewards": [1.0]}, {**whole, "controls": {}}]
    for text in ("{", "[]", "NaN", *(json.dumps(each) for each in odd)):
        record.write_text(text)
        assert run_main("pretrain", f"resume={again}", "quiet=true") == 2, text
        assert "is damaged; delete it, and this round is tried again there" in capsys.readouterr().err
    record.unlink()
    for content, said in (
        (b"no tensors", "is damaged"),
        ((run / "agent/policy.safetensors").read_bytes(), "is damaged"),
    ):
        seen.write_bytes(content)
        assert run_main("pretrain", f"resume={again}", "quiet=true") == 2
        assert said in capsys.readouterr().err
    shutil.copy(run / "worlds/two/removed-0.3.safetensors", seen)
    assert run_main("pretrain", f"resume={again}", "quiet=true") == 2
    assert "describes another network; delete it" in capsys.readouterr().err
    seen.unlink()
    assert run_main("pretrain", f"resume={again}", "quiet=true") == 0
    assert same(weights(run), weights(again))


def test_families_are_left_out(keepdrop, zoo, tmp_path):
    small = [*SMALL, "training.rounds=1", "training.targets=[0.5]", "run_dir=run"]
    assert keepdrop("pretrain", f"zoo={zoo}", *small, "leave_out=[family one]").code == 0
    assert list(load_agent(tmp_path / "run/agent").facts["networks"]) == ["two"]
    assert not (tmp_path / "run/worlds/one").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["leave_out=[trees]"], "leave_out names 'trees'; expected families of the zoo: family one, family two."),
        (["leave_out=[family one,family two]"], "leave_out names every family of the zoo"),
        (["training.targets=[1.5]"], "training.targets is [1.5]; expected fractions between 0 and 1."),
        (["training.sampling.samples=5"], "training.sampling.samples is 5; expected an even number of 4 or more."),
        (["training.gradient.lr=0"], "above 0"),
        (["workers=0"], "workers"),
    ],
)
def test_what_is_refused(refused, zoo, typed, said):
    assert said in refused("pretrain", f"zoo={zoo}", *SMALL, *typed, "run_dir=run")


def test_untrained_networks_are_named_before_anything_is_written(refused, tmp_path):
    save_weights(small_cnn(widths=(4, 5, 6)), (file := tmp_path / "untrained.safetensors"))
    found = entry("one", tmp_path, checkpoint=file.name)
    said = refused("pretrain", f"zoo={write_zoo(tmp_path, found)}", *SMALL, "run_dir=run")
    assert said.startswith("The network 'one' of the zoo cannot be used: The base network's accuracy")


def test_networks_that_do_not_fit_are_named_before_anything_is_written(refused, tmp_path):
    found = entry("one", tmp_path)
    found["network"] = {**found["network"], "widths": [9, 9, 9]}
    said = refused("pretrain", f"zoo={write_zoo(tmp_path, found)}", *SMALL, "run_dir=run")
    assert said.startswith("The network 'one' of the zoo cannot be used: ")
    assert "zoo" in refused("pretrain", "run_dir=run")


def test_targets_that_no_network_can_meet_end_in_a_sentence(keepdrop, zoo):
    done = keepdrop("pretrain", f"zoo={zoo}", *SMALL, "training.targets=[0.999]", "run_dir=run")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "No network of the zoo can meet any of the targets" in done.err


def test_its_help_says_what_to_give(keepdrop):
    done = keepdrop("pretrain", "--help")
    assert done.code == 0 and "usage: keepdrop pretrain zoo=FILE" in done.out and "leave_out" in done.out
