"""`keepdrop compare` on digits with a tiny budget, and the arithmetic of its tables."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import run_main
from keepdrop.envs.evaluation.dense_baseline import measure_baseline
from keepdrop.envs.surgery.meters import removed
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import EvaluationSettings, PruningTask
from keepdrop.errors import UserError
from keepdrop.experiments.compare.methods import (
    CriterionMethod,
    Observations,
    check_masks,
    meter_of,
    method_names,
)
from keepdrop.experiments.compare.plan import Job
from keepdrop.experiments.compare.plot import lowest_shown
from keepdrop.experiments.compare.tables import grids, paired_p, versus_agent
from keepdrop.experiments.runs.folder import RunFolder
from page import Checker

SMALL = [
    "layers=[conv2,conv3]",
    "targets.removed=[0.5]",
    "seeds=[0,1]",
    "random_seeds=3",
    "evaluation.statistics_images=60",
    "repair.images=40",
    "repair.places=4",
    "network_search.masks=4",
    "network_search.images=60",
    "network_search.agent.updates=2",
    "bn_images=100",
    "finetune.epochs=0.3",
    "workers=1",
    "quiet=true",
]
METHODS = "methods=[agent,l1-uniform,taylor-global,fpgm-at-agent,random-uniform,random-best]"


def read(path):
    return json.loads(Path(path).read_text())


def _without(*names):
    """`SMALL` without settings, or all of a part: what would do nothing is refused."""
    return [each for each in SMALL if each.split("=")[0].split(".")[0] not in names]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, checkpoint):
    """Run folder of a small comparison at all stages."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    assert run_main("compare", *SMALL, METHODS, f"checkpoint={checkpoint}", f"run_dir={folder}") == 0
    return folder


def test_every_cell_is_there(compared):
    metrics = read(compared / "metrics.json")
    cells = {(row["method"], row["compensate"]): row for row in metrics["rows"]}
    assert len(cells) == len(metrics["rows"]) == 12 and metrics["skipped"] == []
    for (method, _), row in cells.items():
        assert row["seeds"] == ([0, 1, 2] if method == "random-uniform" else [0, 1])
        assert 0.5 <= row["macs_removed"] < 0.6, method
        assert list(row["stages"]) == ["zero", "bn", "one", "full"]
        for found in row["stages"].values():
            assert len(found["report"]["values"]) == len(row["seeds"])
    for compensate in (False, True):
        agent = cells["agent", compensate]
        assert cells["fpgm-at-agent", compensate]["n_kept"] == agent["n_kept"]
        assert cells["random-best", compensate]["mask_evaluations"] == agent["mask_evaluations"]
    assert cells["l1-uniform", False]["stages"]["zero"] != cells["l1-uniform", True]["stages"]["zero"]


def test_tables_agree_with_the_metrics(compared):
    metrics = read(compared / "metrics.json")
    lines = list(csv.DictReader((compared / "table.csv").read_text().splitlines()))
    assert len(lines) == 12 * 4
    row = next(row for row in metrics["rows"] if row["method"] == "random-uniform" and row["compensate"])
    line = next(
        line
        for line in lines
        if (line["method"], line["compensate"], line["stage"]) == ("random-uniform", "True", "full")
    )
    values = row["stages"]["full"]["report"]["values"]
    assert float(line["report_mean"]) == pytest.approx(sum(values) / 3) and line["n_seeds"] == "3"
    std = torch.tensor(values, dtype=torch.float64).std().item()
    assert float(line["report_std"]) == pytest.approx(std)
    report = (compared / "report.md").read_text()
    assert "## After the full schedule, with compensation" in report
    assert f"| random-uniform | {100 * sum(values) / 3:.2f} +- {100 * std:.2f} |" in report


def test_page_holds_the_tables(compared):
    words = Checker((compared / "report.html").read_text()).words()
    for grid in grids(read(compared / "metrics.json")):
        assert grid.title in words
        for row in grid.rows:
            assert " ".join(row).replace("+-", "±") in words
    assert "50 % removed, with compensation, seed 1" in words and "finetune.epochs=0.3" in words


def test_one_epoch_and_full_schedule_share_cut_and_seed(compared):
    """0.3 epochs are less than one, so both stages train alike and must end alike, bit by bit."""
    for row in read(compared / "metrics.json")["rows"]:
        assert row["stages"]["one"] == row["stages"]["full"]


