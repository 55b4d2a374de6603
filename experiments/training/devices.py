"""Training on several devices by Lightning Fabric: one process per device (DDP), gloo on CPUs and nccl on GPUs.

The process that prunes is the first of them. The others help: they are started at the first training that asks for
them, or came with this one from torchrun or Slurm, and wait for their share of one training after another.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import UserError, first_line
from .train_settings import TrainSettings

PATIENCE = timedelta(minutes=10)  # for a process that does not answer in the middle of a training
BETWEEN = timedelta(days=30)  # for the next training: a search may lie between
BATCH_NORM = nn.modules.batchnorm._BatchNorm
Job = Callable[["Team"], None]
_team: Team | None = None
_active: Team | None = None  # while a step of a divided batch runs


class Team:
    """The processes of one training, as one of them sees them.

    Args:
        rank: of this process; 0 leads.
        size: how many there are.
        device: of this process's kind: "cpu" or "cuda".
        port: on this machine, where they meet; None for processes that torchrun or Slurm started.
        helpers: those that this process started.
    """

    def __init__(
        self, rank: int, size: int, device: str, port: int | None, helpers: tuple[subprocess.Popen[bytes], ...] = ()
    ) -> None:
        self.rank, self.size, self.device, self.port, self.helpers = rank, size, device, port, helpers
        self.fabric = self._launched(unused=False)
        self.objects = dist.new_group(backend="gloo", timeout=BETWEEN)

    def wrapped(self, model: nn.Module, unused: bool) -> nn.Module:
        """The network as a step calls it: gradients are averaged; `unused` says that some parameters get none."""
        self.fabric = self._launched(unused)
        wrapped: nn.Module = self.fabric.setup_module(model, move_to_device=False)
        return wrapped

    def _launched(self, unused: bool) -> Any:
        """A Fabric in these processes, which has left the number of threads as it was."""
        threads, given = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
        fabric = _fabric(self.rank, self.size, self.device, self.port, unused)
        fabric.launch()
        if given is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(threads)
        return fabric

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged."""
        self.fabric.backward(loss)

    def divides(self, n_images: int) -> bool:
        """Whether a batch is shared; a last one that is too small or uneven is taken whole by every process."""
        return n_images % self.size == 0 and n_images >= 2 * self.size

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch."""
        each = len(batch) // self.size
        return batch[self.rank * each : (self.rank + 1) * each] if self.divides(len(batch)) else batch

    def gathered(self, values: Tensor) -> Tensor:
        """The values of all processes, in the order of their shares."""
        values = values.detach().contiguous().to(self.fabric.device)
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values)
        return torch.cat(found)

    def send(self, job: Job | None) -> None:
        """Tell the helpers what to do next; None: nothing more."""
        dist.broadcast_object_list([None if job is None else _packed(job)], src=0, group=self.objects)

    def serve(self) -> None:
        """Do what the first process sends, until it sends nothing more."""
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0, group=self.objects)
            if box[0] is None:
                break
            pickle.loads(box[0])(self)  # of the process that started this one
        dist.destroy_process_group()

    def close(self, tell: bool = True) -> None:
        """Let the helpers go, which wait for a training unless `tell` is false."""
        global _team
        if _team is not self:
            return
        _team = None
        with suppress(RuntimeError, ValueError):
            if tell and all(each.poll() is None for each in self.helpers):
                self.send(None)
        for each in self.helpers:
            try:
                each.wait(10)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group()

    def abandon(self) -> None:
        """End helpers in the middle of a training; those of torchrun and Slurm see that this process is gone."""
        for each in self.helpers:
            each.kill()
        self.close(tell=False)


def check_devices(chosen: Iterable[TrainSettings], device: torch.device) -> None:
    """UserError where a training cannot run on as many devices as it asks for."""
    check_count(max((each.devices for each in chosen if each.epochs > 0), default=1), device)


def check_count(asked: int, device: torch.device) -> None:
    """UserError where no training can run on so many devices."""
    if asked == 1:
        return
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"devices is {asked}, and device is {device}; expected cpu or cuda for more than one.")
    if find_spec("lightning_fabric") is None:
        raise UserError(
            f"devices is {asked}, which needs Lightning Fabric, and that is not installed; run pip install "
            "'keepdrop[lightning]', or leave devices at 1."
        )
    outside = _outside()
    if outside is not None and outside[1] != asked:
        raise UserError(
            f"devices is {asked}, and torchrun or Slurm started {outside[1]} processes; expected as many of both."
        )
    there = torch.cuda.device_count()
    if device.type == "cuda" and outside is None and asked > there:
        raise UserError(f"devices is {asked}, and this machine has {there}; expected {there} or fewer.")


def is_helper(devices: int) -> bool:
    """Whether this process was started by torchrun or Slurm to help the first one, which alone prunes and writes."""
    outside = _outside() if devices > 1 else None
    return outside is not None and outside[0] > 0


def leads(devices: int, device: str) -> bool:
    """Whether this process prunes and writes: it is alone, or the first of those that torchrun or Slurm started.

    The first one is joined to the others, so that they hear when it ends; of those this returns then, false, with their
    share of every training done.
    """
    outside = _outside() if devices > 1 else None
    if outside is None:
        return True
    if is_helper(devices):
        Team(*outside, device, None).serve()
        return False
    _together(devices, device)
    return True


def help_out(rank: int, size: int, device: str, port: int) -> None:
    """What a process does that `together` started."""
    Team(rank, size, device, port).serve()


def part() -> None:
    """Let the helpers go, if there are any."""
    if _team is not None:
        _team.close()


@contextmanager
def working_together(size: int, device: torch.device, alike: type[Exception]) -> Iterator[Team]:
    """The team of this process; what goes wrong inside ends the helpers, but for what is raised `alike` in all."""
    team = _together(size, device.type)
    try:
        yield team
    except alike:  # none of them waits for another
        raise
    except BaseException as error:
        codes = [each.poll() for each in team.helpers]
        team.abandon()
        if isinstance(error, RuntimeError) and any(code is not None for code in codes):
            raise UserError(
                f"A process of the training on {size} devices ended (exit codes {codes}), perhaps because memory ran "
                "out; what is finished is kept: resume the run, perhaps with fewer devices."
            ) from error
        raise


@contextmanager
def synchronised(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Every batch normalisation of `model` counts the images of all processes inside, where that is `wanted`."""
    found = [module for module in nn.Module.modules(model) if wanted and isinstance(module, BATCH_NORM)]
    kinds = [type(module) for module in found]
    for module, kind in zip(found, kinds, strict=True):
        module.__class__ = type(kind.__name__, (_Synchronised, kind), {})
    try:
        yield
    finally:
        for module, kind in zip(found, kinds, strict=True):
            module.__class__ = kind


