"""The schema of every root configuration: an unknown key or a wrong type fails while it is composed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ...agent.learning.trainer import AgentSettings
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.limits import Limits
from ...envs.task import EvaluationSettings
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.recover import RecoverySettings
from ..training.loop import TrainSettings
from .schema_parts import (
    IterateTargetConfig,
    LatencyConfig,
    RandomBestConfig,
    SearchConfig,
    SplitConfig,
    TargetConfig,
    TargetsConfig,
)

INHERITED = "inherited"  # what `keepdrop apply` takes from a run, as an option of every group


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

    base: TrainSettings = field(default_factory=TrainSettings)
    resume: str | None = None


@dataclass
class CheckpointConfig(RootConfig):
    """What every command has that looks at a trained network: its weights, or how to train it."""

    checkpoint: str | None = None
    base: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class PruningConfig(CheckpointConfig):
    """What every command that prunes has."""

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    surgery: Limits = field(default_factory=Limits)
    drop_bound: float = 0.02


@dataclass
class PruneConfig(PruningConfig):
    """`keepdrop prune`."""

    layers: list[str] | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    network_search: NetworkSearchSettings = field(default_factory=NetworkSearchSettings)
    repair: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    order: str = "forward"
    reward: Any = None
    policy: Any = None
    agent: AgentSettings = field(default_factory=AgentSettings)
    search: SearchConfig = field(default_factory=SearchConfig)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    finetune: TrainSettings = field(default_factory=TrainSettings)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    export: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=lambda: ["l1", "random"])
    warm_start: str | None = None
    resume: str | None = None


@dataclass
class TrainAgentConfig(PruningConfig):
    """`keepdrop train-agent`."""

    layer: str = "???"
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
    repair: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    order: str = "forward"
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    finetune: TrainSettings = field(default_factory=TrainSettings)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    export: list[str] = field(default_factory=list)
    resume: str | None = None


@dataclass
class CompareConfig(CheckpointConfig):
    """`keepdrop compare`."""

    layers: list[str] | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    methods: list[str] = field(default_factory=lambda: ["*"])
    compensate: list[bool] = field(default_factory=lambda: [False, True])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    random_seeds: int = 5
    stages: list[str] = field(default_factory=lambda: ["zero", "bn", "one", "full"])
    bn_images: int = 1000
    finetune: TrainSettings = field(default_factory=TrainSettings)
    random_best: RandomBestConfig = field(default_factory=RandomBestConfig)
    network_search: NetworkSearchSettings = field(default_factory=NetworkSearchSettings)
    repair: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    workers: int = 1
    resume: str | None = None


@dataclass
class IterateConfig(CheckpointConfig):
    """`keepdrop iterate`."""

    layers: list[str] | None = None
    surgery: Limits = field(default_factory=Limits)
    drop_bound: float = 0.02
    criterion: str = "taylor"
    step: int = 1
    minibatches: int = 30
    macs_weight: float = 0.0
    target: IterateTargetConfig = field(default_factory=IterateTargetConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    finetune: TrainSettings = field(default_factory=TrainSettings)
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
class InspectConfig:
    """`keepdrop inspect`."""

    seed: int = 0
    network: Any = None
    checkpoint: str | None = None
    input_shape: list[int] = field(default_factory=lambda: [1, 8, 8])
    example_inputs: Any = None
    json: bool = False


@dataclass
class ReportConfig:
    """`keepdrop report`."""

    runs: list[str] = field(default_factory=list)
    out: str = "comparison.html"
    quiet: bool = False


ROOTS = {
    "inspect": InspectConfig,
    "train_cnn": TrainCnnConfig,
    "prune": PruneConfig,
    "train_agent": TrainAgentConfig,
    "apply": ApplyConfig,
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
