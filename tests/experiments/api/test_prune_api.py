import copy
import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import keepdrop as public
import pytest
import torch
from keepdrop import Settings, TrainSettings, UserError, prune
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state, load_checkpoint
from keepdrop.experiments.api.settings import FINETUNE
from keepdrop.experiments.pruning.halving import HalvingSettings
from keepdrop.experiments.pruning.network_search import NetworkSearchSettings
from quick import CALL, QUICK
from torch.utils.data import DataLoader, TensorDataset


def tensors(images):
    return images.batch(torch.arange(len(images)))


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture
def model(checkpoint):
    network = small_cnn()
    load_checkpoint(network, checkpoint)
    return network


@pytest.fixture(scope="module")
def result(data, checkpoint):
    network = small_cnn()
    load_checkpoint(network, checkpoint)
    return prune(network, tensors(data.train), tensors(data.test), **CALL)


def test_the_result_is_a_smaller_network_and_its_facts(result, model, tmp_path):
    assert result.base_macs > result.macs and result.base_params > result.params
    kept = {record.name: record.n_kept for record in result.layers}
    assert kept == {"conv1": result.model.get_submodule("conv1").out_channels, "conv2": result.model.conv2.out_channels}
    assert result.facts()["layers"][0]["name"] == "conv1" and "accuracy" in str(result)
    assert {latency.model for latency in result.latency(batch_sizes=[1], repeats=1)} == {"base", "pruned"}
    result.save(tmp_path / "small")
    loaded = public.load_pruned(tmp_path / "small", small_cnn)
    assert torch.equal(loaded(result.example), result.model(result.example))


def test_accuracies_are_those_of_the_report_images(result, data):
    """The report images are the test images without the 200 that rewards were measured on."""
    from keepdrop.envs.data.splits import split
    from keepdrop.envs.evaluation.mask_evaluator import correct_flags

    report = split(data, reward_from="test", reward_size=200, seed=0).report
    images, labels = tensors(report)
    assert result.accuracy == correct_flags(result.model, images, labels).double().mean().item()
    assert result.base_accuracy == correct_flags(result.dense, images, labels).double().mean().item()


HELD = {
    "dataset": lambda images: TensorDataset(*tensors(images)),
    "loader": lambda images: DataLoader(TensorDataset(*tensors(images)), 32, shuffle=True),
    "numpy": lambda images: tuple(part.numpy() for part in tensors(images)),
    "images": lambda images: images,
}


@pytest.mark.parametrize("form", HELD.values(), ids=HELD)
def test_every_form_of_the_data_gives_the_same_network_and_leaves_the_given_one_alone(form, model, data, result):
    before, mode = hash_state(model), model.training
    again = prune(model, form(data.train), form(data.test), **CALL)
    assert hash_state(again.model) == hash_state(result.model)
    assert hash_state(model) == before and model.training is mode


