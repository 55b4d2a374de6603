"""One place for defaults: what the schema, the YAML files and the Python interface say is the same, key by key."""

import inspect

import pytest
from hydra import compose, initialize_config_module
from keepdrop import LocalEngine, Settings, apply_agents, prune
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.experiments.api.settings import FINETUNE
from keepdrop.experiments.config.build import build
from keepdrop.experiments.config.cli_errors import groups
from keepdrop.experiments.config.schema import ROOTS, register_schemas, structured
from keepdrop.experiments.config.stored import inherit
from omegaconf import OmegaConf

# What is meant to differ between `keepdrop prune` and `keepdrop.prune`: setting of the command, its default there, the
# default in Python, and why.
DELIBERATE = {
    "split.reward_from": ("train", "test", "the command may train the base itself; a network from Python is trained"),
    "split.reward_size": (300, None, "from Python a fifth of the source, at most 2,000 images"),
    "recovery.train.epochs": (2.0, 0, "from Python `recover` is asked for: keepdrop's loop or one's own"),
    "augment": ("shift", None, "the command knows its data set; from Python nothing is known of the images"),
}


def composed(root):
    register_schemas()
    inherit(None)
    with initialize_config_module("keepdrop.conf", version_base="1.3"):
        return compose(root)


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("root", ROOTS)
def test_yaml_repeats_the_schema(root):
    """Groups and the run folder, which has the date in its name, are for YAML alone."""
    chosen = {*groups(), "run_dir"}
    yaml = {key: value for key, value in OmegaConf.to_container(composed(root)).items() if key not in chosen}
    schema = OmegaConf.to_container(structured(ROOTS[root]))
    schema = {key: value for key, value in schema.items() if key not in chosen}
    assert dict(leaves(yaml)) == dict(leaves(schema))


def command_value(config, key):
    return OmegaConf.select(config, key)


PYTHON = {
    "split.reward_from": lambda: Settings().reward_from,
    "split.reward_size": lambda: Settings().reward_size,
    "split.seed": lambda: Settings().split_seed,
    "order": lambda: Settings().order,
    "search.masks": lambda: Settings().masks,
    "search.images": lambda: Settings().images,
    "agent": lambda: Settings().agent,
    "evaluation": lambda: Settings().evaluation,
    "surgery": lambda: Settings().surgery,
    "network_search": lambda: Settings().network,
    "repair": ReconstructionSettings,
    "recovery.bn_images": lambda: Settings().bn_images,
    "recovery.train.epochs": lambda: 0 if default(prune, "recover") is None else None,
    "finetune": lambda: default(prune, "finetune"),
    "drop_bound": lambda: default(prune, "drop_bound"),
    "target.removed": lambda: default(prune, "macs_removed"),
    "target.latency": lambda: default(prune, "latency"),
    "target.milliseconds": lambda: default(prune, "milliseconds"),
    "target.params": lambda: default(prune, "params"),
    "target.bytes": lambda: default(prune, "bytes"),
    "profile": lambda: Settings().profile,
    "layers": lambda: default(prune, "layers"),
    "agents": lambda: default(prune, "agents"),
    "warm_start": lambda: default(prune, "warm_start"),
    "seed": lambda: default(prune, "seed"),
    "device": lambda: default(prune, "device"),
    "loss": lambda: Settings().loss,
    "augment": lambda: default(prune, "augment"),
}
# Settings of the command that need no twin: the base network comes trained, and files, tables and timings are asked for
# by methods of the result.
COMMAND_ALONE = {
    *("base", "checkpoint", "controls", "data", "export", "latency", "network", "quiet", "resume", "run_dir"),
    *("target.of", "recovery.train"),
}


def default(function, name):
    return inspect.signature(function).parameters[name].default


def test_python_has_the_defaults_of_the_command():
    config = composed("prune")
    for key, value in PYTHON.items():
        node = OmegaConf.select(config, key)
        theirs = OmegaConf.to_object(node) if OmegaConf.is_config(node) and key != "augment" else node
        if key == "augment":
            theirs = "shift"  # the option of the group, as `DELIBERATE` names it
        if key in DELIBERATE:
            assert (theirs, value()) == DELIBERATE[key][:2], key
        else:
            assert theirs == value(), key
    for function in (prune, apply_agents):
        assert default(function, "finetune") is FINETUNE and default(function, "drop_bound") == config.drop_bound


def test_policy_reward_metric_and_engine_are_those_of_the_command():
    config, ours = composed("prune"), Settings()
    for key, made in (("policy", build(config.policy, "policy")), ("metric", build(config.metric, "metric"))):
        if key == "metric":
            assert type(made) is type(ours.metric)
            continue
        given = {**dict(inspect.signature(ours.policy.func).parameters.items())}
        defaults = {name: each.default for name, each in given.items()} | ours.policy.keywords
        assert made.func is ours.policy.func
        assert all(tuple_of(defaults[name]) == tuple_of(value) for name, value in made.keywords.items())
    assert build(config.engine, "engine") == LocalEngine() and default(prune, "engine") is None
    reward = build(config.reward, "reward")
    assert reward == type(reward)(config.drop_bound)  # what `prune` makes where `Settings.reward` is None


def tuple_of(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def test_every_setting_of_the_command_is_compared_or_left_out_on_purpose():
    compared = {*PYTHON, "policy", "reward", "metric", "engine", *COMMAND_ALONE}
    split = [key for key, _ in leaves(OmegaConf.to_container(composed("prune")))]
    for key in split:
        parts = key.split(".")
        assert {".".join(parts[: n + 1]) for n in range(len(parts))} & compared, key
