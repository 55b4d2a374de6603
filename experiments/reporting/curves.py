"""`curves.json`: what each step of the schedule costs, and what controls at the agent's own counts would have done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.one_shot import OneShotTask
from ...envs.surgery.filter_group import FilterGroup
from ...envs.surgery.group_cost import pruned_cost
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import LayerTask, PruningTask, replace_model
from ..pruning.decide import AskCriterion, Decider, Decision
from ..pruning.schedule import LayerRecord
from ..runs.console import Terminal
from ..runs.folder import RunFolder
from ..runs.seeds import derive_seed
from .run_data import CURVES

MAX_IMAGES = 1000  # controls are context, not a result: a thousand images tell 3 points apart
REPLAYED = "agent"


def write_curves(
    task: PruningTask,
    records: Sequence[LayerRecord],
    folder: RunFolder,
    terminal: Terminal,
    controls: Sequence[str] = (),
    seed: int = 0,
    one_shot: OneShotTask | None = None,
) -> None:
    """Write MACs after every layer and, if wished, the accuracies of controls; a resumed run has them already.

    Args:
        task: on the dense network.
        records: of the schedule, in its order.
        folder: gets `curves.json`.
        terminal: shows progress.
        controls: criteria that keep as many filters per layer as the records do; none skips them.
        seed: of the run.
        one_shot: cuts and repairs the layers together, where the run did.
    """
    if (folder / CURVES).is_file():
        return
    content: dict[str, Any] = {
        "macs": macs_after(task, records),
        "base_macs": task.base.cost.macs,
        "base_bytes": weight_bytes(task.model),
    }
    names = [record.name for record in records]
    if controls and records and len(set(names)) == len(names):
        content["controls"] = control_curves(task, records, controls, seed, terminal, one_shot)
    folder.write_json(CURVES, content)


def macs_after(task: PruningTask, records: Sequence[LayerRecord]) -> list[int]:
    """MACs per image once the first, the first two, ... of the layers are cut."""
    groups = {group.name: group for group in task.groups}
    kept: dict[FilterGroup, int] = {}
    macs = []
    for record in records:
        group = groups[record.name]
        # A layer that comes again keeps part of what it had left.
        kept[group] = kept.get(group, group.n_filters) - (record.n_filters - record.n_kept)
        macs.append(pruned_cost(task.model, task.cost, kept)[0])
    return macs


def weight_bytes(model: nn.Module) -> int:
    """Size of the network's weight file as keepdrop would write it."""
    return len(save({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}))


def control_curves(
    task: PruningTask,
    records: Sequence[LayerRecord],
    controls: Sequence[str],
    seed: int,
    terminal: Terminal,
    one_shot: OneShotTask | None = None,
) -> dict[str, Any]:
    """Accuracies after each layer, without recovery, of the agent's own masks and of every control.

    All use the reward split (its first `MAX_IMAGES` images; a split is shuffled) and the run's own compensation, or its
    repair of the whole network (`one_shot`), so that nothing but the choice of filters differs. The report split is not
    touched.
    """
    images = task.splits.reward.select(torch.arange(min(MAX_IMAGES, len(task.splits.reward))))
    counts = {record.name: record.n_kept for record in records}
    deciders: dict[str, Decider] = {REPLAYED: _Replay(records)}
    deciders |= {name: AskCriterion(name, counts) for name in controls}
    base = task.base.correct[: len(images)]
    curves: dict[str, list[float]] = {}
    terminal.say(f"Measuring the controls of the report: {', '.join(controls)} (controls=[] leaves them out)")
    with terminal.progress("controls", len(deciders) * len(records)) as bar:
        for name, decide in deciders.items():
            steps = (
                _layer_by_layer(task, decide, list(counts), seed)
                if one_shot is None
                else _jointly(one_shot, decide, seed)
            )
            curves[name] = []
            for layer, model in steps:
                curves[name].append(accuracy_on(model, images))
                bar.advance_by(1, f"{name}, {layer}")
    return {"n_images": len(images), "base_accuracy": task.objective.fraction(base), "methods": curves}


Steps = Iterator[tuple[str, nn.Module]]
"""A layer's name, and the network with it and all before it cut."""


def _layer_by_layer(task: PruningTask, decide: Decider, names: Sequence[str], seed: int) -> Steps:
    kept = KeptChannels()
    for name in names:
        layer = task.layer(name)
        keep = layer.allowed(decide(layer, Path(), derive_seed(seed, name)).keep[None])[0]
        kept = kept.after(task.model, {layer.group: keep})
        task = replace_model(task, layer.cut(keep), kept)
        yield name, task.model


def _jointly(one_shot: OneShotTask, decide: Decider, seed: int) -> Steps:
    masks = {group.name: torch.ones(group.n_filters, dtype=torch.bool) for group in one_shot.groups}
    for layer in one_shot.layers:
        name = layer.group.name
        masks[name] = layer.allowed(decide(layer, Path(), derive_seed(seed, name)).keep[None])[0]
        yield name, one_shot.cut(one_shot.joined(masks))


class _Replay:
    """Decides what was decided."""

    def __init__(self, records: Sequence[LayerRecord]) -> None:
        self.masks: Mapping[str, Sequence[bool]] = {record.name: record.keep for record in records}

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        return Decision(torch.tensor(self.masks[layer.group.name]), REPLAYED)
