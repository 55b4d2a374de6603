"""`keepdrop iterate` on digits: each step by hand where that is possible, the whole job as a user sees it."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.evaluation.mask_evaluator import count_correct
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.errors import UserError
from keepdrop.experiments.iterate.steps import Allowed, Goal, IterateSettings, ranking, removal, train_and_score
from keepdrop.experiments.training.loop import TrainSettings

SMALL = [
    "layers=[conv2,conv3]",
    "step=6",
    "minibatches=2",
    "target.removed=0.2",
    "finetune.epochs=0.3",
    "latency.repeats=1",
    "latency.warmup=0",
    "quiet=true",
]


def read(path):
    return json.loads(Path(path).read_text())


def settings(criterion="taylor", step=3, macs_weight=0.0):
    return IterateSettings(criterion, step, 2, macs_weight, TrainSettings(batch_size=32, lr=0.01))


@pytest.fixture(scope="module")
def network():
    """An untrained chain, its groups and its cost."""
    torch.manual_seed(0)
    model = small_cnn(widths=(4, 6)).eval()
    example = torch.zeros(1, 1, 8, 8)
    return model, find_groups(model, example).groups, count_cost(model, example), example


SCORES = {"conv1": torch.tensor([3.0, 0.0, 4.0, 0.0]), "conv2": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.1])}


def test_filters_are_ranked_by_normalised_scores(network):
    model, groups, cost, _ = network
    # conv1 becomes 0.6, 0, 0.8, 0; conv2 about 0.995, 0, 0, 0, 0, 0.0995
    expected = [(0, 1), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (0, 0), (0, 2), (1, 0)]
    assert ranking(model, cost, groups, SCORES, settings()) == expected


def test_costly_filters_go_first_with_a_macs_weight(network):
    model, groups, cost, _ = network
    order = ranking(model, cost, groups, SCORES, settings(macs_weight=1.0))
    # By hand: a filter of conv1 is read by conv2 too. 8 x 8 x 9 x (1 + 6) MACs against 8 x 8 x 9 x 4 of conv2's, and
    # conv2's are read by the linear layer: whatever those are, conv1's zeros come first, and conv2's filter 5, at
    # 0.0995 above its zeros, stays behind them.
    assert order[:2] == [(0, 1), (0, 3)] and order.index((1, 5)) > order.index((1, 4))
    share = 8 * 8 * 9 * 7 / cost.macs
    assert cost.modules["conv1"].macs == 8 * 8 * 9 * 4 and share > 0.1
    unweighted = ranking(model, cost, groups, SCORES, settings())
    assert unweighted.index((0, 0)) > unweighted.index((1, 5))
    assert ranking(model, cost, groups, SCORES, settings(macs_weight=8.0))[:4] == [(0, 1), (0, 3), (0, 0), (0, 2)]


def test_a_step_takes_as_many_as_asked_and_never_the_last(network):
    model, groups, cost, example = network
    goal = Goal(0.99, "macs", None)
    masks = removal(model, groups, SCORES, settings(step=3), goal, cost, example)
    assert {group.name: keep.tolist() for group, keep in masks.items()} == {
        "conv1": [True, False, True, False],
        "conv2": [True, False, True, True, True, True],
    }
    masks = removal(model, groups, SCORES, settings(step=50), goal, cost, example)
    assert {group.name: int(keep.sum()) for group, keep in masks.items()} == {"conv1": 1, "conv2": 1}


def test_limits_hold_in_every_step(network):
    """conv1 may have 4 or 2 filters, conv2 6 or 3; conv1's filter 3 stays, though it is worth nothing."""
    model, groups, cost, example = network
    allowed = Allowed({"conv1": [2, 4], "conv2": [3, 6]}, {"conv1": {3}})
    goal = Goal(0.99, "macs", None)
    one = removal(model, groups, SCORES, settings(step=1), goal, cost, example, allowed)
    # Filter 1 of conv1 comes first, but waits for a second one; conv2 has three of its own before that.
    assert {group.name: keep.tolist() for group, keep in one.items()} == {
        "conv2": [True, False, False, False, True, True]
    }
    everything = removal(model, groups, SCORES, settings(step=50), goal, cost, example, allowed)
    assert {group.name: keep.tolist() for group, keep in everything.items()} == {
        "conv1": [False, False, True, True],
        "conv2": [True, False, False, False, True, True],
    }


def test_the_last_step_stops_at_the_goal(network):
    model, groups, cost, example = network
    masks = removal(model, groups, SCORES, settings(step=50), Goal(0.3, "params", None), cost, example)
    from keepdrop.envs.surgery.cutting import prune

    after = count_cost(prune(model, masks), example).params
    assert after <= 0.7 * cost.params
    gone = sum(int((~keep).sum()) for keep in masks.values())
    fewer = removal(model, groups, SCORES, settings(step=gone - 1), Goal(0.99, "macs", None), cost, example)
    assert count_cost(prune(model, fewer), example).params > 0.7 * cost.params


def test_training_and_scores_are_repeatable_and_what_was_asked(network):
    import copy

    model, groups, _, _ = network
    data = digits().train
    found = [train_and_score(copy.deepcopy(model), groups, data, settings("taylor"), seed) for seed in (1, 1, 2)]
    for name in ("conv1", "conv2"):
        assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])
        assert bool((found[0][name] >= 0).all())
    trained = copy.deepcopy(model)
    l1 = train_and_score(trained, groups, data, settings("l1"), 1)
    assert torch.allclose(l1["conv2"], trained.get_submodule("conv2").weight.detach().abs().sum((1, 2, 3)).double())


