"""The commands on digits with a tiny budget: what they write, that it loads, and that the same seed gives the same."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.experiments.commands.results import report_accuracy
from keepdrop.experiments.config.build import build_splits
from omegaconf import OmegaConf

METRICS = {
    "base_accuracy",
    "pruned_accuracy",
    "finetuned_accuracy",
    "base_macs",
    "pruned_macs",
    "base_params",
    "pruned_params",
    "search_seconds",
    "finetune_seconds",
    "groups",
}


def read(path):
    return json.loads(path.read_text())


def test_run_folder_holds_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "facts.json", "hashes.json", "curves.json", "metrics.json", "report.md", "report.html"),
        *("base", "layers", "finetune", "pruned", "tensorboard"),
    }
    for layer in ("00-conv1", "01-conv2"):
        files = {
            str(path.relative_to(finished / "layers" / layer)) for path in (finished / "layers" / layer).rglob("*")
        }
        agent = {"agent", "agent/facts.json", "agent/policy.safetensors"}
        assert files == agent | {"decision.json", "network.safetensors", "recovery.json"}
    facts = read(finished / "facts.json")
    assert facts["command"][:2] == ["keepdrop", "prune"] and facts["seed"] == 0
    assert {"torch", "keepdrop", "python"} <= facts["versions"].keys() and "git" in facts
    assert [len(facts["splits"][role]["sha256"]) for role in ("fit", "reward", "report")] == [64, 64, 64]
    assert OmegaConf.load(finished / "config.yaml").agent.updates == 2


def test_metrics(finished):
    metrics = read(finished / "metrics.json")
    assert metrics.keys() >= METRICS
    assert all(0 <= metrics[name] <= 1 for name in METRICS if name.endswith("accuracy"))
    assert [group["name"] for group in metrics["groups"]] == ["conv1", "conv2"]
    decided = [read(path)["keep"] for path in sorted(finished.glob("layers/*/decision.json"))]
    assert [group["n_kept"] for group in metrics["groups"]] == [sum(keep) for keep in decided]
    assert [group["n_filters"] for group in metrics["groups"]] == [len(keep) for keep in decided] == [16, 16]
    assert metrics["pruned_macs"] < metrics["base_macs"] and metrics["pruned_params"] < metrics["base_params"]
    assert "| conv1 | 16 |" in (finished / "report.md").read_text()


def test_agent_says_where_it_comes_from(finished):
    facts = read(finished / "layers/00-conv1/agent/facts.json")
    assert facts["group"] == "conv1" and facts["n_filters"] == 16 and len(facts["reward_curve"]) == 2
    assert facts["command"][:2] == ["keepdrop", "prune"]
    assert facts["reward_split_hash"] == read(finished / "facts.json")["splits"]["reward"]["sha256"]
    assert facts["base_hash"] == read(finished / "facts.json")["base"]["sha256"]


def test_tensorboard_has_every_curve(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for word in ("reward_mean", "psi", "phi", "accuracy", "kept_fraction", "entropy", "gradient_norm"):
        for layer in ("conv1", "conv2"):
            assert any(tag.startswith(f"agent/{layer}/") and word in tag for tag in tags), (layer, word, tags)


def test_saved_network_loads_in_a_fresh_process(finished, tmp_path):
    """Only `load_pruned` and the run folder are needed; the accuracy is the reported one, to the image."""
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from keepdrop.envs.files.pruned_network import load_pruned\n"
        "from keepdrop.envs.data.sources import digits\n"
        "from keepdrop.envs.evaluation.mask_evaluator import count_correct\n"
        "model = load_pruned(sys.argv[1])\n"
        "correct, total = count_correct(model, digits().test)\n"
        "print(correct / total, 'torch_pruning' in sys.modules, 'hydra' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(finished / "pruned")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert float(out[0]) == read(finished / "metrics.json")["finetuned_accuracy"]
    assert out[1:] == ["False", "False"]


def test_report_split_is_what_the_config_says(finished):
    config = OmegaConf.load(finished / "config.yaml")
    accuracy = report_accuracy(load_pruned(finished / "pruned"), build_splits(config))
    assert accuracy == read(finished / "metrics.json")["finetuned_accuracy"]


def test_same_seed_same_bits(finished, keepdrop, tiny_base, outcome):
    assert keepdrop("prune", *tiny_base, "run_dir=again", "quiet=true").code == 0
    assert outcome("again") == outcome(finished)


def test_finished_run_is_shown_again(finished, keepdrop):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = keepdrop("prune", f"resume={finished}")
    assert result.code == 0 and "accuracy, fine-tuned" in result.out and str(finished) in result.out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_sweep_makes_a_folder_a_job(keepdrop, tiny, checkpoint, outcome):
    short = [*tiny, "finetune.epochs=0", "recovery.train.epochs=0", f"checkpoint={checkpoint}", "quiet=true"]
    assert keepdrop("prune", "-m", "seed=0,1", *short, "run_dir=sweep").code == 0
    runs = ["sweep/0", "sweep/1"]
    assert [OmegaConf.load(f"{run}/config.yaml").seed for run in runs] == [0, 1]
    assert outcome(runs[0])[1] != outcome(runs[1])[1]
    assert keepdrop("prune", "seed=1", *short, "run_dir=single").code == 0
    assert outcome(runs[1]) == outcome("single")


def test_train_cnn_then_prune(cnn, keepdrop, tiny):
    metrics = read(cnn / "metrics.json")
    assert metrics["n_report"] == 449 and metrics["n_reward"] == 300
    command = ["prune", *tiny, f"checkpoint={cnn}/model.safetensors", "run_dir=run", "quiet=true"]
    assert keepdrop(*command).code == 0
    assert read(Path("run/metrics.json"))["base_accuracy"] == metrics["report_accuracy"]
    assert not Path("run/base").exists()


@pytest.mark.parametrize("reward", ["budget", "priced"])
def test_other_rewards_and_the_papers_policy(keepdrop, tiny, checkpoint, reward):
    settings = [*tiny, "layers=[conv2]", "finetune.epochs=0", "recovery.train.epochs=0"]
    assert keepdrop("prune", *settings, f"reward={reward}", "policy=layer_matrix", f"checkpoint={checkpoint}").code == 0


SEARCH = ["agent.updates=2", "search.masks=4", "search.images=60", "drop_bound=0.2", "quiet=true"]


def test_agents_are_trained_and_applied(keepdrop, checkpoint, tmp_path):
    """train-agent for two layers, then apply on another checkpoint, with l1 and random at equal counts beside it."""
    trained = ["train-agent", "-m", "layer=conv1,conv2", f"checkpoint={checkpoint}", *SEARCH, "run_dir=agents"]
    assert keepdrop(*trained).code == 0
    assert {read(path)["group"] for path in tmp_path.glob("agents/*/layers/*/agent/facts.json")} == {"conv1", "conv2"}
    other = ["train-cnn", "seed=5", "base.epochs=2", "base.lr=0.05", "run_dir=other", "quiet=true"]
    assert keepdrop(*other).code == 0
    command = [
        "apply",
        "agents=agents",
        "checkpoint=other/model.safetensors",
        "finetune.epochs=0.3",
        "recovery.train.epochs=0",
        "run_dir=applied",
    ]
    result = keepdrop(*command)
    assert result.code == 0, result.err
    metrics = read(tmp_path / "applied/metrics.json")
    assert list(metrics["methods"]) == ["agent", "l1", "random"]
    counts = [[group["n_kept"] for group in row["groups"]] for row in metrics["methods"].values()]
    assert counts[0] == counts[1] == counts[2] and sum(counts[0]) < 32
    assert metrics["base_accuracy"] == read(tmp_path / "other/metrics.json")["report_accuracy"]
    assert all(row["finetuned_accuracy"] is not None for row in metrics["methods"].values())
    config = OmegaConf.load(tmp_path / "applied/config.yaml")
    trained = OmegaConf.load(tmp_path / "agents/0/config.yaml")
    assert (
        config.finetune.epochs == 0.3 and config.recovery.train.epochs == 0 and config.evaluation == trained.evaluation
    )
    assert keepdrop("apply", "resume=applied").code == 0


def test_warm_start_goes_on_from_the_saved_agent(finished, keepdrop, checkpoint, tmp_path):
    from safetensors.torch import load_file

    command = ["train-agent", "layer=conv1", f"checkpoint={checkpoint}", *SEARCH]
    still = ["agent.updates=0", f"warm_start={finished}", "run_dir=still"]
    assert keepdrop(*command, *still).code == 0
    weights = "layers/00-conv1/agent/policy.safetensors"
    saved, unchanged = load_file(finished / weights), load_file(tmp_path / "still" / weights)
    assert all((saved[name] == unchanged[name]).all() for name in saved)
    assert keepdrop(*command, f"warm_start={finished}", "run_dir=further").code == 0
    further = load_file(tmp_path / "further" / weights)
    assert any((saved[name] != further[name]).any() for name in saved)


def wait_for(process, condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


def test_ctrl_c_says_how_to_go_on(spawn, tiny_base, tmp_path):
    process = spawn("prune", *tiny_base, "agent.updates=1000", "agent.patience=null", "run_dir=run", cwd=tmp_path)
    wait_for(process, (tmp_path / "run/layers/00-conv1.partial").is_dir, "the first search")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("keepdrop: stopped. Continue with: keepdrop prune resume=run")
    assert "Traceback" not in err


MOMENTS = {
    "base training": "base-snapshot.pt",
    "first search": "layers/00-conv1.partial",
    "recovery": "layers/01-conv2.partial/agent/facts.json",
    "fine-tuning": "finetune-snapshot.pt",
    "saving": "pruned.partial",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_ends_the_same(spawn, keepdrop, tmp_path, uninterrupted, outcome, moment):
    settings, whole = uninterrupted
    process = spawn("prune", *settings, "run_dir=run", cwd=tmp_path)
    wait_for(process, (tmp_path / "run" / MOMENTS[moment]).exists, moment)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/metrics.json").exists()
    result = keepdrop("prune", "resume=run", "quiet=true")
    assert result.code == 0, result.err
    assert outcome("run") == outcome(whole)
    assert not list((tmp_path / "run").rglob("*.partial")) and not list((tmp_path / "run").rglob("*snapshot*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_base, spawn):
    """Settings long enough to be hit in the middle of everything, and a run of them that nothing interrupted."""
    settings = [*tiny_base, "base.epochs=3", "agent.updates=4", "recovery.train.epochs=3", "finetune.epochs=4"]
    folder = tmp_path_factory.mktemp("whole")
    process = spawn("prune", *settings, "run_dir=run", cwd=folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return settings, folder / "run"


@pytest.mark.slow
def test_killed_between_the_last_two_files(keepdrop, finished, tmp_path, outcome):
    """Everything is there but metrics.json: the result is written once more, over what is there."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    assert keepdrop("prune", "resume=run", "quiet=true").code == 0
    assert outcome("run") == outcome(finished)
