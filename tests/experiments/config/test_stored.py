"""A run folder may come from anybody: what its config.yaml names is not run unless the user typed it."""

import os
import pickle
import shutil
import sys

import pytest
import torch
from keepdrop.errors import UserError
from keepdrop.experiments.config.stored import check_targets, inherit, offered_targets
from omegaconf import OmegaConf

MARK = "executed"
MODULE = f"""
from pathlib import Path
Path("{MARK}").write_text("ran")

def network(*args, **kwargs):
    return None
"""


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def touch(target, **more):
    return {"_target_": target, "_args_": [f"touch {MARK}"], **more}


PYTHON = f"open({MARK!r}, 'w')"
DIGITS = {"_target_": "keepdrop.envs.data.sources.digits"}
SMALL = {"_target_": "keepdrop.envs.networks.built_in.small_cnn"}
HOSTILE = {
    "os.system": {"network": touch("os.system")},
    "posix.system": {"network": touch("posix.system")},
    "subprocess.Popen": {"network": {"_target_": "subprocess.Popen", "args": ["touch", MARK]}},
    "eval": {"data": {"_target_": "builtins.eval", "_args_": [PYTHON]}},
    "exec": {"metric": {"_target_": "builtins.exec", "_args_": [PYTHON]}},
    "torch.load": {"network": {"_target_": "torch.load", "f": "bomb.pt", "weights_only": False}},
    "pickle.loads": {"loss": {"_target_": "pickle.loads", "_args_": [{"_target_": "builtins.bytes"}]}},
    "import_module": {"augment": {"_target_": "importlib.import_module", "name": "run.evil"}},
    "a name that walks to os": {"network": touch("keepdrop.envs.data.sources.os.system")},
    "a name that begins like ours": {"network": touch("keepdrop.envs.networks.built_in.small_cnn.__globals__")},
    "ours but not offered": {"data": {"_target_": "keepdrop.atomic.write_atomically", "path": MARK, "content": "x"}},
    "a module in the run folder": {"network": {"_target_": "run.evil.network"}},
    "a module beside it": {"network": {"_target_": "evil.network"}},
    "below an argument": {"data": {**DIGITS, "transform": touch("os.system")}},
    "in a list": {"network": {**SMALL, "widths": [4, [touch("os.system")]]}},
    "in the arguments": {"network": {**SMALL, "_args_": [10, touch("os.system")]}},
    "a partial": {"metric": touch("os.system", _partial_=True)},
    "not recursive": {"network": {**SMALL, "_recursive_": False, "n_classes": touch("os.system")}},
    "no text": {"network": {"_target_": ["os", "system"]}},
    "by interpolation": {"network": {"_target_": "${data.name}"}, "data": {**DIGITS, "name": "os.system"}},
    "by a resolver": {"network": {"_target_": "${oc.decode:os.system}"}},
    "by a defaults list": {"data": {"defaults": [{"/network@hydra.callbacks.x": "custom"}], **DIGITS}},
    "as a setting": {"evaluation": {"compensate": touch("os.system")}},
}