@pytest.fixture(scope="module")
def iterated(tmp_path_factory, checkpoint):
    """Run folder of a small `keepdrop iterate`."""
    from command_line import run_main

    folder = tmp_path_factory.mktemp("iterated") / "run"
    assert run_main("iterate", *SMALL, f"checkpoint={checkpoint}", f"run_dir={folder}") == 0
    return folder


def test_curve_and_result(iterated):
    curve, metrics = read(iterated / "curve.json"), read(iterated / "metrics.json")
    points = curve["points"]
    assert points[0]["macs"] == curve["base"]["macs"] and points[-1]["macs"] <= 0.8 * curve["base"]["macs"]
    assert points[-2]["macs"] > 0.8 * curve["base"]["macs"]
    assert [a["n_filters"] - b["n_filters"] for a, b in itertools.pairwise(points)][:-1] == [6] * (len(points) - 2)
    lines = (iterated / "curve.csv").read_text().splitlines()
    assert lines[0] == "step,n_filters,macs,params,accuracy" and len(lines) == len(points) + 1
    assert metrics["pruned_macs"] == points[-1]["macs"]
    assert [group["n_kept"] for group in metrics["groups"]] == [len(each) for each in points[-1]["left"].values()]
    model = load_pruned(iterated / "pruned")
    correct, total = count_correct(model, digits().test)
    assert correct / total == metrics["finetuned_accuracy"]
    assert count_cost(model, torch.zeros(1, 1, 8, 8)).macs == metrics["pruned_macs"]


def test_pruned_file_says_what_was_kept(iterated):
    architecture = read(iterated / "pruned/architecture.json")
    left = read(iterated / "curve.json")["points"][-1]["left"]
    assert architecture["kept"]["conv2"]["out"] == left["conv2"] == architecture["kept"]["conv3"]["in"]


def weights(run):
    return [(run / name).read_bytes() for name in ("pruned/model.safetensors", "finetune/model.safetensors")]


def test_lost_steps_are_done_again_to_the_bit(iterated, keepdrop, tmp_path):
    import shutil

    shutil.copytree(iterated, tmp_path / "run")
    run = tmp_path / "run"
    for name in ("metrics.json", "finetune", "pruned", sorted((run / "steps").iterdir())[-1]):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert keepdrop("iterate", "resume=run", "quiet=true").code == 0
    assert weights(run) == weights(iterated)
    curves = [read(each / "curve.json") for each in (run, iterated)]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_killed_and_resumed_ends_the_same(spawn, keepdrop, tmp_path, checkpoint, iterated):
    process = spawn("iterate", *SMALL, f"checkpoint={checkpoint}", "run_dir=run", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/steps/0001").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert keepdrop("iterate", "resume=run", "quiet=true").code == 0
    assert weights(tmp_path / "run") == weights(iterated)


def test_surgery_limits(keepdrop, checkpoint):
    """Multiples of 8 in every step, protected filters to the end, and a word where the target cannot be met."""
    limits = ["surgery.round_to=8", "surgery.min_kept=0.5", "surgery.protect={conv3:[0,31]}", "target.removed=0.9"]
    command = ["iterate", *SMALL[:3], "finetune.epochs=0", *limits, f"checkpoint={checkpoint}", "run_dir=run"]
    result = keepdrop(*command, "latency.repeats=1", "--quiet")
    assert result.code == 0 and "90 % of the macs cannot be removed" in result.out + result.err
    points = read("run/curve.json")["points"]
    assert [{len(kept) for kept in point["left"].values()} for point in points][-1] == {8, 16}
    for point in points:
        assert all(len(kept) % 8 == 0 for kept in point["left"].values())
        assert {0, 31} <= set(point["left"]["conv3"])


def test_bound_gives_the_last_network_within_it(keepdrop, checkpoint):
    options = ["target.removed=null", "drop_bound=0.05", "step=12", "minibatches=1", "finetune.epochs=0"]
    chosen = [each for each in SMALL if each.split("=")[0] not in [option.split("=")[0] for option in options]]
    assert keepdrop("iterate", *chosen, *options, f"checkpoint={checkpoint}", "run_dir=run").code == 0
    points, metrics = read("run/curve.json")["points"], read("run/metrics.json")
    base = read("run/curve.json")["base"]["accuracy"]
    assert all(base - point["accuracy"] <= 0.05 + 1e-9 for point in points)
    assert metrics["bound_held"] and metrics["pruned_macs"] == points[-1]["macs"]
    last = read(sorted(Path("run/steps").glob("*/step.json"))[-1])
    everything_gone = last["n_filters"] == 2
    assert everything_gone or base - last["accuracy"] > 0.05


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["criterion=l3"], "criterion is 'l3'; expected one of l1, l2, fpgm, mean_activation, apoz, taylor,"),
        (["step=0"], "step is 0; expected a number from 1 to "),
        (["minibatches=0"], "minibatches is 0; expected a number from 1 to "),
        (["macs_weight=-1"], "macs_weight is -1; expected a number from 0 to "),
        (["target.removed=50"], "target.removed is 50; expected a fraction between 0 and 1, or null."),
        (["target.resource=time"], "target.resource is 'time'; expected one of macs, params."),
        (["surgery.round_to=64"], "Under surgery.round_to=64, min_kept=1 and protect no chosen layer can lose"),
        (["surgery.protect={conv2:[99]}"], "surgery.protect names filter 99 of 'conv2', which has 16 filters;"),
        (["layers=[conv9]"], "No prunable layer is called 'conv9'"),
    ],
)
def test_mistakes(refused, checkpoint, overrides, sentence):
    assert refused("iterate", f"checkpoint={checkpoint}", *overrides).startswith(sentence)


def test_settings_refuse_nonsense():
    with pytest.raises(UserError, match="expected one of macs, params"):
        Goal(0.5, "filters", None)