@contextmanager
def quiet() -> Iterator[None]:
    """Without what DDP says of weights in channels-last order, inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield


@contextmanager
def stepping(team: Team | None) -> Iterator[None]:
    """A step of a batch; the statistics of one that a team divides are those of all parts."""
    global _active
    _active = team
    try:
        yield
    finally:
        _active = None


class _Synchronised(nn.Module):
    """Batch normalisation by the mean and variance over all processes, on any backend (torch's own needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> the same shape."""
        own: Any = self
        if _active is None or not self.training:
            normalised: Tensor = super().forward(x)
            return normalised
        size, dims, shape = _active.size, [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        given = x.float()
        mean: Tensor = _Sum.apply(given.mean(dims)) / size
        variance: Tensor = _Sum.apply((given - mean.view(shape)).square().mean(dims)) / size
        if own.running_mean is not None:
            own.num_batches_tracked.add_(1)
            rate = 1 / float(own.num_batches_tracked) if own.momentum is None else own.momentum
            count = size * x.numel() // x.shape[1]
            own.running_mean.lerp_(mean.detach().to(own.running_mean.dtype), rate)
            unbiased = variance.detach() * (count / (count - 1))
            own.running_var.lerp_(unbiased.to(own.running_var.dtype), rate)
        found = (given - mean.view(shape)) * (variance + own.eps).rsqrt().view(shape)
        if own.weight is not None:
            found = found * own.weight.view(shape) + own.bias.view(shape)
        return found.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """The same shape everywhere."""
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Every process's loss depends on every process's value."""
        return _summed(gradients[0])


def _summed(value: Tensor) -> Tensor:
    total = value.detach().contiguous().clone()
    dist.all_reduce(total)
    return total


def _together(size: int, device: str) -> Team:
    """The team of this process, of that size; helpers are started unless they are there."""
    global _team
    if _team is not None and (_team.size, _team.device) != (size, device):
        _team.close()
    if _team is None:
        outside, helpers = _outside(), tuple[subprocess.Popen[bytes], ...]()
        rank, port = (0, _free_port()) if outside is None else (outside[0], None)
        if port is not None:
            helpers = tuple(_started(each, size, device, port) for each in range(1, size))
        try:
            _team = Team(rank, size, device, port, helpers)
        except (RuntimeError, OSError) as error:
            for each in helpers:
                each.kill()
            raise UserError(
                f"The {size} processes of a training on several devices did not find each other "
                f"({first_line(error)}); check that all of them run, or leave devices at 1."
            ) from error
        atexit.register(_team.close)
    return _team


def _started(rank: int, size: int, device: str, port: int) -> subprocess.Popen[bytes]:
    """A helper, which finds what this process can import; its threads are a share of this one's."""
    code = f"from {__name__} import help_out; help_out({rank}, {size}, {device!r}, {port})"
    threads = max(1, torch.get_num_threads() // size)
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)  # noqa: PTH109
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL)


def _fabric(rank: int, size: int, device: str, port: int | None, unused: bool) -> Any:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import (
        ClusterEnvironment,
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning_fabric.strategies import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

    class Here(LightningEnvironment):  # type: ignore[misc, unused-ignore]
        """Processes of this machine that found each other by a port."""

        creates_processes_externally = True
        main_address = "127.0.0.1"
        main_port = port or 0

        def local_rank(self) -> int:
            return rank

        def node_rank(self) -> int:
            return 0

    environment: ClusterEnvironment = Here()
    if port is None:
        environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
    nodes = 1 if port is not None else _nodes(size)
    strategy = DDPStrategy(
        cluster_environment=environment,
        process_group_backend="nccl" if device == "cuda" else "gloo",
        timeout=PATIENCE,
        find_unused_parameters=unused,
    )
    return Fabric(accelerator=device, devices=size // nodes, num_nodes=nodes, strategy=strategy)


def _outside() -> tuple[int, int] | None:
    """Rank and number of the processes that torchrun or Slurm started; None where neither did, or only one."""
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    known = names[:1] if "TORCHELASTIC_RUN_ID" in os.environ else names[1:] if "SLURM_STEP_ID" in os.environ else ()
    for rank, size in known:
        if rank in os.environ and int(os.environ.get(size, 1)) > 1:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def _nodes(size: int) -> int:
    here = os.environ.get("LOCAL_WORLD_SIZE")
    return size // int(here) if here else int(os.environ.get("SLURM_NNODES", 1))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _packed(job: Job) -> bytes:
    """By value where it was defined in a script or a notebook, which the helpers cannot import."""
    try:
        import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:  # joblib before 1.6 has its own
        from joblib.externals import cloudpickle  # type: ignore[import-untyped, unused-ignore]
    return bytes(cloudpickle.dumps(job))
