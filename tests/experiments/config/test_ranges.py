"""Every number of every configuration: nan, infinite, negative and absurdly large values are refused."""

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from keepdrop import Limits, Settings, TrainSettings, UserError
from keepdrop.experiments.config.entry_point import check_settings
from keepdrop.experiments.config.schema import ROOTS, structured
from omegaconf import OmegaConf

# What `Target` and `check_drop_bound` refuse, with a hint where percent came, and `ProfileSettings`.
ELSEWHERE = {"drop_bound", "target.removed", "targets.removed"}
ELSEWHERE |= {"target.latency", "target.milliseconds", "target.params", "target.bytes"}
ELSEWHERE |= {"batch_sizes", "samples", "repeats", "widths"}


def numbers(kind, prefix=""):
    """Dotted key and type of every number, or list of numbers, below a dataclass."""
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        hints = [each for each in (get_args(hint) if isinstance(hint, UnionType) else [hint]) if each is not type(None)]
        key = f"{prefix}{field.name}"
        if is_dataclass(hints[0]):
            yield from numbers(hints[0], f"{key}.")
        elif hints[0] in (int, float) or (get_origin(hints[0]) is list and get_args(hints[0])[0] in (int, float)):
            yield key, hints[0]


CASES = sorted({(root, key, kind) for root in ROOTS for key, kind in numbers(ROOTS[root])}, key=str)


def test_the_numbers_are_found():
    assert len(CASES) > 200 and ("prune", "finetune.lr", float) in CASES and ("compare", "seeds", list[int]) in CASES


@pytest.mark.parametrize("root", ROOTS)
def test_every_number_has_a_range(root):
    check_settings(structured(ROOTS[root]), ROOTS[root])
    for _, key, kind in (case for case in CASES if case[0] == root and case[1] not in ELSEWHERE):
        element = get_args(kind)[0] if get_origin(kind) is list else kind
        bad = [-1, -(10**12), 10**18 * 100] if element is int else [float("nan"), float("inf"), -1.0, 1e30]
        for value in bad:
            config = structured(ROOTS[root])
            OmegaConf.update(config, key, value if element is kind else [value])
            with pytest.raises(UserError, match=r".*"):
                check_settings(config, ROOTS[root])
                pytest.fail(f"{root}: {key}={value} passed")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("agent.lr=nan", "agent.lr is nan"),
        ("agent.max_grad_norm=nan", "agent.max_grad_norm is nan; expected a number above 0 and up to 1,000,000."),
        ("search.masks=100000000000", "search.masks is 100,000,000,000; expected"),
        ("split.seed=-1", "split.seed is -1; expected a number from 0 to"),
        ("evaluation.ridge=0", "evaluation.ridge is 0; expected a number above 0"),
        ("evaluation.cache_gib=-1", "evaluation.cache_gib is -1; expected a number from 0"),
        ("finetune.lr=nan", "finetune.lr"),
        ("seed=-1", "seed is -1"),
        ("target.removed=nan", "expected a fraction between 0 and 1"),
        ("target.latency=nan", "target.latency is nan; expected the fraction"),
        ("target.milliseconds=inf", "target.milliseconds is inf; expected a time above 0"),
        ("target.params=-1", "target.params is -1; expected the fraction"),
        ("target.bytes=-1", "target.bytes is -1; expected the size of a file"),
        ("drop_bound=nan", "drop_bound is nan"),
        ("augment.padding=100000", "augment.padding is 100,000"),
        ("augment.padding=nan", "padding"),
        ("network.depth=nan", "network"),
        ("data.seed=-1", "data"),
        ("data.test_fraction=nan", "test_fraction"),
        ("policy.hidden=100000000000", "hidden is 100,000,000,000"),
        ("policy.sharpness=nan", "sharpness is nan"),
        ("policy.initial_keep=nan", "initial_keep is nan"),
        ("policy.initial_scale=nan", "initial_scale is nan"),
        ("policy.quantiles=[nan]", "quantiles is nan"),
        ("reward.floor=nan", "floor is nan"),
    ],
)
def test_the_command_refuses_it(refused, override, sentence):
    assert sentence in refused("prune", override)


def test_topk_above_the_classes(refused):
    assert "k=10" in refused("prune", "metric=topk", "metric.k=10")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Settings(masks=10**11),
        lambda: Settings(split_seed=-1),
        lambda: Settings(images=-1),
        lambda: Settings(bn_images=-1),
        lambda: TrainSettings(lr=float("inf")),
        lambda: Limits(min_kept=float("nan")),
    ],
)
def test_settings_from_python(make):
    with pytest.raises(UserError, match=r"expected|must be"):
        make()
