"""How fast masks are evaluated: keepdrop's split evaluator against the naive loop, per filter group, paired.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --network resnet20 --json resnet20.json

Naive, and fair: the whole network for every mask, eager, one mask at a time, batch 256, channels-last, inference mode;
the mask is one multiplication at the input of each consumer. Ours: `MaskEvaluator`, its frontier cached beforehand, no
mask remembered. Within every round the two take turns on the same slice of masks, and the ratio is the median over
rounds of naive / ours; time is the processor time of the thread, so that a round in which the machine was busy with
something else does not count double (with `--device cuda` it is wall-clock time until the GPU is done, all masks take
part in every round, the first round is for warming up, and the naive loop computes in float32 proper, or in TF32,
torch's own default, with `--tf32`). `limit` is what leaving out the prefix alone allows: MACs of the whole network /
MACs behind the frontier. `rate` are the nominal MACs a second of the suffix over the best of the plain network (over
batches); `rate_run` counts only MACs that are carried out, channels left out being none. Answers are compared, too.
Random weights: time does not depend on them. `--naive-images` lets the slow side look at fewer images, its time an
image being the same. Writes after every group, and continues with what the file already holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.batch_size import wait_for
from keepdrop.envs.networks.built_in import cifar_resnet, vgg16_bn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.filter_group import FilterGroup
from torch import Tensor, nn
from torch.backends import cudnn

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: cifar_resnet(20),
    "resnet56": lambda: cifar_resnet(56),
    "vgg16_bn": vgg16_bn,
}
NAIVE_BATCH = 256


def main() -> None:
    """Run the benchmark and print one row per group."""
    arguments = parsed()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    model = NETWORKS[arguments.network]().eval().to(arguments.device, memory_format=torch.channels_last)
    images, labels = torch.randn(arguments.images, 3, 32, 32), torch.randint(10, (arguments.images,))
    images, labels = images.to(arguments.device, memory_format=torch.channels_last), labels.to(arguments.device)
    groups = [group for group in find_groups(model, images[:1]).groups if group.name != "conv1"]
    known = {} if arguments.json is None or not arguments.json.exists() else json.loads(arguments.json.read_text())
    rows = {row["group"]: row for row in known.get("groups", [])}
    for group in groups:
        if group.name not in rows:
            rows[group.name] = measure(model, group, images, labels, arguments)
            write(arguments, [rows[each.name] for each in groups if each.name in rows])


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The means so far, and everything into the file."""
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    convs = [row["ratio"] for row in rows if row["limit"] < 1000]  # a linear layer alone behind it costs nothing
    facts = {
        **{name: getattr(arguments, name) for name in ("network", "masks", "images", "rounds", "dtype", "tf32")},
        **machine(arguments.device),
        "geometric_mean": mean,
        "geometric_mean_with_a_convolution_behind": statistics.geometric_mean(convs),
        "geometric_mean_of_limits": statistics.geometric_mean(row["limit"] for row in rows),
        "groups": rows,
    }
    print(f"geometric mean: {mean:.2f} x, with a convolution behind {statistics.geometric_mean(convs):.2f} x")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet20")
    parser.add_argument("--masks", type=int, default=16)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="the masks are spread over them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="our suffix through torch.compile")
    parser.add_argument("--tf32", action="store_true", help="the naive loop on a GPU may round to TF32")
    parser.add_argument("--naive-images", type=int, default=None, help="that the naive loop looks at, the first ones")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def measure(
    model: nn.Module, group: FilterGroup, images: Tensor, labels: Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Paired times of one group, and whether all answers agree; prints the row as well."""
    masks = torch.rand(arguments.masks, group.n_filters, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    evaluator = MaskEvaluator(
        model, [group], images, labels, dtype=arguments.dtype, memory=0, compile=arguments.compile
    )
    warming_up = int(images.is_cuda)
    rounds, apart, few = [], 0, min(arguments.naive_images or len(images), len(images))
    plain = best_plain(model, images, arguments.tf32)
    for turn in range(-warming_up, arguments.rounds):
        some = masks if images.is_cuda else masks[turn :: arguments.rounds]  # a GPU takes them all at once
        jobs: list[tuple[str, int, Callable[[], Tensor]]] = [
            ("naive", few, lambda some=some: naive(model, group, some, images[:few], labels[:few], arguments.tf32)),
            ("ours", len(images), lambda some=some: evaluator.correct_per_image({group.name: some})),
        ]
        spent, right = {}, {}
        for name, n_images, job in jobs if turn % 2 else reversed(jobs):
            started = clock(images)
            right[name] = job()
            spent[name] = (clock(images) - started) / len(some) / n_images
        spent["plain"] = min(plain, spent["naive"])
        if turn < 0:
            continue
        rounds.append(spent)
        apart += int((right["naive"] != right["ours"][:, :few]).sum())
    return row(model, group, masks, evaluator, images, rounds, {"answers_apart": apart, "naive_images": few})


def clock(images: Tensor) -> float:
    """Processor time of this thread, or the time once a GPU has done everything; seconds."""
    wait_for(images.device)
    return time.perf_counter() if images.is_cuda else time.process_time()


def row(
    model: nn.Module,
    group: FilterGroup,
    masks: Tensor,
    evaluator: MaskEvaluator,
    images: Tensor,
    rounds: list[dict[str, float]],
    beside: dict[str, int],
) -> dict[str, Any]:
    """One group's figures: medians over the rounds."""
    whole, behind = count_cost(model, images[:1]).macs, suffix_macs(model, group, images)
    cost = count_cost(model, images[:1]).modules
    left_out = sum(cost[cut.module].macs for cut in group.consumers) * float((~masks).double().mean())

    def middle(value: Callable[[dict[str, float]], float]) -> float:
        return float(f"{statistics.median(map(value, rounds)):.4g}")

    figures = {
        "group": group.name,
        "naive_images_per_second": middle(lambda r: 1 / r["naive"]),
        "ours_images_per_second": middle(lambda r: 1 / r["ours"]),
        "ratio": middle(lambda r: r["naive"] / r["ours"]),
        "limit": float(f"{whole / behind:.4g}"),
        "rate": middle(lambda r: behind / r["ours"] / (whole / r["plain"])),
        "rate_run": middle(lambda r: (behind - left_out) / r["ours"] / (whole / r["plain"])),
        "batch": evaluator.batch,
        "cached_mib": float(f"{evaluator.cached_bytes / 2**20:.4g}"),
        **beside,
    }
    print(" ".join(f"{key}={value}" for key, value in figures.items()), flush=True)
    return figures


@torch.inference_mode()
def naive(
    model: nn.Module, group: FilterGroup, masks: Tensor, images: Tensor, labels: Tensor, tf32: bool = False
) -> Tensor:
    """The loop every peer has: the whole masked network over all images, mask by mask; right or not, (M, B)."""
    right = []
    for mask in masks:
        with multiplied(model, group, mask), cudnn.flags(enabled=True, allow_tf32=tf32):
            batches = zip(images.split(NAIVE_BATCH), labels.split(NAIVE_BATCH), strict=True)
            right.append(torch.cat([model(x).argmax(1) == y for x, y in batches]))
    return torch.stack(right).cpu()


@contextmanager
def multiplied(model: nn.Module, group: FilterGroup, mask: Tensor) -> Iterator[None]:
    """The mask as one multiplication at each consumer's input."""
    handles = []
    for cut in group.consumers:
        module = model.get_submodule(cut.module)
        factor = torch.ones(module.weight.shape[1], device=module.weight.device)
        factor[torch.from_numpy(cut.channels)[~mask].flatten()] = 0
        factor = factor[:, None, None] if isinstance(module, nn.Conv2d) else factor
        handles.append(module.register_forward_pre_hook(lambda _, inputs, factor=factor: (inputs[0] * factor,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def best_plain(model: nn.Module, images: Tensor, tf32: bool = False) -> float:
    """Seconds per image of the plain network at its best batch (the naive one, with a mask, is another)."""
    found = []
    for batch in 2 * ((256, 1024) if images.is_cuda else (64, 128)):
        started = clock(images)
        with cudnn.flags(enabled=True, allow_tf32=tf32):
            model(images[:batch])
        found.append((clock(images) - started) / batch)
    return min(found)


def suffix_macs(model: nn.Module, group: FilterGroup, images: Tensor) -> int:
    """MACs per image of the modules that run at or after the group's first consumer."""
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


if __name__ == "__main__":
    main()
