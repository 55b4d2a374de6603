"""Every example runs, small."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def example(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["quickstart", "plain_pytorch"])
def test_pruning_with_keepdrops_and_with_ones_own_training(name):
    result = example(name).main(updates=2, epochs=3)
    assert result.macs < result.base_macs and result.base_accuracy > 0.8
    assert result.accuracy > 0.8


def test_own_loop_was_what_trained():
    """One epoch of AdamW leaves other weights than keepdrop's SGD, and the loop's own seed repeats them."""
    module = example("plain_pytorch")
    calls = []
    original = module.fine_tune
    module.fine_tune = lambda *arguments, **named: (calls.append(named), original(*arguments, **named))
    module.main(updates=1, epochs=2)
    assert calls[-1] == {"epochs": 2} and 2 <= len(calls) <= 3


def test_detector_pruned_and_trained_in_its_own_loop(capsys, tmp_path):
    result, again = example("detection").main(
        images=160, epochs=12, updates=1, tuning=3, layers=["stage4*", "lateral4"]
    )
    assert result.macs < 0.97 * result.base_macs and result.base_accuracy > 0.1 and result.accuracy > 0.1
    assert {each.name for each in result.layers} == {"stage4.0.0", "stage4.1.0", "lateral4"}
    assert result.metric == "MeanAveragePrecision(decode=decode, iou=0.5)"
    printed = capsys.readouterr().out
    for name, value in (("dense", result.base_accuracy), ("cut", result.pruned_accuracy), ("tuned", result.accuracy)):
        assert f"mAP at 0.5, {name}: {value:.3f}" in printed
    assert type(again).__name__ == "Detector" and (tmp_path / "detector.pt").is_file()
    assert torch.equal(again(result.example), result.model(result.example))


@pytest.fixture
def torchvision_beside_any_torch():
    """torchmetrics, which Lightning imports, imports torchvision where it is installed."""
    spec = importlib.util.spec_from_file_location("coverage_script", EXAMPLES.parent / "benchmarks" / "coverage.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if importlib.util.find_spec("torchvision") is not None:
        script.import_torchvision()


def test_lightning(torchvision_beside_any_torch):
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed (extra 'lightning')")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own: few workers, few batches, deprecations in its imports
        result = example("lightning_finetune").main(updates=2, epochs=3)
    assert result.macs < result.base_macs and result.accuracy > 0.8


def test_stable_baselines3():
    pytest.importorskip("stable_baselines3")
    action, reward, terminated, info = example("stable_baselines3_ppo").main(steps=64, epochs=3, n_steps=16)
    assert terminated and action.shape == (16,) and set(action.tolist()) <= {0, 1} and action.any()
    assert info["kept_fraction"] == action.mean() and reward < 1.0


def test_environment_passes_the_checker_of_stable_baselines3():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    module = example("stable_baselines3_ppo")
    data = module.digits()
    splits = module.split(data, reward_from="test", reward_size=100, seed=0)
    env = module.gymnasium.make(
        module.ENV, model=module.trained(data, 2), splits=splits, reward=module.TryAndLearn(0.02), group="conv2"
    )
    check_env(env.unwrapped, warn=False)
