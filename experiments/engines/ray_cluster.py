"""Ray cluster: started on this machine or joined, refused in one sentence where it cannot do the work, left again."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any

from ...errors import UserError, summarised
from ...ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, check_numbers
from ...remote import is_url

CLIENT = "ray://"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_SECONDS = 10.0  # for an address to answer
LOOK_SECONDS = 2.0  # between looks at a cluster that returns nothing
GONE_SECONDS = 10.0  # without an answer, and a cluster is gone
LEAVE_SECONDS = 5.0  # for a cluster that is gone
PACKAGES = ("keepdrop", "torch", "numpy")  # versions that change what a mask is worth

_ours = False  # whether this process connected itself, and so has to disconnect


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster, and what a worker takes of it.

    Args:
        address: "auto" (the cluster that this machine belongs to), HOST:PORT or ray://HOST:PORT; None starts one on
            this machine, for this run alone.
        workers: None: as many as there is room for.
        cpus, gpus: of the cluster that each worker takes.
        retries: how often an item is done again whose worker died.
        wait: seconds after which a worker that does not come up is given up.
        limit: seconds that an item may take; a worker that takes longer is given up like one that died.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3
    wait: float = 120.0
    limit: float = 86400.0

    def __post_init__(self) -> None:
        counts = {"workers": COUNT, "retries": COUNT_OR_NONE}
        check_numbers(self, cpus=POSITIVE, gpus=NOT_NEGATIVE, wait=POSITIVE, limit=POSITIVE, **counts)


def import_ray(what: str = "engine=ray") -> Any:
    """The module; UserError, about what needs it, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{what} needs Ray, which is not installed; run pip install 'keepdrop[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of its own default otherwise
    import ray

    return ray


def connect(settings: ClusterSettings) -> Any:
    """The module ray, connected to what `settings.address` names; a connection that is there already is used.

    Raises:
        UserError: nobody answers there within 20 seconds, or what answers is another version of Ray or Python.
    """
    global _ours
    ray = import_ray()
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = settings.address
    if address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = cores if settings.workers is None else math.ceil(settings.workers * settings.cpus)
        _initialise(ray, "this machine", address="local", num_cpus=max(1, wanted), include_dashboard=False, **quiet)
    else:
        found = _auto() if address == "auto" else address
        _check_answers(found)
        _initialise(ray, address, address=found, **quiet)
    _ours = True
    return ray


def disconnect(gone: bool = False) -> None:
    """Leave a cluster that `connect` joined, and end one that it started; one that is gone is left without waiting."""
    global _ours
    if not _ours:
        return
    _ours = False
    ray = import_ray()
    if not gone:
        ray.shutdown()
        return
    # Ray takes up to minutes to leave a cluster that is gone.
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)


def _initialise(ray: Any, where: str, **arguments: Any) -> None:
    try:
        ray.init(**arguments)
    except Exception as error:  # ConnectionError, RuntimeError (versions), ValueError, TimeoutError, gRPC's own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"Ray cannot be used at {where} ({type(error).__name__}: {' '.join(lines)[:300]}); check engine.address."
        ) from error


def _auto() -> str:
    """The address of the cluster that this machine belongs to, as `ray start` leaves it."""
    found = os.environ.get("RAY_ADDRESS", "")
    if not found:
        with contextlib.suppress(OSError):
            folder = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
            found = (folder / "ray_current_cluster").read_text().strip()
    if not found:
        raise UserError(
            "engine.address=auto found no Ray cluster on this machine: start one (ray start --head), join one "
            "(ray start --address=HOST:6379), or leave engine.address out to start one for this run."
        )
    return found


def _check_answers(address: str) -> None:
    """Refuse an address where nobody answers, which Ray itself would wait for, for minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"engine.address is {address!r}; expected auto, HOST:PORT (usually port 6379) or ray://HOST:PORT (usually "
            "port 10001)."
        )
    host, loopback = host.strip("[]"), ""
    if not address.startswith(CLIENT) and host in LOOPBACK:  # Ray itself asks this machine's own address instead
        host = str(import_ray().util.get_node_ip_address())
        loopback = f" as {host}:{port}, which Ray takes for it"
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass
    except OSError as error:
        raise UserError(
            f"Nobody answers at engine.address={address}{loopback} ({summarised(error)}); check that the cluster runs "
            "(ray status on its head node) and that this machine reaches the port."
        ) from error
    if not _speaks_grpc(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"):
        raise UserError(f"What answers at engine.address={address} is no Ray cluster; check host and port.")


def _speaks_grpc(place: str) -> bool:
    """Whether what takes connections there is a server of the kind that Ray's are; Ray would wait for any other."""
    if importlib.util.find_spec("grpc") is None or os.environ.get("RAY_USE_TLS", "0") == "1":
        return True
    import grpc

    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS / 2)
        except grpc.FutureTimeoutError:
            return False
    return True


def is_gone(ray: Any) -> bool:
    """Whether the cluster of this process no longer answers."""
    if not ray.is_initialized():
        return True
    if ray.util.client.ray.is_connected():
        return False  # calls through the client raise by themselves
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return False
    except OSError:
        return True


