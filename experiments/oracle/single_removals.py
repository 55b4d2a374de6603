"""What each filter is worth by itself: the network without it, measured, not estimated.

Shapes: N filters, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...envs.data.metrics import as_float64
from ...envs.data.objective import TOP1, Objective, output_of
from ...envs.evaluation.masked_network import MaskedNetwork
from ...envs.networks.memory_layout import arranged, layout_of
from ...envs.surgery.filter_group import FilterGroup


@dataclass(frozen=True)
class FilterOracle:
    """Of one group, each filter removed alone: all (N,) float64.

    Args:
        loss_change: the measure's loss without the filter minus with it (cross-entropy: nats), mean over images.
        accuracy_change: accuracy (or score) without the filter minus with it, a fraction.
    """

    loss_change: Tensor
    accuracy_change: Tensor


def filter_oracle(
    model: nn.Module,
    group: FilterGroup,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective = TOP1,
    method: str = "auto",
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> FilterOracle:
    """Remove every filter of `group` alone and measure the loss and the accuracy on all images.

    The oracle of Molchanov et al. (ICLR 2017, section 2.2). What lies in front of the group runs once; only the rest of
    the network runs for each filter (`MaskedNetwork`).

    Args:
        model: the network, never changed.
        group: found in it.
        images: (B, ...) of the reward split; labels: (B,) int64, or other targets.
        objective: what answers are scored by.
        method: "auto", "split" or "whole".
        batch: images per pass.
        progress: told how many images of all are done.
    """
    layout = layout_of(model, images)
    network = MaskedNetwork(model, [group], arranged(images[:3], layout), method=method)
    # Row 0 keeps everything: its loss is measured in the same arithmetic as the others.
    masks = ~torch.cat([torch.zeros(1, group.n_filters), torch.eye(group.n_filters)]).bool()
    losses = torch.zeros(len(masks), dtype=torch.float64)
    points = objective.room(len(masks), labels)
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        frontier = network.prefix(arranged(images[rows], layout))
        for index in range(len(masks)):
            with network.masked({group.name: masks}, index) as run:
                outputs = output_of(run(frontier))
            precise = as_float64(outputs)
            losses[index] += float(objective.summed_loss(precise, labels[rows].to(precise.device)))
            points[index, rows] = objective.points(outputs, labels[rows]).cpu()
        if progress is not None:
            progress(min(start + batch, len(images)), len(images))
    losses /= len(images)
    scores = torch.tensor([objective.fraction(each) for each in points], dtype=torch.float64)
    return FilterOracle(losses[1:] - losses[0], scores[1:] - scores[0])
