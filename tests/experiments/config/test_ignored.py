"""No setting is ignored: what a command has no use for is refused when it was typed, with the reason."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
from keepdrop.experiments.commands import apply
from keepdrop.experiments.commands.cli import COMMANDS
from keepdrop.experiments.config.cli_errors import known_keys
from keepdrop.experiments.config.ignored import BASE_TRAINING, Ignored

NETWORK_RUN = Path(__file__).parents[2] / "fixtures/v0_1_0/network"
TARGET = ("prune", "target.removed=0.3")
LAYERS = ("prune",)
PLAIN = "evaluation.compensate=false"
TRAINED = "checkpoint=CHECKPOINT"
APPLY = ("apply", "agents=LAYERS", TRAINED)
APPLY_NETWORK = ("apply", "agents=NETWORK", "checkpoint=NETWORK/base/model.safetensors")
QUICK = "stages=[zero]"
# Command, the setting that is refused, and a word of the reason.
REFUSED = [
    *((TARGET, setting, "one agent decides on all layers at once") for setting in (
        "order=backward", "reward=budget", "reward.floor=-2", "policy=layer_matrix", "policy.hidden=8",
        "agent.updates=3", "agent={updates:3}", "search.masks=8", "search.images=60", "warm_start=NOWHERE",
        "evaluation.target=current", "evaluation.ridge=0.1", "evaluation.compensation_images=10",
        "evaluation.cache_gib=2", "evaluation.method=whole", "evaluation.dtype=bfloat16", "evaluation.compile=true",
        "evaluation.memory=3",
    )),
    *((LAYERS, setting, "an agent decides on each layer") for setting in (
        "target.of=groups", "network_search.images=60", "network_search.agent.updates=3", "repair.images=100",
        "repair={ridge:0.1}",
    )),
    (LAYERS, "surgery.whole_blocks=true", "always keeps a filter of it"),
    ((*TARGET, "agents=pretrained"), "network_search.images=60", "only asked"),
    ((*TARGET, "agents=pretrained"), "engine.workers=2", "only asked"),
    (LAYERS, "engine.workers=2", "learn one after the other"),
    (LAYERS, "engine=ray", "learn one after the other"),
    (("compare", "engine.workers=2"), "workers=3", "has workers of its own"),
    (("pretrain", "zoo=NOWHERE", "engine=ray"), "workers=3", "has workers of its own"),
    (("prune", "target.params=0.5"), "target.of=groups", "whose MACs target.removed counts"),
    *((command, "profile.file=NOWHERE", "nothing goes by time here") for command in (
        TARGET, LAYERS, ("train-agent", "layer=conv1"), APPLY, APPLY_NETWORK,
    )),
    (("train-agent", "layer=conv1"), "surgery.whole_blocks=true", "always keeps a filter of it"),
    (("iterate",), "surgery.whole_blocks=true", "the last one of a layer stays"),
    *((("prune", PLAIN), setting, "compensates nothing") for setting in (
        "evaluation.target=current", "evaluation.ridge=0.1", "evaluation.compensation_images=10",
    )),
    *(((*TARGET, PLAIN), setting, "repairs nothing") for setting in (
        "repair.places=8", "network_search.repair_images=60", "network_search.repair_places=8",
    )),
    *(((command, *need, TRAINED), "base.epochs=3", "trained already") for command, need in (
        ("prune", ()), ("train-agent", ("layer=conv1",)), ("compare", ()), ("iterate", ()), ("oracle", ()),
    )),
    *(((command, *need), "base.temperature=2", "no teacher") for command, need in (
        ("prune", ()), ("train-agent", ("layer=conv1",)), ("train-cnn", ()), ("compare", ()), ("iterate", ()),
        ("oracle", ()),
    )),
    (("train-cnn",), "base.distill_weight=0.5", "no teacher"),
    (("train-cnn", "base.schedule=constant"), "base.final_lr=0.1", "never falls"),
    (("prune", "finetune.distill_weight=0"), "finetune.temperature=2", "no teacher"),
    (("prune", "recovery.train.distill_weight=0"), "recovery.train.temperature=2", "no teacher"),
    (("prune", "finetune.schedule=constant"), "finetune.final_lr=0.1", "never falls"),
    (("prune", "recovery.train.schedule=constant"), "recovery.train.final_lr=0.1", "never falls"),
    (("prune", "agent.patience=null"), "agent.min_gain=0.1", "makes all updates"),
    (("train-agent", "layer=conv1", "agent.patience=null"), "agent.smoothing=0.1", "makes all updates"),
    (("prune", "warm_start=LAYERS", "layers=[conv1,conv2]"), "policy=layer_matrix", "brings an agent for each"),
    (("train-agent", "layer=conv1", "warm_start=LAYERS"), "policy.hidden=8", "brings the agent"),
    (("train-agent", "layer=conv1", TRAINED), "augment=crop_flip", "training of the base network"),
    (("train-agent", "layer=conv1", PLAIN), "evaluation.ridge=0.1", "compensates nothing"),
    (("oracle", TRAINED), "augment=null", "training of the base network"),
    *((("oracle",), setting, "one at a time") for setting in (
        "evaluation.compensate=false", "evaluation.target=current", "evaluation.ridge=0.1", "evaluation.memory=3",
        "evaluation.compensation_images=10", "evaluation.cache_gib=2", "evaluation.dtype=bfloat16",
        "evaluation.compile=true",
    )),
    (("oracle", "criteria=[l1]"), "random_seeds=2", "does not name random"),
    (("iterate",), "train.epochs=2", "minibatches says how long"),
    (("iterate",), "drop_bound=0.1", "target.hold_bound=true"),
    (("iterate", "target.removed=null"), "target.resource=params", "drop_bound alone"),
    (("iterate", "target.removed=null"), "target.hold_bound=true", "drop_bound alone"),
    *((command, f"{key}.sync_batch_norm=true", "has all images") for command, key in (
        (("train-cnn",), "base"), (("prune",), "finetune"), (("prune",), "recovery.train"), (("iterate",), "train"),
        (("iterate",), "finetune"), (("compare",), "finetune"), (APPLY, "finetune"), (APPLY, "recovery.train"),
    )),
    *(((*command, f"{key}.lr=0.01"), f"{key}.top_lr=0.02", "gives the rate itself") for command, key in (
        (("train-cnn",), "base"), (("prune",), "recovery.train"), (("prune",), "finetune"), (APPLY, "recovery.train"),
        (APPLY, "finetune"), (("compare",), "finetune"), (("iterate",), "finetune"), (("iterate",), "train"),
    )),
    (("iterate", "train.distill_weight=0"), "train.temperature=2", "no teacher"),
    (("iterate",), "train.final_lr=0.1", "never falls"),
    (("iterate", "finetune.distill_weight=0"), "finetune.temperature=2", "no teacher"),
    (("iterate", "finetune.schedule=constant"), "finetune.final_lr=0.1", "never falls"),
    (("compare", TRAINED), "seed=3", "seeds=[0,1]"),
    (("compare",), "evaluation.compensate=false", "compensate=[false,true] chooses it"),
    *((("compare",), setting, "cut for real") for setting in ("evaluation.ridge=0.1", "evaluation.method=whole")),
    (("compare", "compensate=[false]"), "repair.images=100", "repairs nothing"),
    (("compare", "compensate=[false]"), "network_search.repair_images=60", "repairs nothing"),
    (("compare", QUICK), "bn_images=100", "does not name bn"),
    (("compare", QUICK), "finetune.epochs=1", "neither one nor full"),
    (("compare", QUICK, TRAINED), "augment=crop_flip", "neither one nor full"),
    (("compare", "methods=[l1-uniform]"), "random_seeds=2", "does not name random-uniform"),
    (("compare", "methods=[l1-uniform]"), "random_best.evaluations=2", "does not name random-best"),
    (("compare", "methods=[random-best]"), "network_search.agent.updates=2", "does not name agent"),
    (("compare", "methods=[l1-uniform]"), "network_search.images=60", "neither agent nor random-best"),
    (("compare", "methods=[random-best]"), "network_search.halving.candidates=[4,2]", "does not name agent"),
    *((command, "network_search.halving.minibatches=[9]", "trains no mask") for command in (TARGET, ("compare",))),
    (("compare", "finetune.distill_weight=0"), "finetune.temperature=2", "no teacher"),
    (("compare", "finetune.schedule=constant"), "finetune.final_lr=0.1", "never falls"),
    *(((command, "example_inputs=mine.example"), "input_shape=[3,32,32]", "says what goes in") for command in (
        "inspect", "profile",
    )),
    (("report", "LAYERS"), "out=page.html", "compared with nothing"),
    (APPLY, "target.removed=0.5", "decide layer by layer"),
    (APPLY, "repair.images=100", "decide layer by layer"),
    (APPLY, "evaluation.dtype=bfloat16", "nothing is searched"),
    ((*APPLY, PLAIN), "evaluation.ridge=0.1", "compensates nothing"),
    ((*APPLY, "controls=[]"), "finetune_controls=false", "nothing to fine-tune"),
    ((*APPLY, "recovery.train.distill_weight=0"), "recovery.train.temperature=2", "no teacher"),
    ((*APPLY, "finetune.distill_weight=0"), "finetune.temperature=2", "no teacher"),
    ((*APPLY, "recovery.train.schedule=constant"), "recovery.train.final_lr=0.1", "never falls"),
    ((*APPLY, "finetune.schedule=constant"), "finetune.final_lr=0.1", "never falls"),
    (APPLY_NETWORK, "order=backward", "decides on all layers at once"),
    (APPLY_NETWORK, "evaluation.method=whole", "decides on all layers at once"),
    ((*APPLY_NETWORK, "target.removed=null"), "target.of=groups", "the agent's own target"),
    (("apply", "agents=pretrained", "target.params=0.5", TRAINED), "target.of=groups", "target.removed counts"),
    ((*APPLY_NETWORK, PLAIN), "repair.images=100", "repairs nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "setting", "reason"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_would_do_nothing_is_refused(refused, command, setting, reason, finished, checkpoint):
    def placed(argument):
        argument = argument.replace("LAYERS", str(finished)).replace("NETWORK", str(NETWORK_RUN))
        return argument.replace("CHECKPOINT", str(checkpoint))

    sentence = refused(*map(placed, (*command, setting)))
    assert " would do nothing: " in sentence and reason in sentence
    assert sentence.startswith(setting.split("=")[0])


def rules_of(command):
    module = import_module(f"keepdrop.experiments.commands.{command.replace('-', '_')}")
    if command == "apply":
        return [*apply.IGNORED, *apply.LAYER_BY_LAYER, *apply.ONE_SHOT]
    return list(getattr(module, "IGNORED", BASE_TRAINING if command == "train-cnn" else ()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_rule_names_settings_that_exist_and_is_tried(command):
    known = known_keys(command.replace("-", "_"))
    tried = [(each[1].split("=")[0], each[2]) for each in REFUSED if each[0][0] in (command, "train-cnn")]
    for rule in rules_of(command):
        assert isinstance(rule, Ignored) and rule.why.endswith(".")
        assert set(rule.keys.split()) <= set(known), (command, rule.keys)
        assert any(
            reason in rule.why and any(key == each or key.startswith(f"{each}.") for each in rule.keys.split())
            for key, reason in tried
        ), (command, rule)


def test_what_an_experiment_or_a_run_brings_is_not_typed(keepdrop, tmp_path, checkpoint):
    """The experiment sets `agent` and `search`; the run of a network's agent an `order`: both are left alone."""
    preset = ["experiment=resnet20_cifar10", "data.path=none.npz", "target.removed=0.4", "run_dir=run"]
    assert keepdrop("prune", *preset).err == "keepdrop: Data file 'none.npz' does not exist; check the path.\n"
    shutil.copytree(NETWORK_RUN, tmp_path / "network")
    command = ["apply", "agents=network", "checkpoint=network/base/model.safetensors", "controls=[]", "quiet=true"]
    result = keepdrop(*command, "recovery.train.epochs=0", "finetune.epochs=0", "latency.repeats=1", "run_dir=applied")
    assert result.code == 0, result.err


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_commands_without_a_run_have_no_run_folder(refused, command, finished):
    words = [str(finished)] if command == "report" else []
    assert f"keepdrop {command} has no setting 'run_dir'" in refused(command, *words, "run_dir=x")


def test_one_agent_has_one_layer(refused):
    assert "keepdrop train-agent has no setting 'layers'" in refused("train-agent", "layer=conv1", "layers=[conv2]")
