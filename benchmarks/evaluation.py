"""How fast masks are judged: keepdrop's split evaluator against the naive loop, per filter group, paired.

    python benchmarks/evaluation.py --network resnet20 --masks 16 --images 1000 --rounds 5 --json out.json

Naive, and fair: the whole masked network for every mask, eager, one mask at a time, batch 256, channels-last, inference
mode. Ours: `MaskEvaluator`, its frontier cached beforehand. The two take turns within every round; the ratio is
that of the medians. `limit` is what the mathematics allows: MACs of the whole network / MACs behind the frontier.
`efficiency` is the suffix's MACs a second over those of the plain network, timed in the same rounds. Counts are
compared, too. Random weights: time does not depend on them. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from keepdrop.envs.cost import count_cost
from keepdrop.envs.coupling import find_groups
from keepdrop.envs.evaluate import MaskEvaluator, channels_last
from keepdrop.envs.groups import FilterGroup
from keepdrop.envs.masking import masked_inputs
from keepdrop.envs.networks import cifar_resnet, vgg16_bn
from torch import Tensor, nn

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: cifar_resnet(20),
    "resnet56": lambda: cifar_resnet(56),
    "vgg16_bn": vgg16_bn,
}
NAIVE_BATCH = 256


def main() -> None:
    """Run the benchmark and print one row a group."""
    arguments = parsed()
    torch.manual_seed(0)
    model = NETWORKS[arguments.network]().eval()
    images, labels = channels_last(torch.randn(arguments.images, 3, 32, 32)), torch.randint(10, (arguments.images,))
    plan = find_groups(model, images[:1])
    groups = [group for group in plan.groups if arguments.all or group.name != "conv1"]
    rows = [measure(model, group, images, labels, arguments.masks, arguments.rounds) for group in groups]
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    print(f"geometric mean: {mean:.2f} x")
    if arguments.json:
        facts = {"network": arguments.network, "masks": arguments.masks, "images": arguments.images} | machine()
        content = facts | {"geometric_mean": mean, "groups": rows}
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet20")
    parser.add_argument("--masks", type=int, default=16)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="the residual stream of a ResNet too")
    parser.add_argument("--json", default=None)
    return parser.parse_args()


def measure(
    model: nn.Module, group: FilterGroup, images: Tensor, labels: Tensor, n_masks: int, rounds: int
) -> dict[str, Any]:
    """Paired times of one group, and whether all counts agree."""
    masks = torch.rand(n_masks, group.n_filters, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    evaluator = MaskEvaluator(model, [group], images, labels)
    seconds: dict[str, list[float]] = {"naive": [], "ours": [], "plain": []}
    counts: dict[str, Tensor] = {}
    for turn in range(rounds):
        jobs: list[tuple[str, Callable[[], Tensor]]] = [
            ("naive", lambda: naive(model, group, masks, images, labels)),
            ("ours", lambda: evaluator.correct({group.name: masks})),
            ("plain", lambda: plain(model, images, labels)),
        ]
        for name, job in jobs if turn % 2 else reversed(jobs):
            started = time.perf_counter()
            counts[name] = job()
            seconds[name].append(time.perf_counter() - started)
    return row(model, group, evaluator, images, n_masks, {k: statistics.median(v) for k, v in seconds.items()}, counts)


def row(
    model: nn.Module,
    group: FilterGroup,
    evaluator: MaskEvaluator,
    images: Tensor,
    n_masks: int,
    median: dict[str, float],
    counts: dict[str, Tensor],
) -> dict[str, Any]:
    """One group's figures; prints them as well."""
    whole = count_cost(model, images[:1]).macs
    behind = suffix_macs(model, group, images)
    plain_rate = whole * len(images) / median["plain"]
    suffix_rate = behind * len(images) * n_masks / median["ours"]
    figures = {
        "group": group.name,
        "method": evaluator.method,
        "naive_seconds": median["naive"],
        "ours_seconds": median["ours"],
        "ratio": median["naive"] / median["ours"],
        "limit": whole / behind,
        "efficiency": suffix_rate / plain_rate,
        "cached_mib": evaluator.cached_bytes / 2**20,
        "counts_equal": bool((counts["naive"] == counts["ours"]).all()),
    }
    print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()), flush=True)
    return figures


@torch.inference_mode()
def naive(model: nn.Module, group: FilterGroup, masks: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The loop every peer has: the whole masked network over all images, mask by mask."""
    counts = []
    for mask in masks:
        with masked_inputs(model, {group: mask}):
            counts.append(plain(model, images, labels))
    return torch.stack(counts)


@torch.inference_mode()
def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Right answers of the network as it is."""
    batches = zip(images.split(NAIVE_BATCH), labels.split(NAIVE_BATCH), strict=True)
    return torch.stack([(model(x).argmax(1) == y).sum() for x, y in batches]).sum()


def suffix_macs(model: nn.Module, group: FilterGroup, images: Tensor) -> int:
    """MACs an image of the modules that run at or after the group's first consumer."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: order.append(name))
        for name, module in model.named_modules()
        if name
    ]
    with torch.inference_mode():
        model(images[:1])
    for handle in handles:
        handle.remove()
    first = min(order.index(cut.module) for cut in group.consumers)
    cost = count_cost(model, images[:1])
    return sum(cost.modules[name].macs for name in set(order[first:]) if name in cost.modules)


def machine() -> dict[str, Any]:
    """On what it was measured."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    main()
