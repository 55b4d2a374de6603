"""The schema and the defaults of every root configuration: an unknown key or a wrong type fails while it is composed.

This is the one place for defaults. The YAML files repeat some of them beside the comment that explains them, and the
Python interface takes them from the same settings; tests/experiments/config/test_defaults.py holds all of them equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ...agent.learning.many_networks import PolicyGradientSettings, PolicyScales
from ...agent.learning.natural_evolution import NetworkAgentSettings
from ...agent.learning.trainer import AgentSettings
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.limits import Limits
from ...envs.task import EvaluationSettings
from ...errors import UserError
from ...ranges import COUNT, COUNT_OR_NONE, IMAGES, MASKS, NOT_NEGATIVE, SEED, check_numbers
from ..api.settings import FINETUNE
from ..deploy.clock import ClockSettings
from ..deploy.profiling import ProfileSettings
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.recover import RecoverySettings
from ..training.loop import TrainSettings

BETWEEN_REMOVALS = TrainSettings(batch_size=64, lr=0.01, schedule="constant", warmup=0.0, distill_weight=0.5)
BASE = TrainSettings(epochs=15, batch_size=64, top_lr=0.1, warmup=0.2)
INHERITED = "inherited"  # what `keepdrop apply` takes from a run, as an option of every group


@dataclass
class SplitConfig:
    """Where rewards are measured: held out of "train", or taken from "test" (a checkpoint trained on all of train)."""

    reward_from: str = "train"
    reward_size: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, reward_size=IMAGES, seed=SEED)


@dataclass
class SearchConfig:
    """What an update costs: masks, and reward images per mask (null: all)."""

    masks: int = 16
    images: int | None = 300

    def __post_init__(self) -> None:
        if self.masks < 2:
            raise UserError(f"search.masks is {self.masks}; expected 2 or more: rewards are compared with one another.")
        if self.images is not None and self.images < 1:
            raise UserError(f"search.images is {self.images}; expected 1 or more, or null for all reward images.")
        check_numbers(self, masks=MASKS, images=IMAGES)


@dataclass
class LatencyConfig:
    """How latency is measured: batch sizes, timed repeats, warm-up, and eager, compile, onnxruntime (or all)."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 64])
    repeats: int = 20
    warmup: int = 3
    runtimes: list[str] = field(default_factory=lambda: ["eager"])

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1 or self.repeats < 1 or self.warmup < 0:
            raise UserError(
                f"latency is batch_sizes={list(self.batch_sizes)}, repeats={self.repeats}, warmup={self.warmup}; "
                "expected batch sizes and repeats of 1 or more, and a warmup of 0 or more."
            )
        check_numbers(self, batch_sizes=COUNT, repeats=COUNT, warmup=COUNT_OR_NONE)


@dataclass
class TargetConfig:
    """What the pruned network may cost, all that is given at once; null everywhere prunes within the drop bound.

    Args:
        removed: fraction of the MACs to remove.
        of: whose, the "network"'s or the pruned "groups"' own.
        latency: fraction of the dense network's time that may be left.
        milliseconds: time that may be left.
        params: fraction of the dense network's parameters that may be left.
        bytes: size that the file of the weights may have.
    """

    removed: float | None = None
    of: str = "network"
    latency: float | None = None
    milliseconds: float | None = None
    params: float | None = None
    bytes: int | None = None


@dataclass
class TargetsConfig:
    """What a comparison removes: fractions of the MACs of the pruned layers themselves ("groups") or of "network"."""

    removed: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    of: str = "network"


@dataclass
class RandomBestConfig:
    """A random search: masks judged; null: as many as the agent had judged, 100 without one."""

    evaluations: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, evaluations=COUNT)


@dataclass
class IterateTargetConfig:
    """When to stop: a fraction of the network's "macs" or "params" is gone (null: never), or the drop bound breaks."""

    removed: float | None = 0.5
    resource: str = "macs"
    hold_bound: bool = False


@dataclass
class RootConfig:
    """What every command has."""

    seed: int = 0
    device: str = "cpu"
    run_dir: str = "???"
    quiet: bool = False
    data: Any = None
    network: Any = None
    augment: Any = None
    metric: Any = None
    loss: Any = None
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class TrainCnnConfig(RootConfig):
    """`keepdrop train-cnn`."""

    base: TrainSettings = field(default_factory=lambda: BASE)
    resume: str | None = None


