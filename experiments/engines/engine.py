"""Engine: maps a function over items on workers that hold one state, in processes of this machine or on Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

Make = Callable[..., Any]
"""Makes the state that a worker holds, from what is shared; a function of a module, as workers find it by its name."""
Work = Callable[[Any, Any], Any]
"""Does one item: (state, item) -> result; a function of a module likewise."""


class Workers(ABC):
    """Workers that hold the same state.

    Attributes:
        count: how many there are at most.
    """

    count: int

    @abstractmethod
    def numbered(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Each item's position and result, as soon as it is done; an exception of `work` is raised here."""

    def as_done(self, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        """The results, each as soon as it is there."""
        return (result for _, result in self.numbered(work, items))

    def in_order(self, work: Work, items: Sequence[Any]) -> list[Any]:
        """The results in the order of the items."""
        found = dict(self.numbered(work, items))
        return [found[position] for position in range(len(items))]


class Engine(Protocol):
    """Makes workers."""

    @property
    def is_here(self) -> bool:
        """Whether the one worker is this process itself."""

    def check(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        """Refuse, before anything is written, what cannot work, with a `UserError`.

        Args:
            folder: that workers write to; None where they write nothing.
            device: that they evaluate on.
        """

    def open(self, make: Make, *shared: Any, lost: str, here: Any = None) -> AbstractContextManager[Workers]:
        """Workers that hold `make(*shared)`; they end with the context.

        Args:
            make: makes the state, once a worker.
            shared: what it is made of; sent once to each machine.
            lost: the sentence for a user whose workers are gone for good.
            here: the state, where this process is to be the one worker and has it already.

        Raises:
            UserError: `lost`, or why there are no workers.
        """
