"""Ray engine: actors that hold a state and do items; one that dies, alone or with its node, is replaced.

What is shared is pickled once and put into Ray's object store, from where every node fetches it once.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import Notice, UserError, summarised
from .engine import Make, Work, Workers
from .local_processes import Held
from .ray_cluster import (
    GONE_SECONDS,
    LOOK_SECONDS,
    ClusterGoneError,
    ClusterSettings,
    call,
    check_nodes,
    connect,
    disconnect,
    is_gone,
    room,
)

GET_SECONDS = 60.0  # for a result that is ready


@dataclass(frozen=True)
class RayEngine(ClusterSettings):
    """Actors of a Ray cluster; arguments as for `ClusterSettings`."""

    @property
    def is_here(self) -> bool:
        """An actor is a process of its own."""
        return False

    def check(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        """See `Engine.check`: the address, room for a worker, every node's versions and its view of the folder."""
        if torch.device(device).type == "cuda" and not self.gpus:
            raise UserError(
                f"device={device} with engine.gpus=0 gives workers no GPU; give engine.gpus=1, or a part of one."
            )
        ray = connect(self)
        try:
            room(ray, self)
            check_nodes(ray, folder, self.wait)
        except BaseException:
            disconnect()
            raise

    @contextmanager
    def open(self, make: Make, *shared: Any, lost: str, here: Any = None) -> Iterator[Workers]:
        """See `Engine.open`; `here` is not used."""
        ray = connect(self)
        team = None
        try:
            team = _Team(ray, self, make, shared, lost)
            yield team
        finally:
            if team is not None:
                team.end()
            disconnect(gone=team is not None and team.gone)


class _Holder:
    """Runs in an actor."""

    def __init__(self, n_threads: int, folder: str, paths: list[str], shared: bytes) -> None:
        with suppress(OSError):  # relative paths of a configuration; absolute ones need no folder
            os.chdir(folder)
        sys.path.extend(path for path in paths if path not in sys.path)
        warnings.simplefilter("ignore", Notice)  # the process that was started has said everything
        torch.set_num_threads(n_threads)
        self._held = Held(_unpacked, (shared,))

    def begin(self) -> None:
        """Returns once the actor is there."""

    def do(self, work: bytes) -> tuple[bool, Any]:
        """An item's result, or the exception that it raised."""
        try:
            function, item = pickle.loads(work)
            return True, function(self._held.state, item)
        except Exception as error:
            return False, error


def _unpacked(packed: bytes) -> Any:
    """The state that a worker holds."""
    make, shared = pickle.loads(packed)
    return make(*shared)


@dataclass
class _Task:
    """An item that a worker does.

    Attributes:
        begun: when, on the monotonic clock.
        is_late: its worker was given up.
    """

    actor: Any
    position: int
    begun: float
    is_late: bool = False