@pytest.fixture(scope="module")
def applied(finished, checkpoint, tmp_path_factory):
    """A run of `keepdrop apply`, stopped before it was finished."""
    from command_line import run_main

    folder = tmp_path_factory.mktemp("applied") / "run"
    quick = ["controls=[]", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
    assert run_main("apply", f"agents={finished}", f"checkpoint={checkpoint}", f"run_dir={folder}", *quick) == 0
    (folder / "metrics.json").unlink()
    return folder


@pytest.fixture
def handed_over(tmp_path, finished, applied):
    """Writes the run that somebody handed over, with some of its settings changed, and what it would run."""

    def write(changed, source=finished):
        shutil.copytree(source, tmp_path / "run")
        for place in (tmp_path / "evil.py", tmp_path / "run/evil.py"):
            place.write_text(MODULE)
        torch.save(Bomb(), tmp_path / "bomb.pt", pickle_module=pickle)
        for file in ("metrics.json", "hashes.json"):  # who changes the one can change the other
            (tmp_path / "run" / file).unlink(missing_ok=True)
        config = OmegaConf.to_container(OmegaConf.load(tmp_path / "run/config.yaml"))
        (tmp_path / "run/config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config | changed)))

    return write


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_targets_are_refused_and_nothing_runs(refused, handed_over, checkpoint, tmp_path, kind):
    handed_over(HOSTILE[kind])
    for command in (("apply", "agents=run", f"checkpoint={checkpoint}"), ("prune", "resume=run")):
        sentence = refused(*command)
        assert "config.yaml of 'run'" in sentence, sentence
        assert not (tmp_path / MARK).exists() and not {"evil", "run.evil"} & set(sys.modules)


@pytest.mark.parametrize("kind", ["os.system", "in a list", "a module beside it"])
def test_so_are_those_of_a_resumed_apply(refused, handed_over, applied, tmp_path, kind):
    handed_over(HOSTILE[kind], applied)
    assert "is not keepdrop's own and would run" in refused("apply", "resume=run")
    assert not (tmp_path / MARK).exists()


def test_the_sentence_says_what_to_type():
    stored = {"network": {"_target_": "mine.network", "parts": [{"_target_": "mine.part"}]}}
    with pytest.raises(
        UserError, match=r"if you trust it, type network\._target_=mine\.network in this command too\.$"
    ):
        check_targets(stored, {}, "run")
    with pytest.raises(UserError, match=r"'mine\.part' as network\.parts\.0\._target_.*give network anew\.$"):
        check_targets(stored, {"network._target_": "mine.network"}, "run")
    with pytest.raises(UserError, match="type network"):
        check_targets({"network": {"_target_": "mine.network"}}, {"network._target_": "mine.other"}, "run")
    check_targets({"network": {"_target_": "mine.network"}}, {"network._target_": "mine.network"}, "run")


def test_all_that_conf_offers_is_keepdrops_own():
    assert len(offered_targets()) > 15 and all(target.startswith("keepdrop.") for target in offered_targets())


OWN = """
from keepdrop.envs.networks.built_in import small_cnn
from torch import nn

def network(n_classes=10, in_channels=1, widths=(16, 16, 32, 32, 64)):
    return small_cnn(n_classes, in_channels, widths)

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)
"""


def test_ones_own_targets_run_when_typed_again(keepdrop, checkpoint, tiny, tmp_path):
    """Prune with a network and a loss of one's own, stop, resume, apply: each command is told to run them."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    own = [f"network._target_={name}.network", f"loss._target_={name}.loss"]
    quick = ["controls=[]", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
    given = [*tiny, *quick, "loss=custom", f"checkpoint={checkpoint}", "run_dir=run", *own]
    result = keepdrop("prune", *given)
    assert result.code == 0, result.err
    (tmp_path / "run/metrics.json").unlink()

    refusal = keepdrop("prune", "resume=run")
    assert refusal.code == 2 and f"type network._target_={name}.network in this command too" in refusal.err
    refusal = keepdrop("prune", "resume=run", own[0], "loss._target_=os.system")
    assert refusal.code == 2 and "but loss._target_=os.system came with it" in refusal.err
    assert keepdrop("prune", "resume=run", *own).code == 0

    command = ["apply", "agents=run", f"checkpoint={checkpoint}", "run_dir=applied", *quick]
    refusal = keepdrop(*command, own[0])
    assert refusal.code == 2 and f"type loss._target_={name}.loss in this command too" in refusal.err
    assert not (tmp_path / "applied").exists()
    result = keepdrop(*command, *own)
    assert result.code == 0, result.err


def test_another_option_needs_no_trust_in_the_stored_one(keepdrop, handed_over, checkpoint):
    handed_over({"data": {"_target_": "os.system"}, "loss": {"_target_": "os.system"}})
    chosen = ["data=digits", "loss=null", "controls=[]", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
    result = keepdrop("apply", "agents=run", f"checkpoint={checkpoint}", "run_dir=applied", *chosen)
    assert result.code == 0, result.err


def test_a_sweep_over_agents_composes_each_run(keepdrop, handed_over, finished, checkpoint, tmp_path):
    handed_over({"drop_bound": 0.123})
    quick = ["controls=[]", "finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]
    result = keepdrop("apply", "-m", f"agents={finished},run", f"checkpoint={checkpoint}", "run_dir=sweep", *quick)
    assert result.code == 0, result.err
    bounds = [OmegaConf.load(tmp_path / f"sweep/{job}/config.yaml").drop_bound for job in (0, 1)]
    assert bounds == [0.2, 0.123]


@pytest.mark.parametrize("broken", ["data: [", "- a list", "drop_bound: much", "network: 3", "surgery: {edge: 1}"])
def test_a_broken_configuration_is_a_sentence(tmp_path, broken):
    (tmp_path / "config.yaml").write_text(broken)
    with pytest.raises(UserError, match=r"config\.yaml of "):
        inherit(tmp_path)
    inherit(None)


@pytest.mark.parametrize("module", ["torch", "numpy", "yaml", "jinja2", "hydra_plugins.evil"])
def test_modules_in_a_run_folder_are_not_imported(spawn, finished, tmp_path, module):
    """`cd RUN; keepdrop report .` must not import RUN's torch.py, nor a plugin for Hydra."""
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(MODULE)
    process = spawn("report", ".", cwd=tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert not (tmp_path / "run" / MARK).exists()


def test_ones_own_module_does_not_take_the_place_of_an_installed_one(spawn, tmp_path):
    for name in ("torch", "mine"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    process = spawn("inspect", "network=custom", "network._target_=torch.nn.Identity", cwd=tmp_path)
    process.communicate(timeout=120)
    assert not (tmp_path / MARK).exists()
    process = spawn("inspect", "network=custom", "network._target_=mine.network", cwd=tmp_path)
    assert "network._target_=mine.network returned NoneType" in process.communicate(timeout=120)[1]
    assert (tmp_path / MARK).exists()