FORMS = {
    "drop bound": (
        ["layers=[conv1,conv2]", "drop_bound=0.2", "agent.updates=2", "search.masks=4", "search.images=60"],
        {},
    ),
    "MACs target": (
        [
            "target.removed=0.4",
            "network_search.masks=4",
            "network_search.images=60",
            "network_search.repair_images=40",
            "network_search.agent.updates=2",
        ],
        {"macs_removed": 0.4, "layers": None, "drop_bound": 0.02},
    ),
}
SHARED = ["evaluation.statistics_images=100", "latency.repeats=1", "latency.warmup=0", "controls=[]", "quiet=true"]
RECOVER = TrainSettings(epochs=0.3, batch_size=64, top_lr=0.02, distill_weight=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_it_decides_what_the_command_decides(keepdrop, checkpoint, model, data, tmp_path, form):
    """Filter for filter, and to the last bit of the fine-tuned network; recovery and fine-tuning are the same, too."""
    options, changed = FORMS[form]
    if form == "drop bound":
        options = [*options, "evaluation.compensation_images=100"]
    options = [*options, *SHARED, "recovery.train.epochs=0.3", "finetune.epochs=0.5", "seed=3", "run_dir=run"]
    result = keepdrop("prune", f"checkpoint={checkpoint}", *options, "augment=null")
    assert result.code == 0, result.err
    settings = dataclasses.replace(QUICK, reward_from="train", reward_size=300)
    finetune = dataclasses.replace(FINETUNE, epochs=0.5)
    call = CALL | changed | {"settings": settings, "recover": RECOVER, "finetune": finetune, "seed": 3}
    ours = prune(model, data.train, data.test, **call, folder="own")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [group["n_kept"] for group in metrics["groups"]] == [layer.n_kept for layer in ours.layers]
    assert kept_by(tmp_path / "run") == [layer.keep for layer in ours.layers] == kept_by(tmp_path / "own")
    assert metrics["pruned_accuracy"] == ours.pruned_accuracy and metrics["finetuned_accuracy"] == ours.accuracy
    assert metrics["bound_held"] == ours.bound_held
    load_checkpoint(theirs := copy.deepcopy(ours.model), tmp_path / "run/finetune/model.safetensors")
    assert hash_state(theirs) == hash_state(ours.model)


def kept_by(run):
    """Every layer's mask in a run folder."""
    if (run / "network/decisions.json").is_file():
        return [each["keep"] for each in json.loads((run / "network/decisions.json").read_text())]
    return [json.loads(path.read_text())["keep"] for path in sorted(run.glob("layers/*/decision.json"))]


def test_progress_tells_of_updates_layers_and_epochs(model, data):
    told = []
    finetune = TrainSettings(epochs=1, batch_size=64, lr=0.01)
    prune(model, data.train, data.test, **CALL | {"finetune": finetune, "recover": finetune}, progress=told.append)
    stages = [(each.stage, each.name) for each in told]
    layer = lambda name: [("search", name)] * 2 + [("recovery", name), ("layer", name)]  # noqa: E731
    assert stages == [*layer("conv1"), *layer("conv2"), ("finetune", "")]
    assert str(told[3]).startswith("layer conv1 1/2: kept_fraction 0.")


def test_an_interrupted_run_goes_on(model, data, result, tmp_path):
    class StopError(Exception):
        pass

    def stop(progress):
        if progress.name == "conv2":
            raise StopError

    with pytest.raises(StopError):
        prune(model, data.train, data.test, **CALL, folder=tmp_path / "run", progress=stop)
    told = []
    done = prune(model, data.train, data.test, **CALL, folder=tmp_path / "run", progress=told.append)
    assert {each.name for each in told if each.stage == "search"} == {"conv2"}
    assert hash_state(done.model) == hash_state(result.model)
    assert (tmp_path / "run/layers/00-conv1/agent/policy.safetensors").is_file()
    for change in ({"drop_bound": 0.1}, {"seed": 1}, {"settings": Settings(reward_size=100)}):
        with pytest.raises(UserError, match=r"holds another run: its (drop_bound|seed|splits) differs"):
            prune(model, data.train, data.test, **CALL | change, folder=tmp_path / "run")


def test_a_macs_target_is_met_by_one_agent_for_all_layers(model, data, tmp_path):
    network = NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=2))
    call = CALL | {"layers": None, "settings": Settings(reward_size=200, network=network), "macs_removed": 0.4}
    told = []
    result = prune(model, data.train, data.test, **call, folder=tmp_path / "run", progress=told.append)
    assert 0.55 < result.macs / result.base_macs <= 0.6
    assert [each.stage for each in told][:2] == ["search"] * 2 and len(result.layers) == 5
    again = prune(model, data.train, data.test, **call)
    assert hash_state(again.model) == hash_state(result.model)
    result.save(tmp_path / "small")
    assert torch.equal(public.load_pruned(tmp_path / "small", small_cnn)(result.example), result.model(result.example))