def test_plots_where_matplotlib_is(compared):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'plots')")
    picture = (compared / "accuracy-zero.svg").read_text()
    assert "<svg" in picture and "random-best" in picture
    assert (compared / "accuracy-zero.pdf").read_bytes().startswith(b"%PDF")
    assert 'href="accuracy-zero.pdf"' in (compared / "report.html").read_text()


def test_interrupted_comparison_goes_on(compared, keepdrop, tmp_path, checkpoint):
    """What is missing is done again, the same to the bit; what is there is left alone."""
    shutil.copytree(compared, tmp_path / "run")
    before = read(compared / "metrics.json")
    (tmp_path / "run/metrics.json").unlink()
    lost = sorted((tmp_path / "run/results").rglob("*.json"))[::9]
    lost += sorted((tmp_path / "run/choices").rglob("*.json"))[::5]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/results").rglob("*.json")}
    assert keepdrop("compare", "resume=run", "quiet=true").code == 0
    after = read(tmp_path / "run/metrics.json")
    for metrics in (before, after):
        for row in metrics["rows"]:
            row.pop("choice_seconds")
    assert after == before
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(compared, keepdrop, tmp_path, checkpoint):
    chosen = [each for each in SMALL if each != "workers=1"]
    command = ["compare", *chosen, METHODS, f"checkpoint={checkpoint}", "workers=2", "run_dir=run"]
    assert keepdrop(*command).code == 0
    first, second = (read(folder / "metrics.json")["rows"] for folder in (compared, tmp_path / "run"))
    assert [row["stages"] for row in first] == [row["stages"] for row in second]


@pytest.mark.slow
def test_killed_comparison_ends_the_same(spawn, keepdrop, tmp_path, checkpoint, compared):
    process = spawn("compare", *SMALL, METHODS, f"checkpoint={checkpoint}", "run_dir=run", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/choices/agent/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert keepdrop("compare", "resume=run", "quiet=true").code == 0
    first, second = (read(folder / "metrics.json")["rows"] for folder in (compared, tmp_path / "run"))
    assert [row["stages"] for row in first] == [row["stages"] for row in second]


def test_without_extras(keepdrop, checkpoint, monkeypatch):
    """Each optional library that is missing is named once, and the rest is done."""
    import importlib.util

    real = importlib.util.find_spec
    absent = ("torch_pruning", "matplotlib", "scipy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    chosen = _without("bn_images", "finetune", "random_seeds", "quiet")
    command = ["methods=[agent,torch-pruning,bn_scale-global]", "stages=[zero]", f"checkpoint={checkpoint}"]
    result = keepdrop("compare", *chosen, *command, "run_dir=run")
    assert result.code == 0, result.err
    for extra in ("peers", "plots", "stats"):
        assert result.out.count(f"pip install keepdrop[{extra}]") == 1, extra
    metrics = read("run/metrics.json")
    assert [row["method"] for row in metrics["rows"]] == ["agent"] * 2 + ["bn_scale-global"] * 2
    assert [gap["p_value"] for gap in metrics["agent_minus_others"]] == [None, None]
    assert "scipy is not installed, so there are no p-values" in Checker(Path("run/report.html").read_text()).words()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["methods=[taylr-global]"],
            "methods has 'taylr-global', which names no method; did you mean 'taylor-global'?",
        ),
        (["methods=[l1-at-agent]"], "methods has 'l1-at-agent' but not 'agent', whose counts it follows; add agent."),
        (["methods=[]"], "methods is empty; expected a list of one or more different values."),
        (["seeds=[1,1]"], "seeds names 1 twice; expected a list of one or more different values."),
        (["seeds=[-1]"], "seeds is -1; expected a number from 0 to 9,223,372,036,854,775,807."),
        (["stages=[zero,two]"], "stages has 'two'; expected any of zero, bn, one, full."),
        (["targets.removed=[50]"], "A target of 50 was given; expected a fraction between 0 and 1; did you mean 0.5?"),
        (["targets.of=layers"], "targets.of is 'layers'; expected one of groups, network."),
        (["layers=[conv2]", "targets.removed=[0.99]"], "99 % of the MACs cannot be removed: with one filter per layer"),
        (["workers=0"], "workers is 0; expected a number from 1 to 1,024."),
        (["bn_images=1"], "bn_images is 1; expected 2 or more."),
        (["random_best.evaluations=0"], "random_best.evaluations is 0; expected a number from 1 to 1,000,000."),
        (["repair.ridge=0"], "The reconstruction has images="),
    ],
)
def test_mistakes(refused, checkpoint, overrides, sentence):
    assert refused("compare", f"checkpoint={checkpoint}", *overrides).startswith(sentence)


