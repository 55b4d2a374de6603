"""Training that survives a kill: weights, momentum and moving average after every epoch, in one safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...atomic import write_atomically
from ...errors import UserError
from .averaging import Average


@dataclass
class TrainingState:
    """A training between two epochs: the model, its optimizer, who it is, the steps done, and the average if any."""

    model: nn.Module
    optimizer: torch.optim.SGD
    identity: str
    step: int = 0
    average: Average | None = None

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters in the optimizer's order, under names made of their position."""
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return ((f"momentum/{position}", parameter) for position, parameter in enumerate(parameters))


def save_snapshot(state: TrainingState, path: Path) -> None:
    """Write weights, buffers, momentum, average and step number to `path`, atomically; UserError on a full disk."""
    tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.trained():
        buffer = state.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[name] = buffer
    if state.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.tensors.items()}
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = {"identity": state.identity, "step": str(state.step)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=facts))


def load_snapshot(state: TrainingState, path: Path) -> int:
    """Fill the model and the optimizer from `path`; returns the step. UserError for another training's, or damage."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"Training snapshot '{path}' is damaged; delete it to train from the start.") from error
    if facts.get("identity") != state.identity:
        raise UserError(
            f"Training snapshot '{path}' belongs to a training with other settings, seed, data or network; "
            "delete it or use another run folder."
        )
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    state.model.load_state_dict(weights)
    for name, parameter in state.trained():
        if name in tensors:
            # In the parameter's own memory layout, like the buffer SGD makes itself.
            state.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(tensors[name])
    for name, kept in state.average.tensors.items() if state.average is not None else ():
        kept.copy_(tensors[f"average/{name}"])
    return int(facts["step"])
