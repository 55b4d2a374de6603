"""Gradient descent: SGD with Nesterov's momentum, and a step of it whose rate lies on the device (CUDA graphs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import UserError
from .train_settings import TrainSettings


def optimizer_of(model: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD over the trainable parameters, weight decay on those of two dimensions or more; UserError for none."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UserError("The network has no parameters, and there is nothing to train; train for 0 epochs.")
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def descend(optimizer: torch.optim.SGD, lr: float | Tensor) -> None:
    """A step of the optimizer at that rate.

    torch's own step asks a rate that is a tensor for its number, which waits for the device and cannot be captured as a
    CUDA graph. With a tensor () on the device this one does the same (docs of `torch.optim.SGD`), but for rounding:
    rate times gradient is rounded before it is subtracted. It takes momentum that is there (`begin_momentum`).
    """
    if isinstance(lr, Tensor) and not _has_sparse_gradients(optimizer):
        _descend_by(optimizer, lr)
        return
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    optimizer.step()


@torch.no_grad()
def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum of zero where there is none: after the first step it is the gradient, as torch begins it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@torch.no_grad()
def _descend_by(optimizer: torch.optim.SGD, lr: Tensor) -> None:
    for group in optimizer.param_groups:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        gradients = [parameter.grad for parameter in moved]
        if not moved:
            continue
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, moved, alpha=group["weight_decay"]))
        if group["momentum"]:
            kept = [optimizer.state[parameter]["momentum_buffer"] for parameter in moved]
            torch._foreach_mul_(kept, group["momentum"])
            torch._foreach_add_(kept, gradients)
            gradients = list(torch._foreach_add(gradients, kept, alpha=group["momentum"]))
        torch._foreach_sub_(moved, torch._foreach_mul(gradients, lr))


def _has_sparse_gradients(optimizer: torch.optim.SGD) -> bool:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters)