class _Team(Workers):
    """Actors, and who does what.

    Attributes:
        shared_bytes: of what is shared, which each node fetches once.
        item_bytes: of all items so far.
    """

    def __init__(self, ray: Any, settings: ClusterSettings, make: Make, shared: tuple[Any, ...], lost: str) -> None:
        self.ray, self.settings, self.lost = ray, settings, lost
        self.count = min(settings.workers or sys.maxsize, room(ray, settings))
        blob = _pickled(ray, (make, shared))
        self.shared_bytes, self.item_bytes = len(blob), 0
        self.shared = ray.put(blob)
        self.kind = ray.remote(_Holder).options(num_cpus=settings.cpus, num_gpus=settings.gpus, max_restarts=0)
        self.idle: list[Any] = []
        self.beginning: dict[Any, Any] = {}  # actors, by the reference that says they are there
        self.running: dict[Any, _Task] = {}  # by the reference of the result
        self.failures = 0
        self.answered = time.monotonic()
        self.gone = False

    def numbered(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Workers.numbered`."""
        packed = [_pickled(self.ray, (work, item)) for item in items]
        self.item_bytes += sum(map(len, packed))
        waiting, tries = deque(range(len(packed))), Counter[int]()
        self.answered = time.monotonic()
        try:
            while waiting or self.running:
                self._assign(waiting, packed)
                self._give_up_late()
                for reference in self._ready():
                    if reference in self.beginning:
                        self._came_up(reference)
                        continue
                    task = self.running.pop(reference)
                    answer = self._answer(reference)
                    if answer is None:
                        self._kill(task.actor)
                        tries[task.position] += 1
                        if tries[task.position] > self.settings.retries:
                            raise self._too_late() if task.is_late else UserError(self.lost)
                        waiting.appendleft(task.position)
                        continue
                    self.idle.append(task.actor)
                    done, result = answer
                    if not done:
                        raise result
                    yield task.position, result
        finally:
            for task in self.running.values():  # left by an exception: nobody waits for these
                self._kill(task.actor)
            self.running.clear()

    def end(self) -> None:
        """End the actors."""
        for actor in [*self.idle, *self.beginning.values()]:
            self._kill(actor)

    def _assign(self, waiting: deque[int], packed: Sequence[bytes]) -> None:
        """Give items to idle actors, and begin others for the rest."""
        while waiting and self.idle:
            actor, position = self.idle.pop(), waiting.popleft()
            self.running[actor.do.remote(packed[position])] = _Task(actor, position, time.monotonic())
        room_left = self.count - len(self.running) - len(self.beginning)
        for _ in range(min(room_left, len(waiting) - len(self.beginning))):
            threads = max(1, int(self.settings.cpus))
            actor = self.kind.remote(threads, str(Path.cwd()), sys.path, self.shared)
            self.beginning[actor.begin.remote()] = actor

    def _give_up_late(self) -> None:
        """Kill workers that take longer over an item than they may: they may hang."""
        oldest = time.monotonic() - self.settings.limit
        for task in self.running.values():
            if task.begun < oldest and not task.is_late:
                task.is_late = True
                self._kill(task.actor)

    def _too_late(self) -> UserError:
        return UserError(
            f"Workers of the Ray cluster take longer over an item than engine.limit={self.settings.limit:g} s, again "
            "and again; raise engine.limit, or look what they wait for (ray stack on their node)."
        )

    def _ready(self) -> list[Any]:
        """References that have something to say; none after a few seconds without."""
        try:
            waited_for = [*self.running, *self.beginning]
            ready, _ = call(self.ray, self.ray.wait, waited_for, num_returns=1, timeout=LOOK_SECONDS)
        except (ClusterGoneError, ConnectionError, self.ray.exceptions.RaySystemError) as error:
            raise self._lost_cluster() from error
        silent = time.monotonic() - self.answered
        if ready:
            self.answered = time.monotonic()
        elif is_gone(self.ray):
            if silent > GONE_SECONDS:
                raise self._lost_cluster()
        elif self.running:
            self.answered = time.monotonic()  # Ray itself says when one of these dies
        elif silent > self.settings.wait:
            raise UserError(
                f"No worker of the Ray cluster came up within engine.wait={self.settings.wait:g} s, perhaps because "
                "other work takes its CPUs and GPUs (ray status shows it); raise engine.wait, or come back later."
            )
        return list(ready)

    def _lost_cluster(self) -> UserError:
        self.gone = True
        return UserError(
            "The Ray cluster is gone: nothing answers there any more; start it again, or use engine=local, and resume "
            "the run (resume=RUN_DIR)."
        )

    def _came_up(self, reference: Any) -> None:
        actor = self.beginning.pop(reference)
        try:
            self._got(reference)
        except self.ray.exceptions.RayError as error:
            self._kill(actor)
            self.failures += 1
            if self.failures > self.settings.retries + self.count:
                raise UserError(f"Workers of the Ray cluster die as they begin ({summarised(error)}).") from error
        else:
            self.idle.append(actor)

    def _answer(self, reference: Any) -> tuple[bool, Any] | None:
        """What an actor returned; None where it, or its node, died."""
        try:
            answer: tuple[bool, Any] = self._got(reference)
        except self.ray.exceptions.RayTaskError:
            raise  # a result that cannot be pickled
        except self.ray.exceptions.RayError:
            return None
        return answer

    def _got(self, reference: Any) -> Any:
        try:
            return call(self.ray, self.ray.get, reference, timeout=GET_SECONDS)
        except ClusterGoneError as error:
            raise self._lost_cluster() from error

    def _kill(self, actor: Any) -> None:
        if not self.gone:
            with suppress(Exception):  # it may be dead
                self.ray.kill(actor)


def _pickled(ray: Any, what: Any) -> bytes:
    try:
        packed: bytes = ray.cloudpickle.dumps(what)
    except Exception as error:  # whatever the user's own classes raise
        raise UserError(
            f"The network, its images or its functions cannot be sent to workers ({summarised(error)}); hold no open "
            "files, locks or connections in them, or use engine=local."
        ) from error
    return packed
