import copy
import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from importlib import resources
from importlib.metadata import version

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from keepdrop.envs.files.pruned_network import BUILT_IN
from keepdrop.experiments.commands.cli import COMMANDS
from keepdrop.experiments.commands.help import command_help, offered
from keepdrop.experiments.config.cli_errors import groups, known_keys
from keepdrop.experiments.config.schema import ROOTS, register_schemas, structured
from keepdrop.experiments.config.stored import inherit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ValidationError

OPTIONS = [(group, option) for group, options in groups().items() for option in options]
EXPERIMENTS = {path.stem: path for path in resources.files("keepdrop.conf").joinpath("experiment").iterdir()}
# What a user has to give, where an option leaves it open: an experiment's launch command says so.
OPEN = [name for name, path in EXPERIMENTS.items() if "data.path=" in path.read_text().splitlines()[1]]
REQUIRED = {name: ["data.path=a.npz"] for name in ("npz", *OPEN)}
OWN_FUNCTION = {"custom"}
PRESETS = {"experiment", "recipe"}  # settings of several sections, no object of their own


@functools.cache
def _composed(root, overrides):
    register_schemas()
    with initialize_config_module("keepdrop.conf", version_base="1.3"):
        return compose(root, list(overrides))


def composed(root, overrides=()):
    return copy.deepcopy(_composed(root, tuple(overrides)))


def roots_with(group, option=None):
    """Roots whose defaults have the group; of an experiment only the one that its launch command names."""
    folder = resources.files("keepdrop.conf")
    roots = [root for root in ROOTS if f"- {group}:" in folder.joinpath(f"{root}.yaml").read_text()]
    if group != "experiment" or option is None:
        return roots
    launch = folder.joinpath(f"experiment/{option}.yaml").read_text()
    return [root for root in roots if f"# keepdrop {root.replace('_', '-')} experiment={option}" in launch]


