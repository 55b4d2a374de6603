"""`keepdrop profile` and `keepdrop.profile`, with a clock that knows what a pass costs: nothing here is timed."""

import random
from dataclasses import replace

import keepdrop as package
import pytest
import torch
from gpu_events import note_events
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.cutting import kept_rows
from keepdrop.envs.surgery.cutting import prune as cut
from keepdrop.envs.surgery.latency_meter import LatencyMeter
from keepdrop.envs.surgery.latency_profile import load_profile, save_profile
from keepdrop.errors import UserError
from keepdrop.experiments.deploy import profiling

SMALL = ("samples=6", "batch_sizes=[1,2]", "out=p.json")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Passes that take a millisecond for every parameter of the network, and a list of what was timed."""
    monkeypatch.chdir(tmp_path)
    timed, size = [], {}
    real = profiling.runner

    def runner(model, runtime, inputs):
        run = real(model, "eager", inputs)
        size[run] = sum(each.numel() for each in model.parameters())
        return run

    def turn(run, inputs, device):
        timed.append(size[run])
        return 1e-3 * size[run] * len(inputs)

    monkeypatch.setattr(profiling, "runner", runner)
    monkeypatch.setattr(profiling, "one_turn", turn)
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 0)
    return timed


def test_the_command_measures_writes_and_shows(keepdrop, clock):
    result = keepdrop("profile", *SMALL)
    assert result.code == 0, result.err
    profile = load_profile("p.json")
    assert [(each.runtime, each.batch_size) for each in profile.tables] == [("eager", 1), ("eager", 2)]
    assert all(len(each.samples) == 6 and len(each.checks) == 10 for each in profile.tables)
    parameters = sum(each.numel() for each in small_cnn().parameters())
    assert profile.tables[0].dense_seconds == pytest.approx(1e-3 * parameters)
    assert profile.tables[1].dense_seconds == pytest.approx(2e-3 * parameters)
    assert str(profile.conditions) in result.out and "written: p.json" in result.out
    assert profile.conditions.device in result.out and "thread" in str(profile.conditions)


def test_turns_that_are_far_apart_are_said_of_every_table(keepdrop, clock, monkeypatch):
    """What threads do that wait for each other on a busy machine: some turns take many times as long."""
    chance = random.Random(0)
    monkeypatch.setattr(profiling, "one_turn", lambda *of: chance.choice([1e-3, 1e-3, 9e-3]))
    result = keepdrop("profile", *SMALL)
    assert result.code == 0 and "written: p.json" in result.out
    for size in (1, 2):
        assert f"16 copies; eager, batch {size}, " in result.err
    assert result.err.count("the machine was busy; measure it again when it is not.") == 2


def test_fractions_are_those_of_the_clock(clock):
    model, images = small_cnn(), torch.randn(2, 1, 8, 8)
    profile = package.profile(model, images, samples=5, batch_sizes=(1,), progress=False)
    groups = find_groups(model, images).groups
    assert [name for name, _ in profile.groups] == [group.name for group in groups]
    whole = sum(each.numel() for each in model.parameters())
    for sample in profile.tables[0].samples:
        masks = {group: torch.arange(group.n_filters) < n for group, n in zip(groups, sample.kept, strict=True)}
        left = sum(each.numel() for each in cut(model, masks).parameters())
        assert sample.fraction == sample.low == sample.high == pytest.approx(left / whole)
    assert LatencyMeter(model, groups, profile).whole == pytest.approx(1e-3 * whole)


def test_some_copies_are_without_whole_blocks(clock):
    """Of a profile that knew none (`gone_with`) what was measured counts, and copies without blocks are added."""
    model, images = cifar_resnet(8), torch.randn(1, 3, 8, 8)
    settings = {"batch_sizes": (1,), "progress": False, "out": "p.json"}
    profile = package.profile(model, images, samples=16, **settings)
    assert {name: len(layer.gone_with) for layer in profile.layers if (name := layer.module)}["layer1.0.conv2"] == 1
    table = profile.tables[0]
    without = [each for each in (*table.samples, *table.checks) if 0 in each.kept]
    whole = sum(each.numel() for each in model.parameters())
    groups = find_groups(model, images, whole_blocks=True).groups
    assert len(without) >= 2
    for sample in without:
        masks = {group: torch.arange(group.n_filters) < n for group, n in zip(groups, sample.kept, strict=True)}
        assert sample.fraction == pytest.approx(sum(each.numel() for each in cut(model, masks).parameters()) / whole)
    old = replace(profile, layers=tuple(replace(layer, gone_with=()) for layer in profile.layers))
    save_profile(replace(old, tables=(replace(table, samples=table.samples[:4]),)), "p.json")
    before = len(clock)
    assert package.profile(model, images, samples=16, **settings).layers == profile.layers and len(clock) > before


def test_what_is_there_is_not_measured_again(keepdrop, clock):
    assert keepdrop("profile", *SMALL).code == 0
    before, content = len(clock), load_profile("p.json")
    assert keepdrop("profile", *SMALL).code == 0
    assert len(clock) == before and load_profile("p.json") == content
    assert keepdrop("profile", "samples=8", "batch_sizes=[1,2]", "out=p.json").code == 0
    more = load_profile("p.json")
    assert more.tables[0].samples[:6] == content.tables[0].samples and len(more.tables[0].samples) == 8


def test_ctrl_c_keeps_what_was_measured(keepdrop, clock, monkeypatch):
    usual, left = profiling.one_turn, [60]

    def turn(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(profiling, "one_turn", turn)
    result = keepdrop("profile", *SMALL)
    assert result.code == 130 and "The same command measures the rest: p.json has what is done." in result.err
    kept = load_profile("p.json").tables[0].samples
    assert 0 < len(kept) < 6
    monkeypatch.setattr(profiling, "one_turn", usual)
    assert keepdrop("profile", *SMALL).code == 0
    assert load_profile("p.json").tables[0].samples[: len(kept)] == kept


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("batch_sizes=[]",), "batch_sizes is []; expected at least one number of images"),
        (("batch_sizes=[1,1]",), "batch_sizes is [1, 1]; expected at least one number of images, each one once"),
        (("batch_sizes=[0]",), "batch_sizes is 0; expected a number from 1"),
        (("widths=[0.5,2]",), "widths is [0.5, 2.0]; expected fractions above 0 and up to 1"),
        (("runtimes=[tvm]",), "runtimes has 'tvm'; expected any of eager, compile, onnxruntime"),
        (("widths=[nan]",), "widths is [nan]; expected fractions above 0 and up to 1"),
        (("samples=0",), "samples is 0; expected a number from 1"),
        (("repeats=-1",), "repeats is -1; expected a number from 1"),
        (("threads=0",), "threads is 0; expected a number from 1"),
        (("layers=[nothing]",), "No prunable layer is called 'nothing'"),
        (("input_shape=[3,8,8]",), "does not run on"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_measured(keepdrop, clock, tmp_path, settings, sentence):
    result = keepdrop("profile", *settings)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert clock == [] and list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_refused(keepdrop, clock, tmp_path):
    assert keepdrop("profile", *SMALL).code == 0
    before, content = len(clock), (tmp_path / "p.json").read_bytes()
    other = keepdrop("profile", *SMALL, "network.widths=[8,8]")
    assert other.code == 2 and "'p.json' holds the latency profile of another network" in other.err
    (tmp_path / "p.json").write_bytes(content.replace(b'"n_threads": 1', b'"n_threads": 64'))
    other = keepdrop("profile", *SMALL)
    assert other.code == 2 and "was measured with threads 64, and here it is 1" in other.err
    assert len(clock) == before


def test_copies_are_of_any_width_and_the_same_every_time():
    groups = find_groups(small_cnn(), torch.randn(2, 1, 8, 8)).groups
    copies = profiling.design(groups, 30, seed=0)
    assert copies == profiling.design(groups, 30, seed=0) != profiling.design(groups, 30, seed=1)
    for place, group in enumerate(groups):
        assert all(1 <= copy[place] <= group.n_filters for copy in copies)
    assert all(k % 8 == 0 for copy in copies[1::2] for k in copy)
    assert set(profiling.design(groups[:1], 20, 0, widths=[0.25, 0.5])) == {(4,), (8,)}


def test_turns_alternate_and_short_passes_get_more(monkeypatch):
    order = []
    monkeypatch.setattr(profiling, "one_turn", lambda run, inputs, device: order.append(run) or 1.0)
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 0)
    first, second = (lambda inputs: None), (lambda inputs: None)
    assert profiling.interleaved([first, second], torch.zeros(1), 2) == [[1.0, 1.0]] * 2
    assert order == [second, first, first, second]


def test_the_onnx_file_of_a_pruned_copy_answers_as_it_does():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'onnx')")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra 'onnx')")
    from keepdrop.experiments.deploy.onnx_cutting import CuttableOnnx

    model, images = small_cnn().eval(), torch.randn(2, 1, 8, 8)
    groups = find_groups(model, images).groups
    choices = {group: torch.arange(group.n_filters) % 2 == 0 for group in groups}
    dense = CuttableOnnx(model, images)
    smaller = cut(model, choices)
    session = dense.session(smaller, kept_rows(model, choices))
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session(images)[0]), smaller(images), atol=1e-4)
    assert dense.session(model, kept_rows(model, choices)) is None


def test_on_a_gpu_events_time_a_pass(monkeypatch):
    said = note_events(monkeypatch, lambda device: "stream")
    seconds = profiling.one_turn(lambda inputs: said.append("run"), torch.zeros(1), torch.device("cuda"))
    assert seconds == 4e-3 and said[:5] == ["wait", "stream", "run", "stream", "wait"]


def test_a_figure_on_a_gpu_names_no_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    conditions = profiling.conditions_of(torch.device("cuda"))
    assert str(conditions) == "NVIDIA H200" and conditions.n_threads == 0


def test_a_runtime_that_is_not_there(keepdrop, clock, monkeypatch):
    monkeypatch.setattr("keepdrop.experiments.deploy.runtimes.missing_packages", lambda *names: ["onnxruntime"])
    result = keepdrop("profile", "runtimes=[onnxruntime]")
    assert result.code == 2 and "runtimes has onnxruntime, which needs onnxruntime; install" in result.err
    with pytest.raises(UserError, match="runtimes has onnxruntime"):
        package.profile(small_cnn(), torch.randn(2, 1, 8, 8), runtimes=["onnxruntime"])