class ClusterGoneError(Exception):
    """The cluster died while a call of Ray's waited for it."""


def call(ray: Any, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function of Ray's returns or raises; where the cluster dies meanwhile, Ray may return much later or never.

    Raises:
        ClusterGoneError: nothing has answered for `GONE_SECONDS`.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function(*arguments, **named)))
        except BaseException as error:
            outcome.append((False, error))

    caller = threading.Thread(target=run, daemon=True)
    caller.start()
    answered = time.monotonic()
    while caller.is_alive():
        caller.join(LOOK_SECONDS)
        if not caller.is_alive() or not is_gone(ray):
            answered = time.monotonic()
        elif time.monotonic() - answered > GONE_SECONDS:
            raise ClusterGoneError
    done, result = outcome[0]
    if not done:
        raise result
    return result


def nodes(ray: Any) -> list[Mapping[str, Any]]:
    """The nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def room(ray: Any, settings: ClusterSettings) -> int:
    """How many workers fit; UserError where not even one does."""
    counts = [_fitting(node["Resources"], settings) for node in nodes(ray)]
    if sum(counts):
        return sum(counts)
    for name, wanted in (("gpus", settings.gpus), ("cpus", settings.cpus)):
        there = [node["Resources"].get(name[:-1].upper(), 0.0) for node in nodes(ray)]
        if wanted > max(there, default=0.0):
            raise UserError(
                f"engine.{name} is {wanted:g} for a worker, but the largest node of the cluster has "
                f"{max(there, default=0.0):g}; ask for fewer."
            )
    raise UserError(
        f"No node of the cluster has engine.cpus={settings.cpus:g} and engine.gpus={settings.gpus:g} for one worker; "
        "ask for fewer."
    )


def _fitting(resources: Mapping[str, float], settings: ClusterSettings) -> int:
    """Workers of one node."""
    wanted = {"CPU": settings.cpus, "GPU": settings.gpus}
    return min(int(resources.get(name, 0.0) / each + 1e-9) for name, each in wanted.items() if each > 0)


def check_nodes(ray: Any, folder: str | Path | None, wait: float) -> None:
    """Refuse nodes with other versions than this process, and nodes that do not see the working folder."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def asked(node: Mapping[str, Any]) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(_probe()).options(num_cpus=0, max_retries=1, scheduling_strategy=there)
        return probe.remote(PACKAGES, marker)

    ours, deadline = _versions(PACKAGES), time.monotonic() + wait
    with _marker(folder) as marker:
        waiting = [(node, asked(node)) for node in nodes(ray)]
        while waiting:
            node, reference = waiting.pop(0)
            where = node["NodeManagerAddress"]
            try:
                theirs, sees = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
            except Exception as error:  # Ray's own: a timeout, a node that died
                if time.monotonic() < deadline:  # Ray takes a while to see that a node is dead
                    time.sleep(1)
                    waiting += [(each, asked(each)) for each in nodes(ray) if each["NodeID"] == node["NodeID"]]
                    continue
                raise UserError(
                    f"The node {where} of the Ray cluster does not start a worker within engine.wait={wait:g} s "
                    f"({summarised(error)}); look at it, or take it out of the cluster."
                ) from error
            _check_versions(where, ours, theirs)
            if not sees:
                raise UserError(
                    f"The node {where} of the Ray cluster does not see {str(folder)!r}, where workers write; give a "
                    "run_dir on a disk that all nodes share."
                )


def _check_versions(where: str, ours: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> None:
    for name, version in ours.items():
        if theirs[name] is None:
            raise UserError(f"The node {where} of the Ray cluster has no {name}; install {name} {version} there.")
        if theirs[name] != version:
            raise UserError(
                f"The node {where} of the Ray cluster has {name} {theirs[name]}, this machine {version}; install the "
                "same version on both: masks would not be judged alike."
            )


@contextlib.contextmanager
def _marker(folder: str | Path | None) -> Iterator[tuple[str, str] | None]:
    """A file, and its content, in the folder, or in what is there already of the path to it."""
    if folder is None:
        yield None
        return
    # A run at a URL is written to a copy on this machine, and put there by this process.
    place = Path(gettempdir()) if is_url(folder) else Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    with NamedTemporaryFile("w", dir=place, prefix=".keepdrop-", suffix=".seen") as file:
        file.write(token := os.urandom(8).hex())
        file.flush()
        yield file.name, token


def _probe() -> Any:
    """What a node answers: versions, and whether it sees the marker. By value: it needs no keepdrop there."""

    def probe(packages: tuple[str, ...], marker: tuple[str, str] | None) -> tuple[dict[str, str | None], bool]:
        import importlib.metadata
        import pathlib

        found: dict[str, str | None] = {}
        for name in packages:
            try:
                found[name] = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        if marker is None:
            return found, True
        path = pathlib.Path(marker[0])
        try:
            return found, path.read_text() == marker[1]
        except OSError:
            return found, False

    return probe


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    return dict(_probe()(packages, None)[0])
