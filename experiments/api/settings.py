"""How a search from Python goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from ...agent.learning.trainer import AgentSettings
from ...agent.policies.set_policy import SetPolicy
from ...envs.data.metrics import Metric
from ...envs.data.objective import TOP1, Loss
from ...envs.data.splits import Source
from ...envs.networks.answers import Output
from ...envs.surgery.limits import Limits
from ...envs.task import EvaluationSettings
from ...errors import UserError
from ...ranges import IMAGES, IMAGES_OR_NONE, MASKS, SEED, check_numbers
from ...rewards.outcome import RewardFunction
from ..deploy.clock import ClockSettings
from ..pruning.layer_agents import PolicyFactory
from ..pruning.network_search import NetworkSearchSettings
from ..training.train_settings import TrainSettings

FINETUNE = TrainSettings(epochs=10, batch_size=64, top_lr=0.05, distill_weight=0.5)
POLICY: PolicyFactory = partial(SetPolicy, warm_start="taylor")


@dataclass(frozen=True)
class Settings:
    """How the search goes; the defaults are those of `keepdrop prune`, except for the reward images.

    Args:
        reward_from: where reward images come from, which the network must not have been trained on: "test", or "train"
            where it was trained elsewhere.
        reward_size: images masks are scored on; None: a fifth of the source, at most 2,000.
        split_seed: draws the reward images.
        order: "forward" (low to high), "backward" or "largest_first".
        masks: sampled per update of an agent.
        images: reward images per mask; None for all.
        agent: how each layer's agent is trained.
        evaluation: how masks are evaluated, compensation included.
        reward: what an agent is trained on; None: `TryAndLearn(drop_bound)`.
        policy: makes a layer's policy from whichever of n_filters, n_weights, n_statistics, statistic_names and seed
            it asks for.
        bn_images: fit images on which batch normalisation is measured anew after a cut; 0 leaves it.
        network: how the agent of all layers is trained, with a target.
        surgery: what no decision may do: widths that are no multiple of `round_to`, fewer filters than `min_kept`, or
            losing one that `protect` names, as in `Limits(round_to=8, protect={"conv1": [0, 3]})`.
        profile: which measured times a target or reward of time goes by: the runtime and the batch size.
        metric: what stands wherever accuracy does: (outputs, targets) -> a score in [0, 1] an image, higher is better.
        loss: what training minimises and Taylor looks at, (outputs, targets) -> their mean loss; None: cross-entropy
            for integer targets, the mean squared error for floating ones.
        output: which output of the network metric and loss take, where it answers with several: a name, a position, a
            dotted path ("heads.age.0"), or several of these, which are put side by side. None: `logits`, `out` or the
            first one.
    """

    reward_from: Source = "test"
    reward_size: int | None = None
    split_seed: int = 0
    order: str = "forward"
    masks: int = 16
    images: int | None = 300
    agent: AgentSettings = field(default_factory=AgentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reward: RewardFunction | None = None
    policy: PolicyFactory = POLICY
    bn_images: int = 0
    network: NetworkSearchSettings = field(default_factory=NetworkSearchSettings)
    surgery: Limits = field(default_factory=Limits)
    profile: ClockSettings = field(default_factory=ClockSettings)
    metric: Metric = TOP1.metric
    loss: Loss | None = None
    output: Output | None = None

    def __post_init__(self) -> None:
        if self.masks < 2:
            raise UserError(f"masks is {self.masks}; expected 2 or more: rewards are compared with one another.")
        check_numbers(self, masks=MASKS, images=IMAGES, reward_size=IMAGES, split_seed=SEED, bn_images=IMAGES_OR_NONE)
