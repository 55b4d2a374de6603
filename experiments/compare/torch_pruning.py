"""The outside peer: torch-pruning's own pruner chooses, and is then cut and measured like everyone else."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from ...envs.networks.copying import copied
from ...envs.surgery.targets import Constraints, Target
from ...envs.task import PruningTask
from ...errors import UserError
from .methods import PEERS, Masks

HALVINGS = 12  # of the interval of ratios: fine enough for layers of 4,096 filters


class TorchPruning:
    """`torch_pruning.pruner.GroupNormPruner` with L1 group magnitudes, at the ratio that meets the MACs target.

    Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023); importances summed over all layers of a group
    and divided by the group's mean, as is torch-pruning's default. Layers outside the chosen groups are ignored.

    Args:
        global_pruning: rank the filters of all layers together instead of keeping the same fraction of each.
    """

    def __init__(self, global_pruning: bool = False) -> None:
        self.global_pruning = global_pruning
        self.name = PEERS[global_pruning]
        self.facts: dict[str, Any] = {}

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Bisect the pruning ratio; the smallest that meets the target counts."""
        goal = task.constraints(target)
        low, high = 0.0, 1.0
        best = None
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            masks = self.masks_at(task, ratio)
            if _holds(goal, masks):
                best, high = masks, ratio
            else:
                low = ratio
        if best is None:
            raise UserError(
                f"{self.name} does not reach {100 * goal.removed:g} % of the MACs at any ratio; leave it out of "
                "methods or give a smaller target."
            )
        self.facts = {"pruning_ratio": high}
        return best

    def masks_at(self, task: PruningTask, ratio: float) -> Masks:
        """What torch-pruning keeps at a pruning ratio; groups it does not touch keep everything."""
        import torch_pruning

        model = copied(task.model).requires_grad_(True)  # its graph is found by autograd
        masks = {group.name: torch.ones(group.n_filters, dtype=torch.bool) for group in task.groups}
        roots = {cut.module: (group, cut) for group in task.groups for cut in group.producers}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # its own deprecations
            pruner = torch_pruning.pruner.GroupNormPruner(
                model,
                task.example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
                pruning_ratio=ratio,
                global_pruning=self.global_pruning,
                ignored_layers=_ignored(model, roots),
                root_module_types=[torch.nn.modules.conv._ConvNd],
            )
            names = {module: name for name, module in model.named_modules()}
            for found in pruner.step(interactive=True):
                dependency, indices = found[0]
                group, cut = roots[names[dependency.target.module]]
                gone = torch.isin(torch.from_numpy(cut.channels), torch.as_tensor(list(indices)))
                masks[group.name] &= ~gone.all(1)
        return masks


def unavailable() -> str | None:
    """Why the peer cannot take part, or None."""
    if importlib.util.find_spec("torch_pruning") is None:
        return "torch-pruning is not installed, so it does not take part: pip install keepdrop[peers]"
    return None


def _ignored(model: torch.nn.Module, roots: Iterable[str]) -> list[torch.nn.Module]:
    """Convolutions and linear layers whose filters are not to be pruned; a normalisation goes with its convolution."""
    wanted, kinds = set(roots), (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
    return [module for name, module in model.named_modules() if isinstance(module, kinds) and name not in wanted]


def _holds(goal: Constraints, masks: Masks) -> bool:
    return goal.holds([int(masks[group.name].sum()) for group in goal.groups])
