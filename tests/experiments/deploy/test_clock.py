"""Which measured times a run goes by, when it needs them, and what is refused."""

from dataclasses import replace

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.latency_profile import save_profile
from keepdrop.envs.surgery.limits import Limits
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.deploy.clock import (
    PROFILE,
    ClockSettings,
    find_clock,
    keep_profile,
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


def test_a_runtime_that_does_not_exist():
    with pytest.raises(UserError, match=r"profile.runtime is 'tensorrt'; expected one of eager, compile, onnxruntime"):
        ClockSettings(runtime="tensorrt")
