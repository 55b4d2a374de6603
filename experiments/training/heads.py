"""Auxiliary heads: of what a network answers in training mode, the output that counts, and the further ones.

GoogLeNet and Inception answer with a named tuple in training, deep supervision with a list, segmentation networks with
a dictionary. The output that counts is the one that equals the answer in evaluation mode; outputs like it in
dimensions and channels are auxiliary heads, everything else (features, attention maps) is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree

from ...envs.data.objective import output_of
from ...envs.networks.modes import modes_restored
from ...errors import UserError

NAMES = ("out", "logits")  # of the main output, where values do not tell


@dataclass(frozen=True)
class Answers:
    """A network's answers in training mode: the one that counts, and those of auxiliary heads."""

    main: Tensor
    auxiliary: tuple[Tensor, ...] = ()


class Heads:
    """Finds the main output of a network in its training-mode answers; where they are a tensor, nothing is done."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._main: int | None = None

    def __call__(self, answers: Any, images: Tensor) -> Answers:
        """What the network returned for `images` (B, C, H, W); UserError if no output is like that of evaluation."""
        if isinstance(answers, Tensor):
            return Answers(answers)
        outputs = _tensors(answers)
        if self._main is None:
            self._main = main_output(self.model, images[:2])
        main = outputs[self._main][1]
        others = [value for position, (_, value) in enumerate(outputs) if position != self._main]
        return Answers(main, tuple(_like(main, value) for value in others if _is_head(value, main)))


@torch.no_grad()
def main_output(model: nn.Module, images: Tensor) -> int:
    """The position of the output that counts among the tensors of a training-mode answer."""
    with modes_restored(model), torch.random.fork_rng(devices=[]):
        wanted = output_of(model.eval()(images))
        for module in nn.Module.modules(model):  # heads run, but batch normalisation and dropout do as in evaluation
            module.training = any(True for _ in module.children())
        outputs = _tensors(model(images))
    alike = [position for position, (_, value) in enumerate(outputs) if value.shape == wanted.shape]
    equal = [position for position in alike if torch.allclose(outputs[position][1], wanted, rtol=1e-3, atol=1e-4)]
    named = [position for position in alike if outputs[position][0] in NAMES]
    if not alike:
        shapes = ", ".join(str(tuple(value.shape)) for _, value in outputs) or "no tensors"
        raise UserError(
            f"In training mode the network returns {shapes}, and {tuple(wanted.shape)} in evaluation mode; expected an "
            "output of that shape among them.",
            python="Train it with a loop of your own: finetune=FUNCTION, recover=FUNCTION or None.",
            typed="Prune without training (finetune.epochs=0 recovery.train.epochs=0), or from Python with your loop.",
        )
    return (equal or named or alike)[0]


def _tensors(answers: Any) -> list[tuple[str, Tensor]]:
    """Floating tensors in an answer, in order, with the last part of their name or position."""
    if not isinstance(answers, tuple | list | dict) and hasattr(answers, "__dict__"):
        answers = dict(vars(answers))
    found = _pytree.tree_flatten_with_path(answers)[0]
    return [
        (str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else "", value)
        for path, value in found
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


def _is_head(value: Tensor, main: Tensor) -> bool:
    return value.dim() == main.dim() and value.shape[:2] == main.shape[:2] and value.requires_grad


def _like(main: Tensor, value: Tensor) -> Tensor:
    """An auxiliary map in the main one's size."""
    if value.shape == main.shape or value.dim() not in (3, 4, 5):
        return value
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[value.dim()]
    return functional.interpolate(value, size=main.shape[2:], mode=mode, align_corners=False)