@dataclass
class CheckpointConfig(RootConfig):
    """What every command has that looks at a trained network: its weights, or how to train it."""

    checkpoint: str | None = None
    base: TrainSettings = field(default_factory=lambda: BASE)


@dataclass
class PruningConfig(CheckpointConfig):
    """What every command that prunes has."""

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    surgery: Limits = field(default_factory=Limits)
    drop_bound: float = 0.02


@dataclass
class PruneConfig(PruningConfig):
    """`keepdrop prune`."""

    agents: str | None = None
    layers: list[str] | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    profile: ClockSettings = field(default_factory=ClockSettings)
    engine: Any = None
    network_search: NetworkSearchSettings = field(default_factory=NetworkSearchSettings)
    repair: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    order: str = "forward"
    reward: Any = None
    policy: Any = None
    agent: AgentSettings = field(default_factory=AgentSettings)
    search: SearchConfig = field(default_factory=SearchConfig)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    finetune: TrainSettings = field(default_factory=lambda: FINETUNE)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    export: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=lambda: ["l1", "random"])
    warm_start: str | None = None
    resume: str | None = None


@dataclass
class TrainAgentConfig(PruningConfig):
    """`keepdrop train-agent`."""

    layer: str = "???"
    profile: ClockSettings = field(default_factory=ClockSettings)
    reward: Any = None
    policy: Any = None
    agent: AgentSettings = field(default_factory=AgentSettings)
    search: SearchConfig = field(default_factory=SearchConfig)
    warm_start: str | None = None


@dataclass
class ApplyConfig(RootConfig):
    """`keepdrop apply`: what is not given comes from the run in which the agents were trained."""

    agents: str | None = None
    checkpoint: str | None = None
    controls: list[str] = field(default_factory=lambda: ["l1", "random"])
    finetune_controls: bool = True
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    surgery: Limits = field(default_factory=Limits)
    drop_bound: float = 0.02
    target: TargetConfig = field(default_factory=TargetConfig)
    profile: ClockSettings = field(default_factory=ClockSettings)
    repair: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    order: str = "forward"
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    finetune: TrainSettings = field(default_factory=lambda: FINETUNE)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    export: list[str] = field(default_factory=list)
    resume: str | None = None


def _comparison_search() -> NetworkSearchSettings:
    return NetworkSearchSettings(images=500, agent=NetworkAgentSettings(updates=6))


@dataclass
class CompareConfig(CheckpointConfig):
    """`keepdrop compare`."""

    layers: list[str] | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    methods: list[str] = field(default_factory=lambda: ["*"])
    compensate: list[bool] = field(default_factory=lambda: [False, True])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    random_seeds: int = 5
    stages: list[str] = field(default_factory=lambda: ["zero", "bn", "one", "full"])
    bn_images: int = 500
    finetune: TrainSettings = field(default_factory=lambda: replace(FINETUNE, epochs=2))
    random_best: RandomBestConfig = field(default_factory=RandomBestConfig)
    network_search: NetworkSearchSettings = field(default_factory=_comparison_search)
    repair: ReconstructionSettings = field(default_factory=lambda: ReconstructionSettings(images=256))
    engine: Any = None
    workers: int = 2
    resume: str | None = None


@dataclass
class IterateConfig(CheckpointConfig):
    """`keepdrop iterate`."""

    layers: list[str] | None = None
    surgery: Limits = field(default_factory=Limits)
    drop_bound: float = 0.02
    criterion: str = "taylor"
    step: int = 4
    minibatches: int = 30
    macs_weight: float = 0.0
    target: IterateTargetConfig = field(default_factory=IterateTargetConfig)
    train: TrainSettings = field(default_factory=lambda: BETWEEN_REMOVALS)
    finetune: TrainSettings = field(default_factory=lambda: FINETUNE)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    resume: str | None = None


@dataclass
class OracleConfig(CheckpointConfig):
    """`keepdrop oracle`."""

    layers: list[str] | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    criteria: list[str] = field(default_factory=lambda: ["*"])
    random_seeds: int = 5
    agents: str | None = None
    resume: str | None = None


@dataclass
class ExampleConfig:
    """What every command has that needs no data: a network, and what it runs on."""

    seed: int = 0
    network: Any = None
    checkpoint: str | None = None
    input_shape: list[int] = field(default_factory=lambda: [1, 8, 8])
    example_inputs: Any = None


