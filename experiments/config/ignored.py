"""Settings that would be ignored are refused: what the form of a command at hand has no use for, and was typed.

Only what was typed counts: an experiment, or the run that `apply` inherits from, may hold settings for several forms.
An amount of zero (`finetune.epochs=0`) ignores nothing: it does what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from ...errors import UserError
from .entry_point import typed

When = Callable[[DictConfig], bool]


@dataclass(frozen=True)
class Ignored:
    """Settings without effect.

    Attributes:
        keys: dotted keys, separated by spaces; what is below them counts as well.
        why: they do nothing, and what to do instead; ends the sentence.
        when: whether a configuration is of the form that has no use for them.
    """

    keys: str
    why: str
    when: When = lambda config: True


def refuse_ignored(config: DictConfig, rules: Iterable[Ignored]) -> None:
    """Raise a `UserError` for the first setting of this command line that one of the rules is about."""
    given = typed()
    if "resume" in given:  # a run that began was checked; what is repeated there was its own
        return
    for rule in rules:
        for key in rule.keys.split():
            hits = [each for each in given if each == key or each.startswith(f"{key}.")]
            if hits and rule.when(config):
                raise UserError(f"{hits[0]} would do nothing: {rule.why}")


def has_checkpoint(config: DictConfig) -> bool:
    """Whether the dense network comes trained."""
    return config.checkpoint is not None


def _without_compensation(config: DictConfig) -> bool:
    return not config.evaluation.compensate


def _is(key: str, value: object) -> When:
    return lambda config: OmegaConf.select(config, key) == value


TRAINED_ALREADY = Ignored("base", "checkpoint gives a network that is trained already; leave one out.", has_checkpoint)
ONLY_THE_BASE = Ignored(
    "augment", "it is for the training of the base network, and checkpoint gives a trained one.", has_checkpoint
)
COMPENSATION = Ignored(
    "evaluation.target evaluation.ridge evaluation.compensation_images",
    "evaluation.compensate=false compensates nothing.",
    _without_compensation,
)
REPAIR = Ignored("repair", "evaluation.compensate=false repairs nothing.", _without_compensation)
SEARCH_REPAIR = Ignored("network_search.repair_images network_search.repair_places", REPAIR.why, _without_compensation)
HALVING = Ignored(
    "network_search.halving.minibatches",
    "network_search.halving.candidates=[] trains no mask.",
    _is("network_search.halving.candidates", []),
)
# How masks are judged one layer at a time; networks decided at once are cut for real, and repaired.
LAYER_EVALUATION = (
    "evaluation.target evaluation.ridge evaluation.compensation_images evaluation.cache_gib evaluation.method "
    "evaluation.dtype evaluation.compile evaluation.memory"
)
PATIENCE = Ignored(
    "agent.min_gain agent.smoothing", "agent.patience=null makes all updates.", _is("agent.patience", None)
)


def _has_engine_workers(config: DictConfig) -> bool:
    engine = config.engine
    return "Local" not in str(engine.get("_target_")) or engine.get("workers") is not None


PROCESSES = Ignored(
    "workers", "engine has workers of its own: engine.workers says how many of them there are.", _has_engine_workers
)


def _lr(config: DictConfig, key: str) -> float | None:
    return OmegaConf.select(config, f"{key}.lr")


def training(key: str) -> tuple[Ignored, ...]:
    """Rules for the training settings at `key`."""
    return (
        Ignored(f"{key}.temperature", f"{key}.distill_weight=0 has no teacher.", _is(f"{key}.distill_weight", 0)),
        Ignored(f"{key}.top_lr", f"{key}.lr gives the rate itself.", lambda config: _lr(config, key) is not None),
        Ignored(f"{key}.sync_batch_norm", f"{key}.devices=1 has all images.", _is(f"{key}.devices", 1)),
        Ignored(f"{key}.final_lr", f"{key}.schedule=constant never falls.", _is(f"{key}.schedule", "constant")),
    )


BASE_TRAINING = (
    Ignored("base.distill_weight base.temperature", "the base network has no teacher.", lambda config: True),
    *training("base")[1:],
)
