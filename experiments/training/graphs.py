"""CUDA graphs: a step of a training is captured with every kernel it launches, and replayed without the host.

A small network is bound by what launching its kernels costs the host. A graph launches all of them at once, on the same
memory every time, and asks no Python: what the network decides from values, from numbers of its own or by drawing on
the CPU would be frozen as it was once. Networks that do so are found out in the steps before, and run as ever.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import Notice, first_line

WARM = 4  # calls before the capture: libraries make their plans, momentum comes to be
WATCHED = (1, 2)  # those of them whose operations are compared
SYNCHRONISES = "called a synchronizing"  # torch's warning

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors, Tensors], Tensors]


class Capture(Protocol):
    """What a device does for graphs."""

    def streaming(self) -> AbstractContextManager[None]:
        """Everything inside is put on the stream that graphs are captured on, behind what was put on others before."""

    def watching(self) -> AbstractContextManager[list[str]]:
        """Fills a list with reasons why what is done inside must not be captured."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Capture `function` without running it: where its results will lie, and what runs it again."""


class CudaCapture:
    """Graphs of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """See `Capture`. Steps before the capture run on its stream too: libraries make their workspaces for each."""
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """See `Capture`: the host must not wait for the GPU, nor draw from a generator of its own."""
        reasons: list[str] = []
        drawn, mode = _host_randomness(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield reasons
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for each in said:
            if SYNCHRONISES in str(each.message):
                reasons.append("it asks the GPU for values in the middle of a step")
            elif "Synchronization debug mode" not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        if drawn != _host_randomness():
            reasons.append("it draws random numbers on the CPU")

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """See `Capture`. Other threads, which may read images ahead, are left alone."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = function()
        except Exception:
            with suppress(Exception):  # a capture that failed leaves the generator of dropout waiting for its end
                generator = torch.cuda.default_generators[self.stream.device_index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return results, graph.replay


def capture_of(device: torch.device) -> Capture | None:
    """What captures graphs on a device; None where nothing does."""
    return CudaCapture(device) if device.type == "cuda" else None


class Graphed:
    """A function of tensors and numbers, called `WARM` times, then captured, and replayed from there on.

    For tensors of other shapes than at first (a ragged last batch) it is always called. Results of a replay lie where
    those of the one before did: clone what shall last. A function that cannot be captured is called for ever, after one
    `Notice`; the operations are the same, and on a device that repeats itself so is what they give.

    Args:
        function: takes tensors, and numbers as tensors () on their device.
        capture: of the device.
        what: name for the notice.
    """

    def __init__(self, function: Function, capture: Capture, what: str) -> None:
        self.function, self.capture, self.what = function, capture, what
        self.calls, self.is_refused = 0, False
        self._shapes: list[Any] | None = None
        self._seen: list[Any] | None = None
        self._inputs: Tensors = ()
        self._numbers: Tensors = ()
        self._results: Tensors = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, tensors: Tensors, numbers: Sequence[float] = ()) -> Tensors:
        """What the function returns."""
        shapes = [(each.shape, each.dtype) for each in tensors]
        if self._shapes is None:
            self._shapes = shapes
            self._numbers = tuple(torch.zeros((), device=tensors[0].device) for _ in numbers)
        for place, number in zip(self._numbers, numbers, strict=True):
            place.fill_(number)
        if self.is_refused or shapes != self._shapes:
            return self.function(tensors, self._numbers)
        self.calls += 1
        if self.calls <= WARM:
            return self._watched(tensors) if self.calls - 1 in WATCHED else self.function(tensors, self._numbers)
        if self._replay is None:
            self._replay = self._captured(tensors)
        if self._replay is None:
            return self.function(tensors, self._numbers)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._replay()
        return self._results

    def _watched(self, tensors: Tensors) -> Tensors:
        """A call like any other, looked at: one that does something else than the call before is not captured."""
        with self.capture.watching() as reasons, _Operations() as operations:
            results = self.function(tensors, self._numbers)
        if self._seen is not None and self._seen != operations.seen:
            reasons.append("it does something else in every step")
        self._seen = operations.seen
        if reasons:
            self._refuse(reasons[0])
        return results

    def _captured(self, tensors: Tensors) -> Callable[[], None] | None:
        self._inputs = tuple(torch.empty_like(each).copy_(each) for each in tensors)
        try:
            self._results, replay = self.capture.record(lambda: self.function(self._inputs, self._numbers))
        except Exception as error:  # whatever a network's code may raise where nothing may be waited for
            self._refuse(first_line(error.__context__ or error))  # the end of a capture that failed fails as well
            return None
        return replay

    def _refuse(self, reason: str) -> None:
        if not self.is_refused:
            warnings.warn(
                f"{self.what} is not captured as a CUDA graph: {reason.rstrip('.')}. It runs operation by operation, "
                "which is slower and as right.",
                Notice,
                stacklevel=2,
            )
        self.is_refused, self._inputs, self._results = True, (), ()


class _Operations(TorchDispatchMode):
    """Notes every operation inside, with the shapes it works on and the numbers that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it."""
        given = _pytree.tree_leaves((args, kwargs or {}))
        self.seen.append((str(func), [_noted(each) for each in given]))
        return func(*args, **(kwargs or {}))


def _noted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value if isinstance(value, (bool, int, float, str)) else None


def _host_randomness() -> Sequence[Any]:
    """The state of every generator on the CPU that a network may draw from."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state(legacy=False))
