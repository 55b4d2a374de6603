"""A zoo of two tiny networks on the digits, for tests of agents that read networks."""

import json
from functools import cache
from pathlib import Path

import torch
from digits_task import trained as trained_digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import save_weights
from keepdrop.experiments.training.loop import TrainSettings, fit_network

WIDTHS = {"one": (4, 5, 6), "two": (6, 4)}
SMALL = [
    "training.rounds=2",
    "training.targets=[0.3,0.6]",
    "training.hidden=6",
    "training.fit_images=60",
    "training.sampling.samples=4",
    "training.sampling.images=40",
    "training.sampling.repair_images=20",
    "training.sampling.repair_places=4",
    "training.gradient.steps=5",
    "split.reward_size=60",
    "workers=1",
]


@cache
def trained(name):
    """A network of the zoo, trained once a test process; tests must leave it alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn(widths=WIDTHS[name])
    fit_network(model, trained_digits()[1].fit, TrainSettings(epochs=4, batch_size=64, top_lr=0.1), seed=0)
    return model.eval()


def entry(name, folder=Path(), **changed):
    """A network of the zoo, whose weights are written beside it."""
    save_weights(trained(name), folder / f"{name}.safetensors")
    built = {"_target_": "keepdrop.envs.networks.built_in.small_cnn", "widths": list(WIDTHS[name])}
    data = {"_target_": "keepdrop.envs.data.sources.digits"}
    found = {"name": name, "family": f"family {name}", "network": built, "checkpoint": f"{name}.safetensors"}
    return {**found, "data": data, **changed}


def write_zoo(folder, *entries):
    """A zoo file of both networks, or of these entries."""
    entries = entries or tuple(entry(name, folder) for name in WIDTHS)
    (folder / "zoo.yaml").write_text(json.dumps(list(entries)))  # JSON is YAML
    return folder / "zoo.yaml"