def targets(node, path=""):
    """Every `_target_` node below a configuration, with its place."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
            yield path, node
        for key in node:
            if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
                yield from targets(node._get_node(key), f"{path}.{key}".lstrip("."))


def test_every_group_is_in_some_root():
    assert {group for group in groups() if roots_with(group)} == set(groups())


def combinations():
    """Every option with some root, and every root with some option of its groups; all pairs would take minutes."""
    for group, options in groups().items():
        for option in options if group == "experiment" else ():
            yield from ((root, group, option) for root in roots_with(group, option))
        roots = roots_with(group) if group != "experiment" else []
        for index in range(max(len(roots), len(options)) if roots else 0):
            yield roots[index % len(roots)], group, options[index % len(options)]


def test_combinations_leave_out_no_option_and_no_root():
    made = set(combinations())
    assert {(group, option) for _, group, option in made} == set(OPTIONS)
    assert {(root, group) for root, group, _ in made} == {
        (root, group) for group in groups() for root in roots_with(group)
    }


@pytest.mark.parametrize(("root", "group", "option"), list(combinations()))
def test_options_and_roots_compose(root, group, option):
    extra = [f"{group}._target_=math.sqrt"] if option in OWN_FUNCTION else REQUIRED.get(option, [])
    config = composed(root, [f"{group}={option}", *extra])
    assert group in PRESETS or config[group]["_target_"]


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[1] not in OWN_FUNCTION])
def test_keys_are_arguments(group, option):
    """A key the constructor does not know fails late; an argument without a key cannot be overridden without `+`."""
    root = roots_with(group, option)[0]
    config = composed(root, [f"{group}={option}", *REQUIRED.get(option, [])])
    for path, node in targets(config):
        keys = {str(key) for key in node} - {"_target_", "_partial_"}
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        assert keys <= set(parameters), path
        offered = {"n_filters", "n_weights", "n_statistics", "statistic_names", "seed"} if path == "policy" else set()
        needed = {name for name, p in parameters.items() if p.default is p.empty}
        assert needed <= keys | offered, path


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[1] not in OWN_FUNCTION])
def test_every_argument_has_its_key(group, option):
    if group in PRESETS:
        pytest.skip("made of options that are looked at by themselves")
    node = composed(roots_with(group, option)[0], [f"{group}={option}", *REQUIRED.get(option, [])])[group]
    parameters = set(inspect.signature(get_object(node["_target_"])).parameters)
    offered = {"n_filters", "n_weights", "n_statistics", "statistic_names", "seed"} if group == "policy" else set()
    assert parameters - offered == {str(key) for key in node} - {"_target_", "_partial_"}


def test_a_pruned_network_of_every_option_loads_without_its_constructor():
    options = [option for option in groups()["network"] if option not in OWN_FUNCTION]
    assert {composed("prune", [f"network={option}"]).network._target_ for option in options} == set(BUILT_IN)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("_base")])
def test_a_base_network_is_trained_for_the_experiments_of_its_name(name):
    """Their reward images are held out of it, and the network is the same: its checkpoint loads, and nothing leaks."""
    base = composed("train_cnn", [f"experiment={name}", *REQUIRED.get(name, [])])
    stem, found = name.removesuffix("_base"), 0
    for other, path in EXPERIMENTS.items():
        if other == name or other.rpartition("_")[0] != stem:
            continue
        (root,) = roots_with("experiment", other)
        config = composed(root, [f"experiment={other}", *REQUIRED.get(other, [])])
        for part in ("network", "data", "split", "metric"):
            assert config[part] == base[part], (other, part)
        assert config.split.reward_from == "train" and f"checkpoint={name}/model.safetensors" in path.read_text()
        found += 1
    assert found


def test_an_experiment_of_another_command_is_named_as_such(refused):
    asked = ["experiment=resnet18_quarter_cifar10", "data.path=x.npz"]
    expected = "experiment=resnet18_quarter_cifar10 is one of keepdrop prune; expected one of keepdrop train-cnn"
    assert refused("train-cnn", *asked).startswith(expected)
    base = refused("prune", "experiment=segnet_base", "run_dir=new")  # every setting of it is one of prune as well
    assert base.startswith("experiment=segnet_base is one of keepdrop train-cnn; expected one of keepdrop prune")


@pytest.mark.parametrize("root", roots_with("recipe"))
def test_a_recipe_is_of_fine_tuning_alone_and_goes_over_an_experiment(root):
    """Every method gets the same, whatever chose its filters; what is typed beside it still wins."""
    experiment = {"prune": "resnet20_cifar10", "compare": "resnet20_compare", "iterate": "resnet20_iterate"}[root]
    asked = [f"experiment={experiment}", "data.path=x.npz"]
    plain, made = composed(root, asked), composed(root, [*asked, "recipe=field", "finetune.temperature=3"])
    changed = {key for key in plain if plain[key] != made[key]}
    assert changed == {"finetune"} and made.finetune.temperature == 3 and made.finetune.epochs == plain.finetune.epochs
    assert made.finetune.lr is None and made.finetune.distill_weight == 0.9 and made.finetune.schedule == "cosine"


@pytest.mark.parametrize("root", ROOTS)
def test_root_holds_what_its_schema_holds(root):
    config = composed(root)
    assert {str(key) for key in config} == {field.name for field in dataclasses.fields(ROOTS[root])}
    assert OmegaConf.get_type(config) is ROOTS[root]


def settings_nodes():
    for root, schema in ROOTS.items():
        for field in dataclasses.fields(schema):
            made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            if dataclasses.is_dataclass(made):
                yield pytest.param(root, field.name, type(made), id=f"{root}-{field.name}")


@pytest.mark.parametrize(("root", "name", "kind"), list(settings_nodes()))
def test_settings_are_their_dataclass(root, name, kind):
    config = composed(root)[name]
    assert {str(key) for key in config} == {field.name for field in dataclasses.fields(kind)}
    assert isinstance(OmegaConf.to_object(OmegaConf.merge(structured(kind), config)), kind)


def test_schema_is_strict_and_writable():
    config = composed("prune")
    config.base.epochs = 3
    assert config.base.epochs == 3.0
    with pytest.raises(ValidationError):
        config.base.epochs = "many"
    with pytest.raises(ConfigAttributeError):
        config.base.epoch = 3


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_bare_command_lists_commands(keepdrop, arguments):
    result = keepdrop(*arguments)
    assert result.code == 0 and result.err == ""
    assert all(re.search(rf"^  {name} ", result.out, re.MULTILINE) for name in COMMANDS)


def test_version(keepdrop):
    assert keepdrop("--version").out == f"keepdrop {version('keepdrop')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_options_groups_and_three_examples(keepdrop, command):
    result = keepdrop(command, "--help")
    assert result.code == 0 and result.err == ""
    assert f"usage: keepdrop {command} " in result.out
    if "network" in composed(command.replace("-", "_")):
        assert "network: custom, fcn, resnet110" in result.out
    examples = [line for line in result.out.split("Examples:")[1].splitlines() if "keepdrop" in line]
    assert len(examples) == 3 and all(f"keepdrop {command}" in line for line in examples)
    assert "Hydra" not in result.out and max(map(len, result.out.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_and_options_of_the_help_compose(command):
    """What --help names must exist: every example composes, every option `key=` is a key."""
    root = command.replace("-", "_")
    out = command_help(root)
    register_schemas()
    inherit(None)  # what `keepdrop apply` composes for an agent of any network
    for line in out.split("Examples:")[1].splitlines():
        if line.strip().startswith("keepdrop"):
            overrides = [part for part in line.split()[2:] if "=" in part]
            composed(root, [re.sub(r"^(seed|layer)=.*,.*", r"\1=0", override) for override in overrides])
    keys = re.findall(r"(?:^|[ ;,])([a-z_]+(?:\.[a-z_]+)*)=", out.split("usage:")[1].split("Groups")[0], re.MULTILINE)
    assert set(keys) <= set(known_keys(root)) and len(keys) >= 2


@pytest.mark.parametrize("root", [root for root in ROOTS if root != "report"])
def test_help_offers_the_groups_that_the_command_takes(root):
    assert set(offered(root)) - PRESETS == set(groups()) & {field.name for field in dataclasses.fields(ROOTS[root])}
    for experiment in offered(root).get("experiment", []):
        assert root in roots_with("experiment", experiment)


def test_every_experiment_is_offered_by_some_command():
    assert {each for root in ROOTS for each in offered(root).get("experiment", [])} == set(groups()["experiment"])


def test_help_needs_no_torch():
    code = (
        "import sys; from keepdrop.experiments.commands.cli import run; run(['prune', '-h']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("prnue",), "'prnue' is not a command; did you mean 'prune'?"),
        (("xyz",), "'xyz' is not a command; expected one of prune, inspect, profile, train-cnn, "),
        (("prune", "drop_bnd=0.1"), "keepdrop prune has no setting 'drop_bnd'; did you mean 'drop_bound'?"),
        (
            ("prune", "judge.dtype=bfloat16"),
            "keepdrop prune has no setting 'judge.dtype'; it is 'evaluation.dtype' now.",
        ),
        (("prune", "judge={ridge:1}"), "keepdrop prune has no setting 'judge'; it is 'evaluation' now."),
        (("prune", "polcy=set"), "keepdrop prune has no setting 'polcy'; did you mean 'policy'?"),
        (("prune", "agent.updatez=3"), "keepdrop prune has no setting 'agent.updatez'; did you mean 'agent.updates'?"),
        (
            ("prune", "network=resnet20", "network.depht=20"),
            "keepdrop prune has no setting 'network.depht'; did you mean 'network.depth'?",
        ),
        (("train-cnn", "drop_bound=0.1"), "keepdrop train-cnn has no setting 'drop_bound'; expected one of seed, "),
        (
            ("prune", "policy=sett"),
            "The group 'policy' has no option 'sett'; did you mean 'set'? It has custom, layer_matrix, set.",
        ),
        (("prune", "experiment=x"), "The group 'experiment' has no option 'x'; it has "),
        (("prune", "seed=abc"), "seed is 'abc'; expected a whole number."),
        (("prune", "drop_bound=few"), "drop_bound is 'few'; expected a number."),
        (("prune", "quiet=perhaps"), "quiet is 'perhaps'; expected true or false."),
        (("prune", "layers=conv1"), "layers is 'conv1'; expected a list: 'key=[one,two]'."),
        (("prune", "base=3"), "base is '3'; expected settings below it: key.NAME=VALUE."),
        (("compare", "targets=[0.4]"), "targets is '[0.4]'; expected settings below it: key.NAME=VALUE."),
        (("prune", "conv1"), "'conv1' cannot be read; expected key=value"),
        (("prune", "layers=[conv1"), "'layers=[conv1' cannot be read; expected key=value"),
        (("train-agent",), "layer is not set; expected a value: give layer=VALUE."),
        (("prune", "data=npz"), "data.path is not set; expected a value: give data.path=VALUE."),
    ],
)
def test_typos_get_one_sentence(refused, arguments, sentence):
    assert refused(*arguments).startswith(sentence)


def test_debug_shows_the_traceback(keepdrop):
    with pytest.raises(ValueError, match="is not a command"):
        keepdrop("prnue", "--debug")
