"""The latency meter on times that a known law makes: what it finds again, and what it refuses."""

import dataclasses
import json
import random

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.latency_meter import LatencyFit, LatencyMeter
from keepdrop.envs.surgery.latency_profile import (
    Conditions,
    LatencyProfile,
    Sample,
    TimeTable,
    load_profile,
    save_profile,
)
from keepdrop.errors import UserError
from keepdrop.experiments.deploy.profiling import design, layer_shapes

HERE = Conditions("Abacus 3000", "cpu", 2, "2.13.0", None)


def widths_of(layer, groups, kept):
    """Input and output channels of a layer, counted one by one."""
    sides = []
    for total, shares in zip(layer.widths, (layer.into, layer.out), strict=True):
        sides.append(total - sum(n * (groups[place].n_filters - kept[place]) for place, n in shares))
    return sides


def law(layers, groups, kept, multiple=1):
    """Seconds: a constant, and of every layer its products at widths rounded up, and its output."""
    total = 1e-4
    for layer in layers:
        if any(kept[place] == 0 for place in layer.gone_with):
            continue
        into, out = widths_of(layer, groups, kept)
        (into, out), full = ([-(-n // multiple) * multiple for n in each] for each in ((into, out), layer.widths))
        total += 1e-9 * layer.macs * into * out / (full[0] * full[1]) + 2e-9 * layer.elements * out / full[1]
    return total


def made(model, shape, multiple=1, noise=0.0, count=40, chosen=lambda name: True, whole_blocks=False):
    """A profile as that law gives it, with its groups."""
    images = torch.randn(2, *shape)
    groups = tuple(
        group for group in find_groups(model, images, whole_blocks=whole_blocks).groups if chosen(group.name)
    )
    layers = layer_shapes(model, images, groups)
    dense = law(layers, groups, [group.n_filters for group in groups], multiple)
    chance = random.Random(0)

    def sample(kept):
        fraction = law(layers, groups, kept, multiple) / dense * (1 + chance.gauss(0, noise))
        return Sample(kept, fraction, fraction * 0.99, fraction * 1.01)

    samples, checks = (tuple(map(sample, design(groups, n, seed))) for n, seed in ((count, 0), (10, 1)))
    named = tuple((group.name, group.n_filters) for group in groups)
    return LatencyProfile(HERE, named, layers, (TimeTable("eager", 1, (dense,), samples, checks),)), groups


@pytest.fixture(scope="module")
def plain():
    model = small_cnn(widths=(32, 48, 64))
    return model, *made(model, (1, 8, 8))


@pytest.fixture(scope="module")
def padded():
    model = small_cnn(widths=(32, 48, 64))
    return model, *made(model, (1, 8, 8), multiple=16)


def test_a_smooth_law_is_found_again(plain):
    model, profile, groups = plain
    meter = LatencyMeter(model, groups, profile)
    assert meter.whole == profile.tables[0].dense_seconds
    assert meter.cost([group.n_filters for group in groups]) == pytest.approx(meter.whole)
    for check in profile.tables[0].checks:
        assert meter.seconds(check.kept) == pytest.approx(check.fraction * meter.whole, rel=0.03)
    assert meter.round_multiple() == 1


def test_of_a_resnet_with_coupled_groups_too():
    model = cifar_resnet(20)
    profile, _ = made(model, (3, 16, 16), noise=0.02)
    errors = sorted(map(abs, LatencyFit(profile, profile.tables[0].samples).errors(profile.tables[0].checks)))
    assert errors[5] < 0.03 and errors[-1] < 0.1


def test_blocks_that_vanish_take_nothing():
    model, chance = cifar_resnet(14), random.Random(5)
    profile, groups = made(model, (3, 16, 16), whole_blocks=True)
    meter, full = LatencyMeter(model, groups, profile), [group.n_filters for group in groups]
    can = [place for place, group in enumerate(groups) if group.least == 0]
    assert any(0 in each.kept for each in profile.tables[0].samples) and len(can) > 3
    dense = law(profile.layers, groups, full)
    for n_gone in range(1, len(can)):
        gone = chance.sample(can, n_gone)
        kept = [0 if place in gone else n for place, n in enumerate(full)]
        expected = law(profile.layers, groups, kept) / dense
        assert meter.seconds(kept) == pytest.approx(expected * meter.whole, rel=0.05)


def test_layers_of_one_shape_may_be_pruned_on_different_sides():
    """The first convolutions of blocks alone: they lose outputs, the second ones, of the same shape, lose inputs."""
    model = cifar_resnet(8)
    profile, groups = made(model, (3, 16, 16), count=80, chosen=lambda name: name.endswith(".conv1"))
    meter = LatencyMeter(model, groups, profile)
    assert len(groups) == 3
    for check in profile.tables[0].checks:
        assert meter.seconds(check.kept) == pytest.approx(check.fraction * meter.whole, rel=0.03)


def test_steps_are_found_and_kept_where_they_are_free(padded):
    model, profile, groups = padded
    meter = LatencyMeter(model, groups, profile)
    assert meter.round_multiple() == 16
    full = [group.n_filters for group in groups]
    assert meter.seconds([17, *full[1:]]) == pytest.approx(meter.seconds([32, *full[1:]]), rel=0.05)
    assert meter.cost([16, *full[1:]]) < 0.8 * meter.cost([17, *full[1:]])
    free = set(meter.free_widths(groups[0]))
    assert len(free & set(range(18, 33))) > 5 and 17 not in free


def test_cost_is_never_less_for_more_filters(padded):
    model, profile, groups = padded
    meter, chance = LatencyMeter(model, groups, profile), random.Random(3)
    for _ in range(200):
        kept = [chance.randint(1, group.n_filters) for group in groups]
        more = [chance.randint(k, group.n_filters) for k, group in zip(kept, groups, strict=True)]
        assert 0 < meter.cost(kept) <= meter.cost(more) <= meter.whole * (1 + 1e-6)
        assert meter.cost(kept) <= meter.seconds(kept) * (1 + 1e-6)


def test_some_of_the_groups(plain):
    model, profile, groups = plain
    one, every = LatencyMeter(model, groups[1:2], profile), LatencyMeter(model, groups, profile)
    full = [group.n_filters for group in groups]
    assert one.cost([7]) == every.cost([full[0], 7, full[2]])


def test_a_layer_that_goes_with_its_block_takes_no_time(plain):
    _, profile, groups = plain
    layers = tuple(
        dataclasses.replace(each, gone_with=(1,)) if each.module == "conv2" else each for each in profile.layers
    )
    fit = LatencyFit(dataclasses.replace(profile, layers=layers), profile.tables[0].samples)
    full = [group.n_filters for group in groups]
    assert fit.layer_fractions(full)["conv2"] > 0
    assert fit.layer_fractions([full[0], 0, full[2]])["conv2"] == 0


def test_the_file_holds_what_was_saved(plain, tmp_path):
    _, profile, _ = plain
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(format="other"), "it does not say format"),
        (lambda content: content.pop("groups"), "'groups'"),
        (lambda content: content["conditions"].update(n_threads=-1), "a whole number of 0 or more is expected"),
        (lambda content: content["tables"].append(content["tables"][0]), "a runtime and batch size twice"),
        (lambda content: content["tables"][0].update(dense=[]), "without a time of the dense network"),
        (lambda content: content["tables"][0]["samples"][0].update(kept=[99, 1, 1]), "keeps more filters than there"),
        (
            lambda content: content["tables"][0]["samples"][0].update(fraction="1"),
            "'1' stands where a time is expected",
        ),
        (lambda content: content["layers"][0].update(out=[[9, 1]]), "has fewer channels than its groups"),
        (lambda content: content["layers"][0].update(gone_with=[9]), "goes with a group that is not there"),
    ],
)
def test_a_damaged_file_is_one_sentence(plain, tmp_path, change, sentence):
    path = tmp_path / "p.json"
    save_profile(plain[1], path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no latency profile that this version can read") as caught:
        load_profile(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": NaN}', "[" * 100_000])
def test_no_profile_at_all(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match="is no latency profile"):
        load_profile(tmp_path / "p.json")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="make one with keepdrop profile out="):
        load_profile(tmp_path / "p.json")


def test_what_it_is_not_for(plain):
    model, profile, groups = plain
    other = small_cnn(widths=(32, 40, 64))
    with pytest.raises(UserError, match="'conv2' has 40 filters and the latency profile measured it with 48 filters"):
        LatencyMeter(other, find_groups(other, torch.randn(2, 1, 8, 8)).groups, profile)
    with pytest.raises(UserError, match="measured 'conv2' with 48 outputs, which this network has not"):
        LatencyMeter(other, groups[:1], profile)
    with pytest.raises(UserError, match="holds eager at batch 1, not onnxruntime at batch any; add it with"):
        LatencyMeter(model, groups, profile, runtime="onnxruntime")
    profile.check_conditions(dataclasses.replace(HERE, onnxruntime="1.2"))  # no table of it
    for change, words in (
        ({"device": "Ruler"}, "device Abacus 3000"),
        ({"n_threads": 1}, "threads 2, and here it is 1"),
    ):
        with pytest.raises(UserError, match=words):
            profile.check_conditions(dataclasses.replace(HERE, **change))
