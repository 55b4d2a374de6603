"""A training loop of the caller's in the place of keepdrop's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...envs.networks.answers import as_given
from ...envs.networks.copying import copied
from ...envs.task import PruningTask, replace_model

OwnLoop = Callable[[nn.Module], object]


def retrained(model: nn.Module, loop: OwnLoop, seed: int) -> nn.Module:
    """A copy of `model`, trained in place by `loop`, in evaluation mode on the device it came from.

    torch's global generator is seeded inside and put back afterwards, so that a loop which shuffles with it repeats
    itself. What `loop` returns is ignored.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    trained = copied(model).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loop(as_given(trained))
    trained.zero_grad(set_to_none=True)
    return trained.to(device).eval()


class OwnRecovery:
    """Recovery after a cut by the caller's loop; kept only where the reward images do not fare worse."""

    def __init__(self, loop: OwnLoop) -> None:
        self.loop = loop

    def __call__(self, task: PruningTask, seed: int, working: Path) -> nn.Module:
        """The better of the network as it is and the trained one."""
        candidate = retrained(task.model, self.loop, seed)
        return candidate if replace_model(task, candidate).accuracy >= task.accuracy else task.model