@pytest.fixture(scope="module")
def task(checkpoint):
    """A pruning task on digits."""
    from keepdrop.envs.data.sources import digits
    from keepdrop.envs.data.splits import split
    from keepdrop.envs.networks.built_in import small_cnn
    from keepdrop.envs.networks.checkpoint import load_checkpoint

    model = small_cnn()
    load_checkpoint(model, checkpoint)
    splits = split(digits(), reward_from="train", reward_size=100, seed=0)
    settings = EvaluationSettings(statistics_images=60)
    return PruningTask(model.eval(), splits, base=measure_baseline(model.eval(), splits), settings=settings)


def test_uniform_and_global_keep_what_they_say(task):
    observations = Observations()
    masks = {
        how: CriterionMethod("l1", how, observations).choose(task, Target(0.5), 0) for how in ("uniform", "global")
    }
    fractions = [float(mask.float().mean()) for mask in masks["uniform"].values()]
    assert max(fractions) - min(fractions) <= 1 / 16
    scores = {name: seen["weights"].abs().sum(1) for name, seen in observations.of(task).items()}
    shares = {name: score / score.square().sum().sqrt() for name, score in scores.items()}
    kept = torch.cat([shares[name][mask] for name, mask in masks["global"].items()])
    # Of each layer's dropped filters none outranks a kept one of any layer, but for the one each layer must keep.
    dropped = torch.cat([shares[name][~mask] for name, mask in masks["global"].items()])
    assert kept.sort().values[len(masks["global"])] >= dropped.max() - 1e-6


def test_a_wide_layer_is_not_despised_by_its_mean(task):
    """Equal scores in all layers: by l2 norm the widest layers go first, by mean none does."""
    observations = Observations()
    seen = observations.of(task)
    for each in seen.values():
        each["weights"] = torch.ones_like(each["weights"]) + 1e-3 * torch.rand_like(each["weights"])
    fractions = {}
    for how in ("global", "global-mean"):
        masks = CriterionMethod("l1", how, observations).choose(task, Target(0.3), 0)
        fractions[how] = [float(mask.float().mean()) for mask in masks.values()]
    assert fractions["global"][-1] < 0.1 and fractions["global"][0] == 1.0
    assert min(fractions["global-mean"]) > 0.3


def test_torch_pruning_is_one_more_method(keepdrop, checkpoint):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra 'peers')")
    command = ["methods=[torch-pruning,l1-uniform]", "stages=[zero]", "seeds=[0]", f"checkpoint={checkpoint}"]
    chosen = _without("bn_images", "finetune", "random_seeds", "network_search")
    assert keepdrop("compare", *chosen, *command, "run_dir=run").code == 0
    metrics = read("run/metrics.json")
    assert [row["method"] for row in metrics["rows"]] == ["l1-uniform"] * 2 + ["torch-pruning"] * 2
    assert all(0.5 <= row["macs_removed"] < 0.6 for row in metrics["rows"]) and metrics["skipped"] == []


@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_pruning_chooses_what_it_would_cut(task, global_pruning):
    """Its masks lead to the widths that its own surgery leaves."""
    torch_pruning = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra 'peers')")
    import copy
    import warnings

    from keepdrop.experiments.compare.torch_pruning import TorchPruning

    peer = TorchPruning(global_pruning)
    masks = peer.choose(task, Target(0.5), 0)
    assert 0.5 <= removed(meter_of(task, Target(0.5)), [int(mask.sum()) for mask in masks.values()]) < 0.6
    model = copy.deepcopy(task.model).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.GroupNormPruner(
            model,
            task.example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=peer.facts["pruning_ratio"],
            global_pruning=global_pruning,
            ignored_layers=[module for module in model.modules() if isinstance(module, torch.nn.Linear)],
        )
        pruner.step()
    for group in task.groups:
        module = model.get_submodule(group.name)
        assert int(masks[group.name].sum()) == module.out_channels


