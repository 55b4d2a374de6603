"""The parts of the root configurations that no package of its own has settings for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import UserError


@dataclass
class SplitConfig:
    """Where rewards are measured: held out of "train", or taken from "test" (a checkpoint trained on all of train)."""

    reward_from: str = "train"
    reward_size: int = 300
    seed: int = 0


@dataclass
class SearchConfig:
    """What an update costs: masks, and reward images per mask (null: all)."""

    masks: int = 16
    images: int | None = 512

    def __post_init__(self) -> None:
        if self.masks < 2:
            raise UserError(f"search.masks is {self.masks}; expected 2 or more: rewards are compared with one another.")
        if self.images is not None and self.images < 1:
            raise UserError(f"search.images is {self.images}; expected 1 or more, or null for all reward images.")


@dataclass
class LatencyConfig:
    """How latency is measured: batch sizes, timed repeats, warm-up runs, and eager, compile, onnxruntime."""

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


@dataclass
class TargetConfig:
    """MACs to remove, a fraction of the network's or of the pruned groups' own; null prunes within the drop bound."""

    removed: float | None = None
    of: str = "network"


@dataclass
class TargetsConfig:
    """What a comparison removes: fractions of the MACs of the pruned layers themselves ("groups") or of "network"."""

    removed: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    of: str = "network"


@dataclass
class RandomBestConfig:
    """A random search: masks judged; null: as many as the agent had judged, 100 without one."""

    evaluations: int | None = None


@dataclass
class IterateTargetConfig:
    """When to stop: a fraction of the network's "macs" or "params" is gone (null: never), or the drop bound breaks."""

    removed: float | None = 0.5
    resource: str = "macs"
    hold_bound: bool = False