@dataclass
class SamplingConfig:
    """What a round of a pretraining costs per network and target.

    Args:
        samples: masks, even: they are mirrored around the policy.
        images: of the reward split, the same ones for all masks of a round; None takes all.
        repair_images, repair_places: what the repair of a mask is measured on.
        scales: how far is explored.
    """

    samples: int = 12
    images: int | None = 500
    repair_images: int = 256
    repair_places: int = 16
    scales: PolicyScales = field(default_factory=PolicyScales)

    def __post_init__(self) -> None:
        if self.samples < 4 or self.samples % 2:
            raise UserError(f"training.sampling.samples is {self.samples}; expected an even number of 4 or more.")
        check_numbers(self, samples=MASKS, images=IMAGES, repair_images=IMAGES, repair_places=COUNT)


@dataclass
class PretrainingConfig:
    """How an agent is trained over a zoo.

    Args:
        targets: fractions of each network's MACs to remove.
        rounds: of sampling and learning.
        hidden: width of the policy's network.
        fit_images: of each network's fit split, for statistics, the plan and the repair.
        sampling: what a round costs.
        gradient: how far the policy moves in a round.
    """

    targets: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    rounds: int = 3
    hidden: int = 4
    fit_images: int = 3000
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    gradient: PolicyGradientSettings = field(default_factory=PolicyGradientSettings)

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < removed < 1 for removed in self.targets):
            raise UserError(f"training.targets is {list(self.targets)}; expected fractions between 0 and 1.")
        check_numbers(self, rounds=COUNT, hidden=(1, 4096), fit_images=IMAGES)


@dataclass
class PretrainConfig:
    """`keepdrop pretrain`."""

    zoo: str = "???"
    modules: list[str] = field(default_factory=list)
    leave_out: list[str] = field(default_factory=list)
    seed: int = 0
    run_dir: str = "???"
    quiet: bool = False
    resume: str | None = None
    engine: Any = None
    workers: int = 2
    split: SplitConfig = field(default_factory=lambda: SplitConfig("test", 2000))
    training: PretrainingConfig = field(default_factory=PretrainingConfig)


@dataclass
class InspectConfig(ExampleConfig):
    """`keepdrop inspect`."""

    json: bool = False


@dataclass
class ProfileConfig(ExampleConfig):
    """`keepdrop profile`."""

    device: str = "cpu"
    layers: list[str] | None = None
    batch_sizes: list[int] = field(default_factory=lambda: list(ProfileSettings.batch_sizes))
    runtimes: list[str] = field(default_factory=lambda: list(ProfileSettings.runtimes))
    threads: int | None = None
    samples: int | None = None
    repeats: int = ProfileSettings.repeats
    widths: list[float] | None = None
    out: str = "profile.json"
    quiet: bool = False


@dataclass
class ReportConfig:
    """`keepdrop report`."""

    runs: list[str] = field(default_factory=list)
    out: str = "comparison.html"
    quiet: bool = False


# Of the settings that stand in no section.
RANGES: dict[str, tuple[float, float]] = {
    "seed": SEED,
    "seeds": SEED,
    "random_seeds": COUNT,
    "bn_images": IMAGES,
    "workers": (1, 1024),
    "step": COUNT,
    "minibatches": COUNT,
    "macs_weight": NOT_NEGATIVE,
    "input_shape": COUNT,
    "threads": (1, 4096),
}

ROOTS = {
    "inspect": InspectConfig,
    "profile": ProfileConfig,
    "train_cnn": TrainCnnConfig,
    "prune": PruneConfig,
    "train_agent": TrainAgentConfig,
    "apply": ApplyConfig,
    "pretrain": PretrainConfig,
    "compare": CompareConfig,
    "iterate": IterateConfig,
    "oracle": OracleConfig,
    "report": ReportConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra as `NAME_schema`."""
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=f"{name}_schema", node=structured(root))
    if f"{INHERITED}.yaml" not in store.repo:
        store.store(name=INHERITED, node={})  # `keepdrop apply` without a run, for its help


def structured(kind: type) -> DictConfig:
    """The schema of a dataclass, writable: OmegaConf makes nodes of frozen ones read-only, and these get overridden."""
    node = OmegaConf.structured(kind)
    _make_writable(node)
    return node


def _make_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _make_writable(node[key])