def test_masks_are_checked(task):
    whole = {group.name: torch.ones(group.n_filters, dtype=torch.bool) for group in task.groups}
    assert check_masks("x", task, Target(0.5), whole) == 0.0
    with pytest.raises(UserError, match="Method 'x' gave nothing for 'conv1'; expected a bool mask of 16 filters"):
        check_masks("x", task, Target(0.5), {})
    with pytest.raises(UserError, match="that keeps at least one"):
        check_masks("x", task, Target(0.5), whole | {"conv2": torch.zeros(16, dtype=torch.bool)})


def row(method, values, seeds=(0, 1, 2)):
    report = {"mean": sum(values) / len(values), "std": None, "values": values}
    stages = {"zero": {"report": report, "reward": report}}
    return {"method": method, "removed": 0.5, "compensate": True, "seeds": list(seeds), "stages": stages}


def test_paired_test_over_common_seeds():
    pytest.importorskip("scipy", reason="scipy is not installed (extra 'stats')")
    rows = [row("agent", [0.5, 0.6, 0.7]), row("other", [0.4, 0.5, 0.5], seeds=(2, 0, 1))]
    (found,) = versus_agent(rows, "zero")
    assert found["seeds"] == [0, 1, 2] and found["method"] == "other"
    assert found["difference"]["values"] == pytest.approx([0.0, 0.1, 0.3])
    # t = mean / (std / sqrt 3) = 0.1333 / 0.0882 = 1.512; two-sided p with 2 degrees of freedom
    assert found["p_value"] == pytest.approx(0.2697, abs=1e-3)


def test_no_spread_no_p_value():
    assert paired_p([0.1]) is None and paired_p([0.1, 0.1, 0.1]) is None


def test_missing_cells_are_dashes():
    metrics = {"rows": [row("a", [0.5]), row("b", [0.25]) | {"removed": 0.7}], "stages": ["zero"]}
    (grid,) = grids(metrics)
    assert grid.header == ["method", "50 % removed", "70 % removed"]
    assert grid.rows == [["a", "50.00", "-"], ["b", "-", "25.00"]]


def test_jobs_have_files_of_their_own(tmp_path):
    jobs = {Job(m, r, c, s) for m in method_names() for r in (0.3, 0.35) for c in (False, True) for s in (0, 10)}
    assert len({job.key for job in jobs}) == len(jobs)
    RunFolder(tmp_path).write_json(f"choices/{next(iter(jobs)).key}.json", {})


def test_a_criterion_that_cannot_judge_a_layer_is_left_out(keepdrop, tmp_path, monkeypatch, checkpoint):
    def refused(*_, **__):
        raise UserError("The criterion 'reconstruction' cannot judge 'conv2': it is odd.")

    monkeypatch.setattr("keepdrop.experiments.compare.methods.reconstruction_scores", refused)
    two = "methods=[l1-uniform,reconstruction]"
    asked = [*_without("network_search", "random_seeds", "finetune", "bn_images"), "stages=[zero]"]
    asked.append(f"checkpoint={checkpoint}")
    result = keepdrop("compare", *asked, two, "compensate=[true]", "run_dir=run")
    line = "reconstruction (2 jobs): left out, The criterion 'reconstruction' cannot judge 'conv2': it is odd"
    assert result.code == 0 and f"warning: {line}" in " ".join((result.out + result.err).split()), result
    metrics = read(tmp_path / "run/metrics.json")
    assert {row["method"] for row in metrics["rows"]} == {"l1-uniform"} and len(metrics["skipped"]) == 2
    assert f"{line}.\n" in (tmp_path / "run/report.md").read_text()
    monkeypatch.setattr("keepdrop.experiments.config.prepare.check_readable", refused)
    alone = keepdrop("compare", *asked, "methods=[reconstruction]", "compensate=[true]", "run_dir=alone")
    assert alone.code == 2 and "cannot judge 'conv2'" in alone.err and not (tmp_path / "alone").exists()


def test_networks_that_a_cut_broke_do_not_squeeze_the_figure():
    def metrics(*values):
        rows = [{"stages": {"zero": {"report": {"values": [value]}}}} for value in values]
        return {"base_accuracy": 0.9, "rows": rows}

    assert lowest_shown(metrics(0.88, 0.86, 0.84), "zero") == pytest.approx(84 - 0.08 * 6 - 0.1)
    assert lowest_shown(metrics(0.88, 0.86, 0.10), "zero") == pytest.approx(86 - 3 * 4)
    assert lowest_shown(metrics(0.91, 0.92), "zero") == pytest.approx(89.9)
