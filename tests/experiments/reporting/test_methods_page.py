"""Pages of `keepdrop compare` and `keepdrop oracle`, made of results that are written by hand."""

import json
import re

import pytest
from keepdrop.experiments.compare.tables import versus_agent
from keepdrop.experiments.oracle.correlations import correlation_rows
from keepdrop.experiments.reporting.methods_page import best
from keepdrop.experiments.reporting.run_data import read_run
from keepdrop.experiments.reporting.run_page import run_page
from page import BROWSER, Checker, looked_at

# What each method reaches at 30 and 60 % removed, seed by seed.
ACCURACIES = {
    "agent": {0.3: [0.92, 0.90], 0.6: [0.85, 0.83]},
    "l1-uniform": {0.3: [0.90, 0.89], 0.6: [0.70, 0.71]},
    "fpgm-uniform": {0.3: [0.88, 0.88], 0.6: [0.75, 0.76]},
    "l1-at-agent": {0.3: [0.91, 0.90], 0.6: [0.84, 0.83]},
    "l1-global": {0.3: [0.2, 0.2], 0.6: [0.1, 0.1]},
    "random-uniform": {0.3: [0.8, 0.82], 0.6: [0.6, 0.5]},
}


def spread(values):
    mean = sum(values) / len(values)
    return {"mean": mean, "std": abs(values[0] - values[1]) / 2**0.5, "values": values}


def compare_metrics(targets=(0.3, 0.6)):
    """As `keepdrop compare` writes them."""
    rows = [
        {
            "method": method,
            "removed": removed,
            "compensate": True,
            "seeds": [0, 1],
            "macs_removed": removed,
            "network_macs": 1000 * (1 - removed),
            "network_params": 10,
            "n_kept": [{"conv1": 4, "conv2": 7}, {"conv1": 4, "conv2": 8}],
            "choice_seconds": 2.5,
            "mask_evaluations": [30, 30],
            "stages": {"zero": {"report": spread(reached[removed]), "reward": spread(reached[removed])}},
        }
        for method, reached in ACCURACIES.items()
        for removed in targets
    ]
    return {
        "base_accuracy": 0.95,
        "base_macs": 1000,
        "layers": {"conv1": 8, "conv2": 16},
        "targets_of": "network",
        "stages": ["zero"],
        "rows": rows,
        "agent_minus_others": versus_agent(rows, "zero"),
        "skipped": [{"job": "<b>peer</b>", "reason": "ValueError: no"}],
    }


def oracle_metrics():
    """As `keepdrop oracle` writes them."""
    losses = {"conv1": [0.1, 0.4, 0.2, -0.3], "conv2": [0.5, 0.1, 0.2, 0.05]}
    layers = {
        name: {
            "loss_change": loss,
            "accuracy_change": [-each for each in loss],
            "scores": {"agent": [abs(each) for each in loss], "apoz": [-abs(each) for each in loss]},
        }
        for name, loss in losses.items()
    }
    return {"base_accuracy": 0.9, "n_images": 300, "layers": layers, "correlations": correlation_rows(layers)}


def run_of(folder, command, metrics):
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    facts = {"command": ["keepdrop", command, "checkpoint=x.pt"], "versions": {"torch": "2.0"}, "seed": 0}
    for name, content in {"facts.json": facts, "metrics.json": metrics}.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return read_run(folder)


def test_comparison(tmp_path):
    text = run_page(run_of(tmp_path / "run", "compare", compare_metrics()))
    words = Checker(text).words()
    assert "Lead at 30 % removed +1.50 points agent 91.00 %, l1-uniform 89.50 %" in words
    assert "Lead at 60 % removed +8.50 points agent 84.00 %, fpgm-uniform 75.50 %" in words
    assert "l1-at-agent 90.50 ± 0.71 83.50 ± 0.71" in words
    assert "agent ends at 84.00 %" in words and "conv2 16 7.5 (7 to 8) 7.5 (7 to 8)" in words
    assert "keepdrop compare checkpoint=x.pt" in words and "torch 2.0" in words
    assert "<b>peer</b>" in words and "<b>peer</b>" not in text
    # The agent, the best other at the highest target and random are told apart; the rest is one entry.
    key = re.search(r'<ul class="legend">(.*?)</ul>', text)[1]
    assert re.findall(r"([^<>]+)</li>", key) == [
        "agent",
        "fpgm-uniform",
        "random-uniform",
        "3 more (some may lie below)",
    ]


