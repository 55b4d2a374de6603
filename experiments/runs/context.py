"""Run context: the configuration of a run, its folder, its terminal and its TensorBoard records, in one object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .console import Terminal
from .folder import RunFolder
from .tracking import Tracker

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class RunContext:
    """What a command works in.

    Attributes:
        config: the checked root configuration; of a resumed run the one it began with.
        folder: of the run; everything is written below it.
        terminal: what a person sees.
        tracker: TensorBoard records; a file appears with the first of them.
    """

    config: DictConfig
    folder: RunFolder
    terminal: Terminal
    tracker: Tracker

    def part(self, name: str) -> RunContext:
        """The same for one of several methods, with a folder `methods/NAME` and records of its own."""
        return replace(
            self,
            folder=self.folder.part(f"methods/{name}"),
            tracker=Tracker(self.folder / "tensorboard" / name),
        )
