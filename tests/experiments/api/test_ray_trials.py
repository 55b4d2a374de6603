"""Ray Tune: settings of the search space arrive, and a trial that failed goes on from its checkpoint."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.tune", reason="ray is not installed (extra 'ray')")
from digits_task import trained
from keepdrop import Settings, TrainSettings, UserError
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.data.sources import digits
from keepdrop.experiments.api.ray_trials import arguments_of, trainable
from keepdrop.experiments.pruning.network_search import NetworkSearchSettings

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray's and Tune's own
]
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def started(ray_folder):
    from keepdrop.experiments.engines.ray_cluster import import_ray

    ray = import_ray()
    ray.init(address="local", num_cpus=2, object_store_memory=150_000_000, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_configuration_becomes_arguments():
    fixed = {"finetune": TrainSettings(epochs=7, batch_size=8), "drop_bound": 0.1}
    config = {"macs_removed": 0.5, "drop_bound": 0.2, "finetune.epochs": 3, "settings.network.agent.updates": 4}
    found = arguments_of(config, fixed)
    assert found["macs_removed"] == 0.5 and found["drop_bound"] == 0.2
    assert (found["finetune"].epochs, found["finetune"].batch_size) == (3, 8)
    assert found["settings"].network.agent.updates == 4 and found["settings"].reward_size is None
    for key, said in (("macs", "is no setting"), ("folder", "is no setting"), ("finetune.epoch", "TrainSettings has")):
        with pytest.raises(UserError, match=said):
            arguments_of({key: 1}, {})
    with pytest.raises(UserError, match="'model' is no setting"):
        arguments_of({}, {"model": None})


def small():
    network = NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=3))
    return {"settings": Settings(reward_size=100, network=network), "finetune": TrainSettings(epochs=0)}


def test_settings_arrive_and_a_trial_that_failed_goes_on(started, tmp_path):
    """The trial at 0.6 fails once, after its second update; searched again from the start it would fail forever."""
    from ray import tune

    data, seen = digits(), tmp_path / "seen"
    seen.mkdir()

    def fail_once(step):
        place = seen / f"{step.stage}-{step.done:g}"
        if step.stage == "search" and step.total == 3:
            with place.open("a") as file:
                file.write("x")
            if step.done == 2 and len(place.read_text()) == 1:
                raise RuntimeError("once")

    prune = trainable(trained()[0], data.train, data.test, every=1, batch_size=2, progress=fail_once, **small())
    run = tune.RunConfig(
        name="trials",
        storage_path=str(tmp_path / "stored"),
        failure_config=tune.FailureConfig(max_failures=1, fail_fast=False),
        verbose=0,
    )
    space = {"macs_removed": tune.grid_search([0.3, 0.6]), "finetune.epochs": 0}
    serial = tune.TuneConfig(max_concurrent_trials=1)
    found = tune.Tuner(prune, param_space=space, run_config=run, tune_config=serial).fit()
    assert not found.errors
    left = {each.metrics["config"]["macs_removed"]: each.metrics["macs_fraction"] for each in found}
    assert left[0.3] > left[0.6] and left[0.3] <= 0.7 and left[0.6] <= 0.4
    for each in found:
        assert 0 < each.metrics["accuracy"] <= 1 and each.metrics["milliseconds"] > 0
        assert (Path(each.checkpoint.path) / "asked.json").is_file()
    # First trial: updates 1, 2 (fails), then from its last checkpoint; the other one 1, 2, 3.
    counts = [len((seen / f"search-{done}").read_text()) for done in (1, 2, 3)]
    assert counts[0] == 2 and counts[2] == 2, counts
    again = tune.Tuner.restore(str(tmp_path / "stored/trials"), prune).fit()
    assert {each.metrics["macs_fraction"] for each in again} == set(left.values())


def test_the_example_finds_the_front(started, tmp_path, monkeypatch, capsys):
    from ray import tune

    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'plots')")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("ray_tune_front")
    trials = [{"macs_fraction": macs, "accuracy": score} for macs, score in ((0.5, 0.9), (0.3, 0.8), (0.6, 0.85))]
    assert module.front(trials) == [trials[1], trials[0]]
    module.draw(trials, tmp_path / "front.png")
    space = {"macs_removed": tune.grid_search([0.3, 0.6]), "settings.network.agent.updates": 1, "finetune.epochs": 0}
    found = module.main(space, storage=str(tmp_path / "tuned"), epochs=2)
    assert found and found[-1]["accuracy"] > 0.8
    assert all(each["macs_fraction"] <= 1 - each["config"]["macs_removed"] for each in found)
    assert "of the MACs" in capsys.readouterr().out
    assert (tmp_path / "tuned/front.png").read_bytes() != (tmp_path / "front.png").read_bytes()
    assert list((tmp_path / "tuned/front").glob("prune_*"))
    for name in ("quickstart", "ray_tune_front"):
        sys.modules.pop(name)