def test_lead_is_over_those_that_know_nothing_of_the_agent():
    rows = [row for row in compare_metrics()["rows"] if row["removed"] == 0.3]
    assert best(rows, "zero")["method"] == "l1-uniform"
    assert best(rows, "zero", follows=True)["method"] == "l1-at-agent"
    assert best(rows[:1], "zero") is None


def test_broken_methods_do_not_flatten_the_plot(tmp_path):
    """The axis ends below the methods in colour (random falls to 50 %), not at the 10 % of one that broke."""
    text = run_page(run_of(tmp_path / "run", "compare", compare_metrics()))
    chart = text[text.index("chart wide") :]
    numbers = [float(each) for each in re.findall(r'class="number end">(\d+)<', chart[: chart.index("</svg>")])]
    assert min(numbers) >= 40
    heights = [float(y) for line in re.findall(r'points="([^"]*)" class="line faint"', chart) for _, y in [
        pair.split(",") for pair in line.split()]]  # fmt: skip
    assert max(heights) > 330  # drawn outside, where the clip path hides it


def test_one_target_is_a_ranking(tmp_path):
    words = Checker(run_page(run_of(tmp_path / "run", "compare", compare_metrics((0.6,))))).words()
    order = ["agent", "l1-at-agent", "fpgm-uniform", "l1-uniform", "random-uniform", "l1-global"]
    places = [words.index(f"{name} {name} {100 * sum(ACCURACIES[name][0.6]) / 2:.2f} ") for name in order]
    assert places == sorted(places) and "on a scale from" in words


def test_comparison_of_an_earlier_version(tmp_path):
    """It does not say how wide the layers are."""
    metrics = compare_metrics()
    del metrics["layers"]
    words = Checker(run_page(run_of(tmp_path / "run", "compare", metrics))).words()
    assert "conv2 7.5 (7 to 8)" in words and "Bars are" not in words


def test_page_says_why_there_is_no_p_value(tmp_path):
    metrics = compare_metrics() | {"no_p_values": "scipy is not installed, so there are no p-values"}
    words = Checker(run_page(run_of(tmp_path / "run", "compare", metrics))).words()
    assert "scipy is not installed, so there are no p-values. Over methods that know nothing" in words


def test_unfinished(tmp_path):
    run = run_of(tmp_path / "run", "compare", None)
    (tmp_path / "run/choices/agent").mkdir(parents=True)
    choice = {"facts": {"reward_curve": [0.5, 0.75]}}
    (tmp_path / "run/choices/agent/0.5-compensated-seed3.json").write_text(json.dumps(choice))
    words = Checker(run_page(read_run(run.path))).words()
    assert "unfinished: 1 agent trained so far" in words and "with compensation, seed 3" in words
    assert "This run is unfinished" in run_page(run_of(tmp_path / "other", "oracle", None))


def test_oracle(tmp_path):
    words = Checker(run_page(run_of(tmp_path / "run", "oracle", oracle_metrics()))).words()
    assert "8 filters, each removed alone, on 300 images" in words and "agent foresees best" in words
    minus = "\N{MINUS SIGN}"
    assert f"agent agent 1.00 1.00 apoz apoz -1.00 {minus}1.00" in words  # name, picture and figure of each bar
    assert "agent 1.00 1.00 1.00 1.00 apoz" in words and "with the accuracy lost" in words


@pytest.mark.parametrize("command", ["compare", "oracle"])
def test_metrics_of_something_else(refused, tmp_path, command):
    run_of(tmp_path / "run", command, {"rows": [], "skipped": [], "layers": 3})
    assert "does not hold what a run writes" in refused("report", "run")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_both(tmp_path, dark):
    for command, metrics, charts in (("compare", compare_metrics(), 1), ("oracle", oracle_metrics(), 0)):
        (tmp_path / f"{command}.html").write_text(run_page(run_of(tmp_path / command, command, metrics)))
        for frame in looked_at(tmp_path / f"{command}.html", tmp_path, dark):
            assert len(frame["charts"]) == charts and frame["buttons"] == 1
