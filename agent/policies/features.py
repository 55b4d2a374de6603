"""Per-filter features that do not depend on the order, the number or the size of the filters.

Shape suffixes: N filters, D weights per filter, F statistics per filter, Q quantiles.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CLIP = 3.0


def check_observation(observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Unpack and check an observation.

    Returns:
        weights (N, D) and statistics (N, F).

    Raises:
        ValueError: a missing part, a wrong shape, or a value that is not finite.
    """
    missing = [key for key in ("weights", "statistics") if key not in observation]
    if missing:
        raise ValueError(f"the observation lacks {' and '.join(missing)}; it has {', '.join(sorted(observation))}")
    weights_ND, statistics_NF = observation["weights"], observation["statistics"]
    if weights_ND.ndim != 2 or statistics_NF.ndim != 2 or len(weights_ND) != len(statistics_NF):
        shapes = f"{tuple(weights_ND.shape)} and {tuple(statistics_NF.shape)}"
        raise ValueError(
            f"weights (N, D) and statistics (N, F) of the same filters were expected, but came as {shapes}"
        )
    for name, values in (("weights", weights_ND), ("statistics", statistics_NF)):
        if not torch.isfinite(values).all():
            raise ValueError(f"the observed {name} are not all finite; check the network and its data for NaN")
    return weights_ND, statistics_NF


def standardise(values_NF: Tensor) -> Tensor:
    """Each column with mean 0 and standard deviation 1 over the filters, clipped to +-3; constant columns 0."""
    centred_NF = values_NF - values_NF.mean(0)
    std_F = centred_NF.square().mean(0).sqrt()
    # Rounding leaves a constant column with a tiny spread, which must not be blown up to 1.
    constant_F = std_F <= 1e-5 * values_NF.abs().amax(0) + 1e-12
    return torch.where(constant_F, 0.0, centred_NF / std_F.clamp_min(1e-12)).clamp(-CLIP, CLIP)


def ranks(values_NF: Tensor) -> Tensor:
    """Each column's ranks spread over (-1, 1); equal values share their mean rank, so a constant column is 0."""
    columns_FN = values_NF.T.contiguous()
    sorted_FN = columns_FN.sort(-1).values
    below_FN = torch.searchsorted(sorted_FN, columns_FN, right=False)
    upto_FN = torch.searchsorted(sorted_FN, columns_FN, right=True)
    return ((below_FN + upto_FN).to(values_NF.dtype) / len(values_NF) - 1.0).T


def weight_quantiles(weights_ND: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Quantiles (N, Q) of each filter's absolute weights: a description that any D has."""
    return torch.quantile(weights_ND.abs(), weights_ND.new_tensor(quantiles), dim=1).T


def layer_context(statistics_NF: Tensor) -> Tensor:
    """What standardising took away (2F,): each column's mean and spread over the layer, on a log scale."""
    mean_F = statistics_NF.mean(0)
    std_F = (statistics_NF - mean_F).square().mean(0).sqrt()
    both = torch.cat([mean_F, std_F])
    return both.sign() * both.abs().log1p()


def ranked_scores(features: Sequence[Tensor], mix_F: Tensor, log_weights: Tensor) -> Tensor:
    """Scores (N,) of all filters, float64, comparable across groups: -rank / weight, with rank in (0, 1), best first.

    Cutting all filters at one score keeps the fraction weight x constant of each group.

    Args:
        features: (N_l, F) of each group, float64; mixed, they order its filters.
        mix_F: (F,) float64.
        log_weights: (L,) of the groups.
    """
    scores = []
    for log_weight, seen_NF in zip(log_weights, features, strict=True):
        order = (seen_NF @ mix_F).argsort(descending=True, stable=True)
        rank = torch.empty(len(order), dtype=torch.float64)
        rank[order] = (torch.arange(len(order), dtype=torch.float64) + 0.5) / len(order)
        scores.append(-rank * torch.exp(-log_weight))
    return torch.cat(scores)
