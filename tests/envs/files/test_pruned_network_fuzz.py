"""Damaged and forged pruned files: the same network or one sentence, never a traceback, never another network."""

import copy
import hashlib
import json

import pytest
import torch
from keepdrop.envs.files.pruned_network import (
    ARCHITECTURE,
    BRANCHES,
    SIGNED,
    WEIGHTS,
    _checksum,
    load_pruned,
    save_pruned,
)
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.errors import UserError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
FUZZ = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# What no file should hold, and what no number should do.
NUMBERS = [0, -1, 1, 2, 7, 16, 10**9, 2**31, 2**63, 2**64, 10**40, 0.5, 1e300]
LISTS = [[], [[]], [[0]], [-1], [0, 0], [1, 0], [0, 10**12], [2**63], [0.0], ["0"], [None]]
ODD = st.sampled_from([None, True, "", "out", {}, {"out": [0]}, {"_target_": "os.getcwd"}, *NUMBERS, *LISTS])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder, the files' contents, and what the network says."""
    return _saved(tmp_path_factory.mktemp("fuzzed"), whole_blocks=False)


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """The same of a network in which blocks have vanished."""
    return _saved(tmp_path_factory.mktemp("shortened"), whole_blocks=True)


def _saved(folder, whole_blocks):
    torch.manual_seed(0)
    dense = cifar_resnet(8, widths=(4, 6, 8)).eval()
    groups = find_groups(dense, IMAGES, verify=False, whole_blocks=whole_blocks).groups
    choices = {group: torch.arange(group.n_filters) % 3 != 1 for group in groups}
    for group in groups:
        choices[group] &= group.least == 1 or group.name == "layer1.0.conv1"
    model, kept = prune(dense, choices), KeptChannels().after(dense, choices)
    constructor = {"_target_": "keepdrop.envs.networks.built_in.cifar_resnet", "depth": 8, "widths": [4, 6, 8]}
    facts, shape = {"note": "x"}, (1, 3, 8, 8)
    save_pruned(model, folder, kept=kept, constructor=constructor, facts=facts, input_shape=shape)
    with torch.no_grad():
        return folder, {name: (folder / name).read_bytes() for name in (ARCHITECTURE, WEIGHTS)}, model(IMAGES)


def _load(saved, **changed):
    """Load with files replaced: the logits, or None after a UserError. Anything else is a failure."""
    folder, good, _ = saved
    for name, content in good.items():
        (folder / name).write_bytes(changed.get(name.partition(".")[0], content))
    try:
        loaded = load_pruned(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return None
    with torch.no_grad():
        return loaded(IMAGES)


def _same_or_refused(saved, **changed):
    logits = _load(saved, **changed)
    assert logits is None or torch.equal(logits, saved[2])
    return logits is None


def _signed(core):
    signs = (*SIGNED, BRANCHES) if BRANCHES in core else SIGNED
    return json.dumps({**core, "checksum": _checksum({key: core.get(key) for key in signs})}).encode()


def _places(value, path=()):
    """Paths of everything inside nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


@st.composite
def _forged(draw, core):
    """The architecture with one to three places dropped, retyped, doubled, or moved to another key."""
    core = copy.deepcopy(core)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(core))
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        inside = core
        for each in parents:
            inside = inside[each]
        kind = draw(st.sampled_from(["drop", "odd", "odd", "double", "move"]))
        if kind == "drop":
            del inside[key]
        elif kind == "odd":
            inside[key] = draw(ODD)
        elif kind == "double" and isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[key]))
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(["", "conv1", "layer1", "relu", "weight", "in", "out", "up"]))] = inside[key]
    return core


@FUZZ
@hypothesis.given(data=st.data(), name=st.sampled_from([ARCHITECTURE, WEIGHTS]))
def test_flipped_cut_and_doubled_bytes(saved, data, name):
    good = saved[1][name]
    train_to_stage = len(good) if name == ARCHITECTURE else min(len(good), 4000)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place, length = data.draw(st.integers(0, train_to_stage - 1)), data.draw(st.integers(1, 40))
        kind = data.draw(st.sampled_from(["flip", "remove", "repeat", "cut"]))
        if kind == "flip" and place < len(bad):
            bad[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "remove":
            del bad[place : place + length]
        elif kind == "repeat":
            bad[place:place] = bad[place : place + length]
        else:
            del bad[place:]
    refused = _same_or_refused(saved, **{name.partition(".")[0]: bytes(bad)})
    assert refused or name == ARCHITECTURE or bytes(bad) == good


@FUZZ
@hypothesis.given(data=st.data())
def test_an_edited_architecture(saved, data):
    """Versions and facts may change; a well-signed forgery gets further, and no further."""
    core = data.draw(_forged(json.loads(saved[1][ARCHITECTURE])))
    _same_or_refused(saved, architecture=json.dumps(core).encode())
    _same_or_refused(saved, architecture=_signed(core))


@hypothesis.settings(FUZZ, max_examples=80)
@hypothesis.given(data=st.data())
def test_an_edited_list_of_vanished_branches(shortened, data):
    core = json.loads(shortened[1][ARCHITECTURE])
    assert core["format_version"] == 2 and len(core[BRANCHES]) == 2
    core[BRANCHES] = data.draw(_forged({BRANCHES: core[BRANCHES]})).get(BRANCHES)
    _same_or_refused(shortened, architecture=_signed(core))


@FUZZ
@hypothesis.given(data=st.data())
def test_a_forged_header_of_the_weights(saved, data):
    """Weights whose header was changed and whose hash was made to fit: other weights perhaps, but no other shapes."""
    good = saved[1][WEIGHTS]
    size = int.from_bytes(good[:8], "little")
    header = json.dumps(data.draw(_forged(json.loads(good[8 : 8 + size])))).encode()
    length = data.draw(st.sampled_from([len(header)] * 4 + [0, 1, len(header) + 7, 2**40, 2**64 - 1]))
    weights = length.to_bytes(8, "little") + header + good[8 + size :]
    core = json.loads(saved[1][ARCHITECTURE])
    core["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    logits = _load(saved, model=weights, architecture=_signed(core))
    assert logits is None or logits.shape == saved[2].shape
    assert _load(saved, model=weights) is None or weights == good


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 6 * 10**8 + 2},
        {"depth": -4},
        {"widths": [10**6, 10**6, 10**6]},
        {"widths": [2**62, 2**62, 2**62]},
        {"widths": [4, 6]},
        {"n_classes": 10**12},
        {"n_classes": -1},
        {"in_channels": 10**9},
        {"unknown": 1},
    ],
)
def test_a_huge_dense_network_costs_nothing(saved, change):
    core = json.loads(saved[1][ARCHITECTURE])
    core["constructor"] |= change
    assert _load(saved, architecture=_signed(core)) is None


def test_equal_keys_and_numbers_that_are_none(saved):
    text = saved[1][ARCHITECTURE].decode()
    for bad in (
        text.replace('"kept": {', '"kept": {}, "kept": {', 1),
        text.replace('"note": "x"', '"note": NaN', 1),
        text.replace('"note": "x"', '"note": -Infinity', 1),
        text.replace('"depth": 8', '"depth": 1' + "0" * 5000, 1),
    ):
        assert bad != text and _load(saved, architecture=bad.encode()) is None
    assert torch.equal(_load(saved), saved[2])