def test_a_search_trains_its_best_masks_where_asked(model, data, tmp_path):
    """The progress says how each ended; a run begun without cannot go on with it."""
    rungs = HalvingSettings([3, 2], [4, 12])
    network = NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=1), halving=rungs)
    call = CALL | {"layers": None, "settings": Settings(reward_size=200, network=network), "macs_removed": 0.4}
    told = []
    prune(model, data.train, data.test, **call | {"finetune": None}, folder=tmp_path / "run", progress=told.append)
    trained = [each for each in told if each.stage == "halving"]
    assert [each.done for each in trained] == list(range(1, trained[0].total + 1))
    assert {each.metrics["minibatches"] for each in trained} == {4, 12}
    assert all(each.metrics["trained"] >= each.metrics["repaired"] for each in trained)
    assert "reconstruction" in {each.name for each in trained} and str(trained[0]).startswith("halving ")
    plain = replace(call["settings"], network=replace(network, halving=HalvingSettings()))
    with pytest.raises(UserError, match=r"holds another run: its settings\.network\.halving\.candidates differs"):
        prune(model, data.train, data.test, **call | {"settings": plain, "finetune": None}, folder=tmp_path / "run")


def test_a_folder_of_something_else_is_refused(model, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        prune(model, data.train, data.test, **CALL, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loop_of_ones_own_trains_and_repeats_itself(model, data):
    seen = []

    def loop(network):
        seen.append(network.training)
        with torch.no_grad():
            network.linear.bias.add_(0.01 * torch.randn(10))

    def worse(network):
        torch.nn.init.zeros_(network.linear.weight)

    one, other = (prune(model, data.train, data.test, **CALL | {"recover": worse, "finetune": loop}) for _ in range(2))
    assert seen == [True, True] and not one.model.training
    assert hash_state(one.model) == hash_state(other.model)
    assert one.pruned_accuracy > 0.3, "a loop that does harm between the layers is not kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"images": torch.rand(4, 1, 8, 8)}}, r"train is a dict; expected a map-style dataset"),
        ({"train": (torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9))}, "expected floating images"),
        ({"train": (torch.zeros(9, 1, 8, 8), torch.zeros(9))}, "expected integers from 0"),
        ({"train": (torch.full((9, 1, 8, 8), torch.nan), torch.arange(9))}, "NaN or infinite"),
        ({"test": (torch.zeros(30, 1, 8, 8), torch.arange(30))}, r"must lie in 0\.\.9, got 29"),
        ({"model": small_cnn()}, "chance level"),
        ({"model": small_cnn(in_channels=3)}, "The network fails on images of shape"),
        ({"drop_bound": 2}, "drop_bound"),
        ({"layers": ["conv9"]}, "conv9"),
        ({"macs_removed": 40}, "did you mean 0.4"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"settings": Settings(order="sideways")}, "order is 'sideways'"),
    ],
)
def test_mistakes_are_sentences(change, message, model, data):
    call = {"model": model, "train": data.train, "test": data.test} | CALL | change
    with pytest.raises(UserError, match=message):
        prune(call.pop("model"), call.pop("train"), call.pop("test"), **call)


def test_one_mask_is_no_comparison():
    with pytest.raises(UserError, match="masks is 1; expected 2 or more"):
        Settings(masks=1)


def test_public_names_are_there_and_need_no_hydra():
    code = (
        "import sys, keepdrop; assert 'torch' not in sys.modules; [getattr(keepdrop, name) for name in "
        "keepdrop.__all__]; assert not {'hydra', 'omegaconf', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dir(public) == sorted(public.__all__) and set(public._HOME) == set(public.__all__)
    with pytest.raises(AttributeError, match=r"'JudgeSettings'; it is keepdrop\.EvaluationSettings now"):
        _ = public.JudgeSettings
    with pytest.raises(AttributeError, match=r"no attribute 'shrink'; it has .*AgentSettings"):
        _ = public.shrink
