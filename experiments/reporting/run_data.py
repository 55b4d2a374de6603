"""What a run folder says about its run, read back for a report; nothing is computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..runs.folder import CONFIG, FACTS, METRICS, RunFolder, read_config
from ..runs.folder import read_json as stored_json

CURVES = "curves.json"
PREDICTIONS = "predictions.json"  # of a segmentation network
STEPS = "curve.json"  # of `keepdrop iterate`
JOINT = "network/decisions.json"  # of one agent for the whole network
SEARCHES = "choices/agent/*.json"  # of `keepdrop compare`
COMMANDS_BY_KEY = {  # the first that is in the configuration
    "methods": "compare",
    "criteria": "oracle",
    "criterion": "iterate",
    "agents": "apply",
    "layer": "train-agent",
    "order": "prune",
}


@dataclass(frozen=True)
class Layer:
    """One decided layer; accuracies are fractions on the reward split, `keep` counts filters as the layer had them."""

    name: str
    n_filters: int
    n_kept: int
    keep: tuple[bool, ...]
    decided_by: str
    pruned_accuracy: float
    recovered_accuracy: float
    within_bound: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    reward_curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run folder's content.

    `metrics` is None while the run is unfinished; `methods` are the layers by decider. `one_shot` says that one agent
    decided all layers at once, `network_curve` how its reward rose; `steps` is the curve of `keepdrop iterate`,
    `searches` how the reward of each agent of `keepdrop compare` rose, by target and seed; `predictions` are pictures
    of what a segmentation network answers.
    """

    path: Path
    command: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    methods: Mapping[str, tuple[Layer, ...]]
    curves: Mapping[str, Any]
    kept_channels: Mapping[str, Any]
    constructor: Mapping[str, Any] | None
    sizes: Mapping[str, int]
    one_shot: bool = False
    network_curve: tuple[float, ...] = ()
    steps: Mapping[str, Any] = field(default_factory=dict)
    searches: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    predictions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        """The metric's name, where it is known."""
        return (self.metrics or {}).get("metric")

    def split(self, role: str) -> Mapping[str, Any]:
        """What the run says of its "fit", "reward" or "report" split; nothing where it stopped before."""
        return (self.facts.get("splits") or {}).get(role) or {}

    def n_images(self, role: str) -> int:
        """Images of a split; 0 where the run does not say."""
        return int(self.split(role).get("n_images") or 0)

    @property
    def finished(self) -> bool:
        """Whether the run wrote its last file."""
        return self.metrics is not None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers as the run itself decided them (its controls left out)."""
        return next(iter(self.methods.values()), ())


def read_run(path: Path) -> Run:
    """Read a run folder; a missing, damaged or foreign one is a `UserError`."""
    if not path.is_dir():
        raise UserError(
            f"There is no run folder {str(path)!r}; expected the folder of an earlier run: look under runs/."
        )
    RunFolder.open(path)
    config, facts = read_config(path / CONFIG), read_json(path / FACTS) or {}
    architecture = read_json(path / "pruned/architecture.json") or {}
    metrics, kept = read_json(path / METRICS), architecture.get("kept", {})
    agent = read_json(path / "network/agent/facts.json") or {}
    return Run(
        path=path,
        command=_command(config, facts),
        config=config,
        facts=facts,
        metrics=metrics,
        methods=_methods(path) or _from_result(path / METRICS, metrics or {}, kept),
        curves=read_json(path / CURVES) or {},
        kept_channels=kept,
        constructor=architecture.get("constructor"),
        sizes=_sizes(path, config),
        one_shot=(path / JOINT).is_file(),
        network_curve=tuple(map(float, agent.get("reward_curve") or ())),
        steps=read_json(path / STEPS) or {},
        searches={file.stem: _curve(read_json(file) or {}) for file in sorted(path.glob(SEARCHES))},
        predictions=read_json(path / PREDICTIONS) or {},
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object of a run folder, None where the file is not there; a damaged one is a `UserError`."""
    return stored_json(path) if path.is_file() else None


