"""The paper's policy: a layer's filters read as one N x D matrix.

Shape suffixes: N filters, D weights per filter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ranges import COUNT, POSITIVE, check_number
from .distributions import MaskDistribution
from .features import check_observation
from .policy import Exploration, ThresholdHead, check_keep

POOLED = 8
SMALL_D = 64


class LayerMatrixPolicy(nn.Module):
    """Convolutions over the N x D filter matrix, then fully connected layers to one logit per filter.

    Huang et al. (arXiv 1801.07365), section 3: blocks of a 7x7 convolution and pooling, then fully
    connected; only fully connected where D is small. The number of blocks, channels and units is not
    published; those here are ours. Deviations: the matrix is standardised, pooling is adaptive at the end
    so that every N and D fits, and the last layer starts near zero so that every filter starts with
    probability `initial_keep`. Filter i is read at row i: trained on one checkpoint, it means nothing on another.

    Args:
        n_filters: N.
        n_weights: D.
        channels: of the convolution blocks.
        hidden: units of the fully connected layer.
        exploration: "bernoulli" (the paper) or "budget" (a sampled threshold).
        initial_keep: keep probability at the start, in (0, 1).
        initial_scale: first standard deviation of a sampled threshold, as a fraction of the layer.
        seed: of the initial weights.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        n_filters: int,
        n_weights: int,
        channels: Sequence[int] = (4, 8),
        hidden: int = 128,
        exploration: Exploration = "bernoulli",
        initial_keep: float = 0.85,
        initial_scale: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {
            "n_filters": n_filters,
            "n_weights": n_weights,
            "channels": list(channels),
            "hidden": hidden,
            "exploration": exploration,
            "initial_keep": initial_keep,
            "initial_scale": initial_scale,
            "seed": seed,
        }
        check_keep(initial_keep)
        for name, value in (("n_filters", n_filters), ("n_weights", n_weights), ("hidden", hidden)):
            check_number(name, value, COUNT)
        check_number("channels", channels, COUNT)
        check_number("initial_scale", initial_scale, POSITIVE)
        self.n_filters, self.n_weights = n_filters, n_weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = self._body(channels, hidden)
            self.last = nn.Linear(hidden, n_filters)
        nn.init.normal_(self.last.weight, std=1e-3, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.last.bias)
        self.head = ThresholdHead(exploration, -math.log(initial_keep / (1.0 - initial_keep)), 4.0 * initial_scale)

    def _body(self, channels: Sequence[int], hidden: int) -> nn.Sequential:
        if self.n_weights < SMALL_D:
            return nn.Sequential(nn.Flatten(), nn.Linear(self.n_filters * self.n_weights, hidden), nn.ReLU())
        # Rows are pooled only while there are many: the row is what tells filters apart.
        pool = (2 if self.n_filters >= SMALL_D else 1, 4)
        blocks: list[nn.Module] = []
        for before, after in zip((1, *channels[:-1]), channels, strict=True):
            blocks += [nn.Conv2d(before, after, 7, padding=3), nn.ReLU(), nn.MaxPool2d(pool, ceil_mode=True)]
        rows = min(self.n_filters, 4 * POOLED)
        blocks += [nn.AdaptiveAvgPool2d((rows, POOLED)), nn.Flatten()]
        return nn.Sequential(*blocks, nn.Linear(channels[-1] * rows * POOLED, hidden), nn.ReLU())

    def forward(self, observation: Mapping[str, Tensor]) -> MaskDistribution:
        """The distribution over keep masks for `weights` (N, D); the statistics are not read.

        Raises:
            ValueError: another layer's weights, or a value that is not finite.
        """
        weights_ND, _ = check_observation(observation)
        if weights_ND.shape != (self.n_filters, self.n_weights):
            raise ValueError(
                f"this policy reads {self.n_filters} filters of {self.n_weights} weights, but the observation has "
                f"{weights_ND.shape[0]} of {weights_ND.shape[1]}; use the agent of this layer or a SetPolicy"
            )
        std, mean = torch.std_mean(weights_ND, correction=0)
        matrix = ((weights_ND - mean) / std.clamp_min(1e-12))[None, None]
        return self.head(self.last(self.body(matrix)).flatten())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The threshold and the last biases learn at 0.3 of the rate, the network at 0.1 of it.

        Each bias learns about its own filter only, so it must average over more masks than a SetPolicy's weights.
        """
        fast = [self.head.location, self.head.log_scale, self.last.bias]
        fast_ids = {id(parameter) for parameter in fast}
        slow = [parameter for parameter in self.parameters() if id(parameter) not in fast_ids]
        return [{"params": fast, "lr_scale": 0.3}, {"params": slow, "lr_scale": 0.1}]
