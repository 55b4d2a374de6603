"""Pages made of run folders: what they say, that nothing slips in unescaped, and that a browser shows them."""

import html
import json
import re
import shutil

import pytest
from keepdrop.experiments.commands.report import write_report
from keepdrop.experiments.reporting.cards import bound_sentence, points, standard_error
from keepdrop.experiments.reporting.cards import change as relative
from keepdrop.experiments.reporting.charts import Axis, Series, line_chart, ranges, span, strip, ticks
from keepdrop.experiments.reporting.markup import Markup, page, table, tag
from keepdrop.experiments.reporting.run_data import original_masks, read_run
from keepdrop.experiments.reporting.run_page import run_page
from keepdrop.experiments.reporting.runs_page import unique_names
from keepdrop.experiments.runs.console import signed
from keepdrop.experiments.runs.folder import RunFolder
from page import BROWSER, Checker, looked_at


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, free to be damaged."""
    shutil.copytree(finished, tmp_path / "a-run")
    return tmp_path / "a-run"


def change(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_children_and_attributes_are_escaped():
    assert tag("p", "<b>&") == "<p>&lt;b&gt;&amp;</p>"
    assert tag("p", Markup("<b>"), title='"<', class_="x") == '<p title="&#34;&lt;" class="x"><b></p>'
    assert tag("a", aria_label="x", hidden=True, open=False, id=None) == '<a aria-label="x" hidden></a>'
    assert "&lt;i&gt;" in table(["<i>"], [["a"]]) and isinstance(table(["a"], []), Markup)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (87.5, 100, [87.5, 90, 92.5, 95, 97.5, 100]), (5, 5, [5])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_span_is_never_empty():
    assert span([]) == (-1.0, 1.0) and span([3.0]) == pytest.approx((2.82, 3.18)) and span([0, 10], 0.1) == (-1, 11)


def test_an_axis_of_accuracies_ends_at_100():
    assert span([98.0, 100.0], most=100) == pytest.approx((97.88, 100.0))
    assert span([100.0, 100.0], most=100) == pytest.approx((94.0, 100.0))


def test_what_rounds_to_zero_has_no_sign():
    assert [signed(-0.001), signed(0.004), signed(-0.04, 1), signed(-0.05), signed(10)] == [
        "0.00", "0.00", "0.0", "-0.05", "+10.00"
    ]  # fmt: skip
    assert points(-1e-6) == "0.00 points" and relative(1000, 999.9) == "0.0 %"


def test_standard_error_of_an_accuracy():
    assert standard_error(0.9, 100) == pytest.approx(0.03) and standard_error(1.0, 397) == 0.0


def test_drop_bound_and_uncertainty_are_in_the_chart(run):
    facts = json.loads((run / "facts.json").read_text())
    n_images = facts["splits"]["reward"]["n_images"]
    checker = Checker(run_page(read_run(run)))
    assert f"one image of {n_images:,} is {100 / n_images:.2f} points" in checker.words()
    assert "points below the base" in checker.words()
    assert sum(each.get("class") == "line bound" for _, each in checker.found) >= 2  # wide, narrow and the legend


def test_a_slash_in_a_layers_name(run):
    (folder,) = run.glob("layers/00-*")
    (run / "layers/00-left").mkdir()
    folder.rename(run / "layers/00-left/conv")
    change(run / "layers/00-left/conv/decision.json", name="left/conv")
    assert read_run(run).layers[0].name == "left/conv" and len(read_run(run).layers) == 2


def test_ranges_join_runs():
    assert ranges([0, 3, 4, 5, 9]) == "0, 3-5, 9" and ranges([]) == "none"


def test_strip_draws_each_filter_once():
    drawn = strip("conv1", [True, False] * 20)
    kept, dropped = re.findall(r'd="([^"]*)" class="(?:kept|dropped)"', drawn)
    assert kept.count("M") == dropped.count("M") == 20
    assert "20 of 40 filters kept: 0, 2, 4" in drawn and 'viewBox="0 0 320 20"' in drawn


def test_line_chart_places_points_by_value():
    chart = line_chart(
        "t", "d", [Series("s", [(0, 0), (10, 1)], "agent")], Axis("x", str, (0, 10)), Axis("y", str, (0, 1))
    )
    assert 'points="64,284 704,14"' in chart  # of the wide drawing: from the lower left to the upper right corner
    assert 'role="img"' in chart and "<title" in chart and "<desc" in chart


def test_every_run_leaves_a_page(finished, cnn):
    assert "keepdrop prune" in (finished / "report.html").read_text()
    assert "keepdrop train-cnn" in (cnn / "report.html").read_text()


def test_page_says_what_the_run_did(finished):
    text = (finished / "report.html").read_text()
    words = Checker(text).words()
    metrics = json.loads((finished / "metrics.json").read_text())
    for name in ("base_accuracy", "pruned_accuracy", "finetuned_accuracy"):
        assert f"{100 * metrics[name]:.2f} %" in words
    assert f"{metrics['base_macs']:,} → {metrics['pruned_macs']:,}" in words
    for group in metrics["groups"]:
        assert f"{group['n_kept']} of {group['n_filters']} kept" in words
    for part in ("L1, not recovered", "random, not recovered", "Learning curve of conv2", "load_pruned(", "torch"):
        assert part in words, part
    assert "drop_bound: 0.2" in words and f"run_dir={finished}" in words


def test_page_needs_no_network_and_every_picture_has_words(finished):
    checked = Checker((finished / "report.html").read_text())
    assert not [a for _, a in checked.found if {"src", "href", "srcset"} & a.keys()]
    assert not re.search(r"https?://|url\(|@import", (finished / "report.html").read_text())
    pictures = [a for name, a in checked.found if name == "svg" and a.get("aria-hidden") != "true"]
    identities = [a["id"] for name, a in checked.found if name in ("title", "desc") and "id" in a]
    assert len(pictures) >= 8 and len(set(identities)) == len(identities) == 2 * len(pictures)
    for picture in pictures:
        assert picture["role"] == "img" and set(picture["aria-labelledby"].split()) <= set(identities)


def test_controls_keep_as_many_and_leave_the_report_split_alone(finished):
    curves = json.loads((finished / "curves.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    assert curves["macs"][-1] == metrics["pruned_macs"] and curves["base_macs"] == metrics["base_macs"]
    assert curves["base_bytes"] == (finished / "base/model.safetensors").stat().st_size
    controls = curves["controls"]
    assert controls["n_images"] == 300 and list(controls["methods"]) == ["agent", "l1", "random"]
    first = json.loads((finished / "layers/00-conv1/decision.json").read_text())
    # The first layer is cut from the dense network either way, so the agent's replayed accuracy is the run's own.
    assert controls["methods"]["agent"][0] == first["pruned_accuracy"]
    assert (
        controls["base_accuracy"] == json.loads((finished / "facts.json").read_text())["base"]["reward_split_accuracy"]
    )


def test_report_rebuilds_the_same_page(run, keepdrop):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    result = keepdrop("report", "a-run")
    assert result.code == 0 and result.out == "Report: a-run/report.html\n"

    def without_counters(text):
        words = Checker(text).words().split("Load the network")[0].replace("a-run", "run")
        # Where the pruned network is the fastest, which the machine decides, its folder is named.
        return re.sub(r'[td]\d+|load_pruned\("[^"]*"', "", words)

    assert without_counters((run / "report.html").read_text()) == without_counters(before)


def test_unfinished_run_gets_what_is_there(run, keepdrop):
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "pruned")
    shutil.rmtree(run / "layers/01-conv2")
    assert keepdrop("report", "a-run").code == 0
    words = Checker((run / "report.html").read_text()).words()
    assert "This run is unfinished: 1 layer decided so far." in words
    assert "Learning curve of conv1" in words and "conv2 kept" not in words and "Load the network" not in words


def test_run_that_has_just_begun(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").write_text("order: forward\nseed: 0\n")
    write_report(RunFolder(tmp_path / "new"))
    assert "nothing decided yet" in (tmp_path / "new/report.html").read_text()


def test_names_are_escaped(run):
    hostile = "<script>alert(1)</script>"
    for file in run.glob("layers/*/decision.json"):
        change(file, name=hostile, decided_by=hostile)
    change(run / "facts.json", command=["keepdrop", "prune", hostile], git=hostile)
    text = run_page(read_run(run))
    assert hostile not in text and html.escape(hostile) in text and text.count("<script>") == 1


def test_comparison_of_two_runs(run, keepdrop, tmp_path):
    shutil.copytree(run, tmp_path / "other/a-run")
    change(tmp_path / "other/a-run/metrics.json", finetuned_accuracy=0.5)
    config = tmp_path / "other/a-run/config.yaml"
    config.write_text(config.read_text().replace("drop_bound: 0.2", "drop_bound: 0.3"))
    result = keepdrop("report", "a-run", "other/a-run", "out=pages/both.html")
    assert result.code == 0 and result.out.splitlines()[-1] == "Report: pages/both.html"
    words = Checker((tmp_path / "pages/both.html").read_text()).words()
    assert "2 runs side by side" in words and "other/a-run" in words and "50.00 %" in words
    assert "drop_bound 0.2 0.3" in words and "conv1" in words
    assert [name.count("/") for name in unique_names([read_run(run), read_run(tmp_path / "other/a-run")])] == [1, 1]


def test_filter_pruned_twice_is_counted_in_the_original(run):
    first = json.loads((run / "layers/00-conv1/decision.json").read_text())
    again = [i > 0 for i in range(first["n_kept"])]
    change(run / "layers/01-conv2/decision.json", name="conv1", keep=again, n_filters=len(again), n_kept=sum(again))
    kept = [i for i, one in enumerate(first["keep"]) if one]
    (run / "pruned/architecture.json").unlink()
    mask = original_masks(read_run(run))["conv1"]
    assert len(mask) == 16 and [i for i, one in enumerate(mask) if one] == kept[1:]


def test_one_agent_for_the_whole_network(run):
    decisions = [json.loads(path.read_text()) for path in sorted(run.glob("layers/*/decision.json"))]
    shutil.rmtree(run / "layers")
    (run / "network/agent").mkdir(parents=True)
    (run / "network/decisions.json").write_text(json.dumps(decisions))
    (run / "network/agent/facts.json").write_text(json.dumps({"reward_curve": [0.5, 0.75]}))
    words = Checker(run_page(read_run(run))).words()
    assert "Learning curve of the whole network Mean reward from 0.500 to 0.750" in words
    assert "recovered after each layer" not in words and "agent, not recovered" in words and "16 kept" in words


@pytest.mark.parametrize(
    ("gave_way", "sentence"),
    [
        (["a"], "The drop bound of 0.02 did not hold at: a."),
        (["a", "b", "c"], "The drop bound of 0.02 did not hold."),
        ([], None),
    ],
)
def test_the_bound_in_one_sentence(gave_way, sentence):
    metrics = {"drop_bound": 0.02, "gave_way": gave_way, "groups": [{}] * 3}
    assert bound_sentence(metrics) == sentence
    told = bound_sentence({**metrics, "target": [{"resource": "latency"}]})
    expected = "Before fine-tuning more than the drop bound of 0.02 was lost: the target said how much goes."
    assert told == (sentence and expected)


def test_run_in_steps(run):
    """`keepdrop iterate` decides no layer by itself: counts and masks come from its result."""
    kept = {layer.name: layer.keep for layer in read_run(run).layers}
    shutil.rmtree(run / "layers")
    steps = [{"step": i, "n_filters": 32 - i, "macs": 100 - 10 * i, "accuracy": 0.9 - i / 100} for i in range(3)]
    (run / "curve.json").write_text(json.dumps({"criterion": "taylor", "base": {"macs": 100}, "points": steps}))
    assert original_masks(read_run(run)) == kept
    words = Checker(run_page(read_run(run))).words()
    assert "From 90.00 % to 88.00 % over 2 steps." in words and "Taylor" in words and "2 30 80.0 88.00" in words
    assert "Figures to print" not in words
    (run / "curve.pdf").write_bytes(b"")
    assert '<a href="curve.pdf">' in run_page(read_run(run)) and "curve.svg" not in run_page(read_run(run))


BAD = [
    ("metrics.json", "{", "metrics.json' is damaged"),
    ("metrics.json", "[]", "holds a list, expected an object"),
    ("metrics.json", '{"base_macs": "many", "pruned_macs": 1}', "does not hold what a run writes"),
    ("metrics.json", '{"latency": [{}]}', "does not hold what a run writes"),
    ("facts.json", "\x00", "facts.json' is damaged"),
    ("config.yaml", "a: [", "config.yaml of 'a-run' cannot be read"),
    ("config.yaml", "- a", "holds no settings"),
    ("layers/00-conv1/decision.json", "{}", "is no decision of a layer"),
    ("pruned/architecture.json", "nope", "architecture.json' is damaged"),
]


@pytest.mark.parametrize(("name", "content", "named"), BAD)
def test_damaged_files(refused, run, name, content, named):
    (run / name).write_text(content)
    assert named in refused("report", "a-run")


def test_contradicting_decision(refused, run):
    change(run / "layers/00-conv1/decision.json", n_kept=1)
    assert "contradicts itself" in refused("report", "a-run")


def test_bad_arguments(refused, run):
    assert refused("report").startswith("report needs the folder of a run")
    assert refused("report", "nowhere").startswith("There is no run folder 'nowhere'")
    assert refused("report", "a-run/layers").startswith("'a-run/layers' is not a keepdrop run folder")
    assert "the same run twice" in refused("report", "a-run", "./a-run")


def test_unknown_control(refused):
    assert refused("prune", "controls=[l7]").startswith("controls has 'l7'; expected any of l1, ")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_it_on_every_screen(run, tmp_path, dark):
    # One more where the fastest way differs between two batch sizes.
    n_codes = (run / "report.html").read_text().count('<div class="copy">')
    for frame in looked_at(run / "report.html", tmp_path, dark):
        assert len(frame["charts"]) == 1 and 0.6 * min(frame["size"], 900) < frame["charts"][0] <= frame["size"], frame
        assert frame["buttons"] == n_codes >= 3


def test_title_and_text_of_a_page_are_escaped():
    hostile = "</title><script>alert('1')</script>"
    text = page(hostile, tag("p", hostile, title=hostile), hostile)
    assert hostile not in text and text.count("<script>") == 1
    assert html.unescape(text).count(hostile) == 4


def test_page_forbids_itself_the_network():
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page("t"))[1]
    assert html.unescape(policy).startswith("default-src 'none';") and "connect-src" not in policy