def _curve(choice: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(map(float, (choice.get("facts") or {}).get("reward_curve") or ()))


def original_masks(run: Run) -> dict[str, tuple[bool, ...]]:
    """What each layer keeps, numbered as in the dense network, by layer.

    A layer that was pruned several times is counted in the filters it first had; `architecture.json` knows which of
    those are left.
    """
    masks: dict[str, tuple[bool, ...]] = {}
    for layer in run.layers:
        first = masks.get(layer.name)
        masks[layer.name] = layer.keep if first is None else _composed(first, layer.keep)
    for name, mask in masks.items():
        kept = run.kept_channels.get(name, {}).get("out")
        if kept is not None and len(kept) == sum(mask):
            masks[name] = tuple(i in set(kept) for i in range(len(mask)))
    return masks


def _composed(first: Sequence[bool], then: Sequence[bool]) -> tuple[bool, ...]:
    """Keep of what an earlier decision kept."""
    left = iter(then)
    return tuple(next(left, True) if one else False for one in first)


def _command(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    typed = facts.get("command") or []
    if len(typed) > 1 and isinstance(typed[1], str) and "=" not in typed[1] and not typed[1].startswith("-"):
        return typed[1]
    return next((command for key, command in COMMANDS_BY_KEY.items() if key in config), "train-cnn")


def _methods(path: Path) -> dict[str, tuple[Layer, ...]]:
    """Layers by decider: of `layers/`, and of `methods/NAME/layers/` in the order agent first."""
    if (path / JOINT).is_file():
        return {"agent": tuple(_layer(path / JOINT, content) for content in stored_json(path / JOINT, list, "a list"))}
    found = {"agent": _layers(path / "layers")} if (path / "layers").is_dir() else {}
    names = sorted((folder.name for folder in path.glob("methods/*")), key=lambda name: (name != "agent", name))
    found |= {name: _layers(path / "methods" / name / "layers") for name in names}
    return {name: layers for name, layers in found.items() if layers}


def _layers(folder: Path) -> tuple[Layer, ...]:
    # A layer's name may hold a slash, which makes a folder in a folder of it.
    files = sorted(folder.rglob("decision.json"))
    whole = (file for file in files if not any(part.endswith(".partial") for part in file.relative_to(folder).parts))
    return tuple(_layer(file, read_json(file), read_json(file.parent / "agent/facts.json")) for file in whole)


def _from_result(file: Path, metrics: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, tuple[Layer, ...]]:
    """Layers of a run that decided them in another way than one by one: counts from the metrics, masks from the file.

    A group whose filters are not simply the outputs of its first layer has no mask, and is left out.
    """
    layers = []
    for group in metrics.get("groups") or []:
        left = set(kept.get(group["name"], {}).get("out", range(group["n_filters"])))
        if len(left) == group["n_kept"]:
            keep = [i in left for i in range(group["n_filters"])]
            layers.append(_layer(file, {**group, "keep": keep, "pruned_accuracy": group["reward_split_accuracy"]}))
    return {layers[0].decided_by: tuple(layers)} if layers else {}


def _layer(file: Path, content: Any, agent: Any = None) -> Layer:
    content, agent = content or {}, agent or {}
    try:
        layer = Layer(
            name=str(content["name"]),
            n_filters=int(content["n_filters"]),
            n_kept=int(content["n_kept"]),
            keep=tuple(bool(one) for one in content["keep"]),
            decided_by=str(content["decided_by"]),
            pruned_accuracy=float(content["pruned_accuracy"]),
            recovered_accuracy=float(content["recovered_accuracy"]),
            within_bound=bool(content["within_bound"]),
            facts=dict(content.get("facts") or {}),
            reward_curve=tuple(map(float, agent.get("reward_curve") or ())),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(file)!r} is no decision of a layer ({error!r}); restore it.") from error
    if len(layer.keep) != layer.n_filters or sum(layer.keep) != layer.n_kept:
        raise UserError(f"{str(file)!r} contradicts itself: its mask and its counts differ; restore it.")
    return layer


def _sizes(path: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weight files that are still there: of the base, and of the pruned network."""
    given = config.get("checkpoint")
    base = path / "base/model.safetensors" if not given else Path(str(given))
    files = {"base": base, "pruned": path / "pruned/model.safetensors"}
    return {name: file.stat().st_size for name, file in files.items() if file.is_file()}
