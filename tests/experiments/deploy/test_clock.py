"""Which measured times a run goes by, when it needs them, and what is refused."""

import random
from dataclasses import replace

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.latency_profile import save_profile
from keepdrop.envs.surgery.limits import Limits
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.deploy import profiling
from keepdrop.experiments.deploy.clock import (
    PROFILE,
    ClockSettings,
    find_clock,
    keep_profile,
    keeping_times,
    kept_profile,
    read_clock,
    resolved,
)
from stepped_meter import stepped_profile

EXAMPLE, CPU = torch.zeros(1, 1, 8, 8), torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return small_cnn().eval()


@pytest.fixture(scope="module")
def profile(network):
    return stepped_profile(network, EXAMPLE)


def clock_for(network, source=None, *, timed=False, limits=None):
    return find_clock(network, EXAMPLE, ClockSettings(), source, timed=timed, limits=limits or Limits())


def test_nothing_is_read_or_measured_where_nothing_goes_by_time(network):
    assert clock_for(network, "nowhere.json") is None


def test_the_meter_predicts_what_was_measured(network, profile, tmp_path):
    save_profile(profile, tmp_path / "device.json")
    clock = clock_for(network, tmp_path / "device.json", timed=True)
    groups = find_groups(network, EXAMPLE).groups
    meter = clock(network, groups)
    assert meter.whole == profile.tables[0].dense_seconds and "eager, batch 1" in clock.conditions
    sample = profile.tables[0].samples[3]
    assert meter.cost(sample.kept) == pytest.approx(sample.fraction * meter.whole, rel=0.1)
    some = clock(network, groups[1:3])
    assert some.groups == tuple(groups[1:3]) and some.cost([g.n_filters for g in some.groups]) == pytest.approx(
        meter.whole
    )
    keep_profile(clock, tmp_path)
    assert kept_profile(tmp_path) == tmp_path / PROFILE and kept_profile(tmp_path / "new") is None


def test_widths_go_by_the_steps_of_the_device(network, profile):
    auto = Limits(round_to="auto", min_kept=2)
    clock = clock_for(network, profile, limits=auto)
    groups = find_groups(network, EXAMPLE).groups
    assert resolved(auto, clock, network, groups) == Limits(round_to=8, min_kept=2)
    assert resolved(Limits(4), None, network, groups) == Limits(4)
    with pytest.raises(
        UserError, match=r"round_to=auto takes the multiple .* there is none; .* profile=FILE"
    ) as refused:
        clock_for(network, limits=auto)
    assert refused.value.typed.endswith("give profile.file=FILE, or give a number of channels.")


def test_profiles_of_something_else_are_refused(network, profile):
    elsewhere = replace(profile, conditions=replace(profile.conditions, device="abacus"))
    with pytest.raises(UserError, match=r"measured with device abacus, and here it is"):
        read_clock(elsewhere, ClockSettings(), CPU)
    with pytest.raises(UserError, match=r"holds eager at batch 1, not any runtime at batch 64"):
        read_clock(profile, ClockSettings(batch_size=64), CPU)
    other = cifar_resnet(8).eval()
    clock = read_clock(profile, ClockSettings(), CPU)
    with pytest.raises(UserError, match=r"belongs to another network"):
        clock(other, find_groups(other, torch.zeros(1, 3, 16, 16)).groups)


def test_a_profile_that_foretells_badly_is_said_to(network, profile):
    """Copies that are not fitted to took three times as long as the others foretell."""
    table = profile.tables[0]
    slow = tuple(replace(each, fraction=3 * each.fraction) for each in table.samples[:10])
    with pytest.warns(Notice, match=r"off by 6\d% \(median of 10 copies\): the machine was busy"):
        clock_for(network, replace(profile, tables=(replace(table, checks=slow),)), timed=True)


@pytest.fixture
def turns(monkeypatch):
    """Seconds of the passes to come, all the same; the list of what was timed."""
    timed = []
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 0)
    monkeypatch.setattr(profiling, "CHECKS", 1)
    monkeypatch.setattr(profiling, "FEWEST", 4)
    monkeypatch.setattr(profiling, "PER_KIND", 0)
    monkeypatch.setattr(profiling, "one_turn", lambda run, inputs, device: timed.append(len(inputs)) or 1e-3)
    return timed


def measured(network, batch_size=1):
    chosen = ClockSettings(batch_size=batch_size)
    return find_clock(network, EXAMPLE, chosen, None, timed=True, limits=Limits())


def test_what_is_measured_for_a_run_serves_later_ones(network, turns):
    """Of the same network and device, whatever its weights; the file may hold several tables, a run goes by one."""
    first = measured(network)
    assert first.file.is_file() and turns
    del turns[:]
    other = small_cnn().eval()
    with pytest.warns(Notice, match=r"Times are those of '.*json', which an earlier command measured .*; delete it"):
        again = measured(other)
    assert turns == [] and again.profile == first.profile and again.file is None
    many = measured(network, batch_size=2)
    assert set(turns) == {2} and many.file == first.file and [each.batch_size for each in many.profile.tables] == [2]
    del turns[:]
    first.file.write_text("{}")
    assert measured(network).profile == first.profile and turns


def test_what_was_measured_is_named_where_the_command_ends_before_the_run(network, turns, profile):
    clock = measured(network)
    with pytest.raises(UserError) as refused, keeping_times(clock):
        raise UserError("It cannot be met;", "in Python.", "typed.")
    kept = f"The times that were measured are kept in {str(clock.file)!r}, and the next command goes by them."
    assert str(refused.value) == f"It cannot be met; in Python. {kept}"
    assert refused.value.typed == f"It cannot be met; typed. {kept}"
    for nothing in (None, clock_for(network, profile, timed=True)):
        with pytest.raises(UserError, match=r"^no$"), keeping_times(nothing):
            raise UserError("no")


def test_times_of_a_busy_machine_are_said_to_be_and_are_not_kept(network, turns, monkeypatch):
    """Turns of the same copy take 1, 1 and 9 ms by chance: with threads that wait for each other, for example."""
    chance = random.Random(0)
    monkeypatch.setattr(profiling, "one_turn", lambda *of: turns.append(1) or chance.choice([1e-3, 1e-3, 9e-3]))
    with pytest.warns(
        Notice, match=r"Turns of the same copy are .* apart .* \(quartiles, median of 5 copies; eager, b"
    ):
        clock = measured(network)
    assert clock.file is None
    before = len(turns)
    with pytest.warns(Notice, match="the machine was busy; measure it again when it is not."):
        measured(network)
    assert len(turns) == 2 * before


def test_several_threads_are_named_as_what_waits(network, profile):
    table = profile.tables[0]
    apart = tuple(replace(each, high=each.low + 34 * each.fraction) for each in table.samples)
    several = replace(
        profile, conditions=replace(profile.conditions, n_threads=2), tables=(replace(table, samples=apart),)
    )
    assert profiling.doubt(profile, table) is None
    sentence = profiling.doubt(several, several.tables[0])
    assert sentence is not None and "Turns of the same copy are 34 times of its time apart" in sentence
    assert sentence.endswith(
        "2 threads): the machine was busy, and threads waited for each other; measure it again when it is not, or with "
        "threads=1."
    )


def test_a_runtime_that_does_not_exist():
    with pytest.raises(UserError, match=r"profile.runtime is 'tensorrt'; expected one of eager, compile, onnxruntime"):
        ClockSettings(runtime="tensorrt")
