"""What pruning from Python gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...envs.data.objective import TOP1, display_name
from ...envs.data.splits import Splits
from ...envs.files.pruned_network import save_pruned
from ...envs.networks.module_kinds import Inputs
from ...envs.surgery.kept_channels import KeptChannels
from ...errors import UserError
from ...remote import writing
from ..deploy.export import Exported, check_exports, export_all
from ..deploy.latency import Latency, measure_latency
from ..pruning.schedule import LayerRecord
from ..training.guarded import Judgement


@dataclass(frozen=True)
class PruningResult:
    """What pruning did; accuracies are fractions on the report images, which nothing was chosen on.

    Attributes:
        model: the smaller network, fine-tuned, in evaluation mode; always plain, without DataParallel,
            `torch.compile` or another wrapper that the network came in. Where fine-tuning made it worse on the reward
            images, the best epoch, or the network as it was cut.
        dense: a copy of what came in.
        layers: what happened to each layer.
        base_accuracy, pruned_accuracy, accuracy: before, after the last cut, after fine-tuning.
        base_macs, macs: multiply-accumulates an image, before and after.
        base_params, params: parameters, before and after.
        bound_held: whether the drop bound held after every cut, on the reward images.
        kept: which channels of the dense network are left.
        example: one image (1, C, H, W), or one item of several inputs as the network is called with it.
        metric: what the accuracies are.
        cut: the smaller network as it was cut, before fine-tuning, in evaluation mode.
        measured: `model` as it is evaluated: of several inputs or outputs, those that count. It shares its modules.
        splits: the images it was pruned and measured with, which int8 is calibrated and scored on.
        finetuning: what the reward images said of fine-tuning (`kept`, `before`, `after`, `lr`); None without any.
        notes: what was changed in the network before it was pruned (wrappers taken off, masks made permanent), and what
            makes its accuracies uncertain (random numbers in evaluation mode, statistics of the batch).
    """

    model: nn.Module
    dense: nn.Module
    layers: tuple[LayerRecord, ...]
    base_accuracy: float
    pruned_accuracy: float
    accuracy: float
    base_macs: int
    macs: int
    base_params: int
    params: int
    bound_held: bool
    kept: KeptChannels
    example: Inputs
    metric: str = TOP1.name
    notes: tuple[str, ...] = ()
    cut: nn.Module | None = None
    finetuning: Judgement | None = None
    measured: nn.Module | None = field(default=None, repr=False, compare=False)
    splits: Splits | None = field(default=None, repr=False, compare=False)

    def facts(self) -> dict[str, Any]:
        """Every number of the result; JSON types only."""
        hidden = ("model", "dense", "cut", "kept", "example", "layers", "finetuning", "measured", "splits")
        return {name: value for name, value in vars(self).items() if name not in hidden} | {
            "layers": [asdict(record) for record in self.layers],
            "finetuning": None if self.finetuning is None else self.finetuning.facts(),
        }

    def save(self, folder: str | Path, constructor: Mapping[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `architecture.json`, which `keepdrop.load_pruned(folder, make_dense)` reads."""
        save_pruned(
            self.model, folder, kept=self.kept, constructor=constructor, facts=self.facts(), example=self.example
        )

    def export(self, folder: str | Path, kinds: Sequence[str] = ("onnx",)) -> tuple[Exported, ...]:
        """Write the smaller network for other runtimes, each file compared with the network before it gets its name.

        Args:
            folder: or URL, where `model.onnx`, `model.int8.onnx` and `model.pt2` go.
            kinds: any of "onnx", "onnx-int8" (calibrated on fit images, scored on the report images) and "program"
                (torch.export).

        Raises UserError where a package is missing or the network cannot be written so.
        """
        check_exports(kinds)
        model = self.model if self.measured is None else self.measured
        example = self.example if self.splits is None else self.splits.example
        with writing(folder) as place:
            made, failed = export_all(model, example, place, kinds, self.splits)
        if failed:
            raise UserError(" ".join(failed.values()))
        return tuple(Exported(**each) for each in made)

    def latency(
        self,
        batch_sizes: Sequence[int] = (1, 64),
        repeats: int = 20,
        runtimes: Sequence[str] = ("eager",),
        files: Mapping[str, str | Path] | None = None,
    ) -> tuple[Latency, ...]:
        """Seconds of both networks, measured side by side here and now; see `measure_latency` for the arguments."""
        models = {"base": self.dense, "pruned": self.model}
        return tuple(
            measure_latency(models, self.example, batch_sizes, repeats=repeats, runtimes=runtimes, files=files)
        )

    def __str__(self) -> str:
        lines = (
            f"{display_name(self.metric)} {self.base_accuracy:.2%} -> {self.accuracy:.2%}, "
            f"MACs {self.base_macs:,} -> {self.macs:,} ({self.macs / self.base_macs - 1:+.1%}), "
            f"parameters {self.base_params:,} -> {self.params:,} ({self.params / self.base_params - 1:+.1%})",
            *self.notes,
        )
        return "\n".join(lines)
