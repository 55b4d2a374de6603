"""What several benchmarks share: a ResNet on CIFAR-10, random images, result files to be resumed, the machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from keepdrop.envs.data.images import ArrayImages
from keepdrop.envs.data.sources import LabelledData, npz
from keepdrop.envs.data.splits import split
from keepdrop.envs.evaluation.dense_baseline import DenseBaseline
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.networks.checkpoint import load_checkpoint
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.task import PruningTask
from torch import nn


def make_task(
    data: str, checkpoint: str, layers: Sequence[str] | None = None, depth: int = 20, device: str = "cpu"
) -> PruningTask:
    """A ResNet, or some layers of it (names or globs), scored on 5,000 of the test images."""
    model = cifar_resnet(depth)
    load_checkpoint(model, checkpoint)
    images = npz(data, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    splits = split(images, reward_from="test", reward_size=5000, seed=0)
    return PruningTask(model.eval().to(device), splits, layers=layers, device=device)


def random_task(
    model: nn.Module,
    size: int,
    parts: tuple[int, int],
    reward_from: str,
    reward_size: int,
    layers: Any = None,
    device: str = "cpu",
) -> PruningTask:
    """A network on random images (3, size, size), `parts` to train on and to test: how well it answers is made up.

    One that guesses would be refused.
    """
    images, labels = torch.randn(sum(parts), 3, size, size), torch.randint(10, (sum(parts),))
    rows = slice(parts[0]), slice(parts[0], None)
    data = LabelledData(*(ArrayImages(images[each], labels[each], [0.0] * 3, [1.0] * 3, 10) for each in rows))
    base = DenseBaseline(torch.rand(reward_size) < 0.9, count_cost(model, images[:1].to(device)))
    splits = split(data, reward_from=reward_from, reward_size=reward_size, seed=0)
    return PruningTask(model, splits, base=base, layers=layers, device=device)


def opened(path: Path, about: dict[str, Any], parts: str) -> dict[str, Any]:
    """What was found in a file of the same experiment, with its parts, none of them yet if it is new."""
    found = json.loads(path.read_text()) if path.is_file() else {**about, parts: {}}
    if {key: found.get(key) for key in about} != about:
        raise SystemExit(f"{path} holds another experiment; move it away first")
    return dict(found)


def script(name: str, path: Path) -> Any:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, start: str, end: str, text: str) -> str:
    """A page with the section between two marks exchanged for `text`, which holds them, or added at the end."""
    if start not in page:
        return f"{page.rstrip()}\n\n{text}"
    before, _, rest = page.partition(start)
    return before + text + rest.partition(end)[2].removeprefix("\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """On what it was measured."""
    facts = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.is_file() else None
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return {
        **gpu,
        "processor": named[1] if named else platform.processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],
    }
