"""How nearly the dense network is undecided about an image: what adaptive evaluation draws images by.

Shapes: B images.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .evaluation.mask_evaluator import MaskEvaluator
from .task import LayerTask

BATCH = 256

_KNOWN: WeakKeyDictionary[MaskEvaluator, Tensor] = WeakKeyDictionary()


def margins(layer: LayerTask) -> Tensor | None:
    """Largest logit minus the next of the layer's network as it is, (B,) on the whole reward split, computed once.

    None where answers are judged by another metric than top-1, or there is but one logit.
    """
    evaluator = layer.search_evaluator
    if not layer.task.objective.is_top1:
        return None
    if evaluator not in _KNOWN:
        _KNOWN[evaluator] = _computed(evaluator, layer.task.reward_images[0])
    return _KNOWN[evaluator] if len(_KNOWN[evaluator]) else None


@torch.inference_mode()
def _computed(evaluator: MaskEvaluator, images: Tensor) -> Tensor:
    """All margins; none (0,) if there is but one logit."""
    found, network = [], evaluator.network
    with network.masked({}, 0) as run:
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            cached = evaluator.frontier
            values = network.prefix(images[rows]) if cached is None else tuple(value[rows] for value in cached)
            logits = run(values).float()
            if logits.shape[1] < 2:
                return torch.empty(0)
            top = logits.topk(2, dim=1).values
            found.append((top[:, 0] - top[:, 1]).cpu())
    return torch.cat(found).clone()
