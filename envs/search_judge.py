"""What a search asks of a layer's masks beyond plain outcomes: adaptive evaluation, and the price of bfloat16.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..errors import UserError
from ..rewards.outcome import Outcome, RewardFunction
from .adaptive import AdaptiveSettings, judge_in_turn, strata_of
from .margins import margins
from .task import LayerTask


def check_adaptive(layer: object, settings: AdaptiveSettings | None) -> None:
    """Refuse adaptive evaluation of a task whose masks are not those of one filter group with a `UserError`."""
    if settings is not None and (not isinstance(layer, LayerTask) or not layer.group.consumers):
        raise UserError("search.adaptive=true works on one layer at a time; set search.adaptive=false for a network.")


def adaptive_outcomes(
    layer: LayerTask, reward: RewardFunction, masks_MN: Tensor, order: Tensor, settings: AdaptiveSettings
) -> tuple[list[Outcome], list[int]]:
    """Outcomes of M masks, each on as many images of `order` (B,) as it takes to settle its rank; and these numbers."""
    masks = layer.allowed(masks_MN)
    mixes, name = layer.mixes(masks), layer.group.name
    base, counts = layer.task.base.correct[order], masks.sum(1).tolist()
    outcomes = [layer.task.outcome(1.0, 1.0, {layer.group: kept}) for kept in counts]

    def answers(rows: Tensor, images: Tensor) -> Tensor:
        chosen = {key: mix[rows] for key, mix in mixes.items()}
        return layer.search_evaluator.correct_per_image({name: masks[rows]}, image_indices=images, mixes=chosen)

    def worth(mask: int, base_accuracy: float, accuracy: float) -> float:
        outcome = replace(outcomes[mask], base_accuracy=base_accuracy, pruned_accuracy=accuracy)
        return reward(outcome).value

    same = (masks[:, None] == masks[None, :]).all(2)
    unit = layer.task.objective.unit
    found_margins = margins(layer)
    strata = None if found_margins is None else strata_of(found_margins[order])
    verdict = judge_in_turn(answers, worth, base, same, order, settings, unit, strata)
    found = [
        replace(outcome, base_accuracy=dense, pruned_accuracy=accuracy)
        for outcome, dense, accuracy in zip(
            outcomes, verdict.base_accuracy.tolist(), verdict.accuracy.tolist(), strict=True
        )
    ]
    return found, verdict.n_images.tolist()


def disagreement(layer: LayerTask, masks_MN: Tensor) -> dict[str, float]:
    """How a search's precision differs from float32 on the whole reward split, under M masks.

    Returns `answers` (fraction of all answers that are right in one and wrong in the other, or have other scores) and
    `accuracy` (the largest difference of a mask's accuracy).
    """
    masks = {layer.group.name: layer.allowed(masks_MN)}
    mixes = layer.mixes(masks[layer.group.name])
    exact = layer.evaluator.correct_per_image(masks, mixes=mixes)
    quick = layer.search_evaluator.correct_per_image(masks, mixes=mixes)
    apart = (exact.double().mean(1) - quick.double().mean(1)).abs() / layer.task.objective.unit
    return {"answers": float((exact != quick).double().mean()), "accuracy": float(apart.max())}
