"""Classic pruning criteria (L1, L2, FPGM, APoZ, Taylor, ...) as greedy agents that see what the learned ones see.

Every criterion gives one score per filter, higher is more important, from the observation alone.

Shape suffixes: N filters, D weights per filter, F statistics per filter.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .policies.distributions import top_mask
from .policies.features import check_observation


def _l1(weights_ND: Tensor) -> Tensor:
    return weights_ND.abs().sum(1)


def _l2(weights_ND: Tensor) -> Tensor:
    return weights_ND.square().sum(1).sqrt()


def _fpgm(weights_ND: Tensor) -> Tensor:
    # Not torch.cdist's default: its matrix-product form loses the small distances between near-equal filters.
    return torch.cdist(weights_ND, weights_ND, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _taylor(values_N: Tensor) -> Tensor:
    norm = values_N.square().sum().sqrt()
    return values_N / norm if norm > 0 else values_N


FROM_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "l2": _l2, "fpgm": _fpgm}
FROM_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_activation": lambda values_N: values_N,
    "apoz": torch.neg,
    "taylor": _taylor,
    "bn_scale": torch.abs,
}
CRITERIA = (*FROM_WEIGHTS, *FROM_STATISTICS, "random")


def scores(
    observation: Mapping[str, Tensor],
    statistic_names: Sequence[str],
    criterion: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The importance (N,) of each filter, float64.

    - l1, l2: norm of the filter's weights (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017).
    - fpgm: sum of the distances to all other filters, small near the geometric median (He et al., CVPR 2019, eq. 4).
    - mean_activation: the statistic (Molchanov et al., ICLR 2017, section 2.2).
    - apoz: minus the average percentage of zeros (Hu et al., "Network Trimming", 2016, eq. 1).
    - taylor: the statistic, l2-normalised over the layer (Molchanov et al., section 2.2, eq. 7 and 8).
    - bn_scale: absolute BN scale (Liu et al., "Network Slimming", ICCV 2017).
    - random: uniform, from the generator.

    Args:
        observation: `weights` (N, D) and `statistics` (N, F).
        statistic_names: the statistics in the observation's order.
        criterion: one of `CRITERIA`.
        generator: needed for random.

    Raises:
        ValueError: an unknown criterion, a statistic the observation lacks, or random without a generator.
    """
    weights_ND, statistics_NF = check_observation(observation)
    if criterion in FROM_WEIGHTS:
        return FROM_WEIGHTS[criterion](weights_ND.double())
    if criterion in FROM_STATISTICS:
        column_N = statistics_NF[:, _column(statistic_names, statistics_NF.shape[1], criterion)]
        return FROM_STATISTICS[criterion](column_N.double())
    if criterion != "random":
        raise ValueError(f"criterion is {criterion!r}, but it must be one of {', '.join(CRITERIA)}")
    if generator is None:
        raise ValueError("the random criterion needs a generator, so that its choice can be repeated")
    return torch.rand(len(weights_ND), generator=generator, dtype=torch.float64)


def normalised(scores_N: Tensor, criterion: str) -> Tensor:
    """Scores of one layer made comparable with those of others: divided by their l2 norm (Molchanov et al., eq. 8).

    APoZ, whose scores are negative, is first turned into the share of values that are positive. A layer of zeros
    stays zero.
    """
    values_N = 1.0 + scores_N if criterion == "apoz" else scores_N
    norm = values_N.square().sum().sqrt()
    return values_N / norm if norm > 0 else values_N


class CriterionAgent:
    """A criterion as an agent: keeps the filters with the highest scores.

    Args:
        criterion: one of `CRITERIA`.
        generator: needed for random; each decision draws from it.
    """

    def __init__(self, criterion: str, generator: torch.Generator | None = None) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}, but it must be one of {', '.join(CRITERIA)}")
        self.criterion = criterion
        self.generator = generator

    def keep(self, observation: Mapping[str, Tensor], statistic_names: Sequence[str], n_keep: int) -> Tensor:
        """The mask (N,), bool, of the n_keep most important filters; of equal ones the first.

        Raises:
            ValueError: n_keep outside 1 to N, and as in `scores`.
        """
        return top_mask(scores(observation, statistic_names, self.criterion, self.generator), n_keep)


def _column(names: Sequence[str], n_statistics: int, wanted: str) -> int:
    if len(names) != n_statistics:
        raise ValueError(f"{len(names)} statistics are named, but the observation has {n_statistics} per filter")
    if wanted not in names:
        raise ValueError(
            f"the criterion {wanted} reads the statistic {wanted!r}, but there are only {', '.join(names)}"
        )
    return list(names).index(wanted)
