"""What each step costs with networks of the size people have: seconds and peak memory at 224 pixels.

    pip install torchvision                 # and onnx, onnxscript, onnxruntime for the last step
    python benchmarks/sizes.py              # resumes where it stopped; --fresh starts anew
    python benchmarks/sizes.py --print      # the tables of docs/performance.md

ResNet-50, MobileNetV2 and EfficientNet-B0 of torchvision with random weights, on random images. Every step runs in a
process of its own, which first prepares what comes before it. Seconds are those of the step alone: on the clock, and of
the processor over all threads (the table), which other jobs disturb less. `peak` is the most memory that the process
held at once (`ru_maxrss`: torch, network and images included), `before` the same when the step began. `IMAGES` images
of the fit split, and as many reward images; steps that read images grow with their number in seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "sizes.json"
NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0")
SIDE, IMAGES, MASKS = 224, 32, 16
LIMIT_SECONDS = 3600
Step = Callable[[], Any]


def main() -> None:
    """Measure what is missing, one process a row."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measured(*arguments.row.split("/"), device=arguments.device)))
        return
    if arguments.fresh:
        arguments.json.unlink(missing_ok=True)
    from common import machine, opened

    about = {"side": SIDE, "images": IMAGES, "masks": MASKS, "threads": arguments.threads, "device": arguments.device}
    found = opened(arguments.json, about, "rows")
    for row in (f"{network}/{step}" for network in arguments.networks for step in arguments.steps):
        if row not in found["rows"] and not arguments.print:
            found["rows"][row] = in_own_process(row, arguments)
            found["machine"] = machine(arguments.device)
            arguments.json.parent.mkdir(exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
            print(row, found["rows"][row], flush=True)
    print(table(found["rows"]))


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--print", action="store_true", help="print the table of what is there")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, or {"failed": why}."""
    command = [sys.executable, __file__, "--row", row, "--threads", str(arguments.threads)]
    try:
        done = subprocess.run(
            [*command, "--device", arguments.device], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT_SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        return {"failed": last[0]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measured(network: str, step: str, device: str) -> dict[str, Any]:
    """Seconds and memory of one step; a step returns facts of its own, or nothing."""
    torch.manual_seed(0)
    run = STEPS[step](network, device)
    wait(device)
    before, started, processor = memory(device), time.perf_counter(), time.process_time()
    facts = run()
    wait(device)
    spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    facts = facts if isinstance(facts, dict) else {}
    return {**{key: round(value, 2) for key, value in spent.items()}, "before": before, "peak": memory(device), **facts}


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def memory(device: str) -> float:
    """The most that was held at once so far, in GiB; on a GPU, what torch held there."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def made(network: str, device: str) -> nn.Module:
    """The network with random weights, in evaluation mode."""
    from coverage import build

    return build("torchvision", network).eval().to(device)


def task_of(network: str, device: str) -> Any:
    """A task on random images, its groups found and not verified."""
    from common import random_task
    from keepdrop.envs.groups.finding import find_groups

    task = random_task(made(network, device), SIDE, (IMAGES, 2 * IMAGES), "test", IMAGES, device=device)
    task.plan = find_groups(task.model, task.example, verify=False)
    return task


def one_shot_of(network: str, device: str) -> Any:
    """All groups as one decision, repaired as a search repairs."""
    from keepdrop.envs.one_shot import OneShotTask
    from keepdrop.envs.repair.reconstruction import ReconstructionSettings
    from keepdrop.experiments.pruning.network_search import NetworkSearchSettings

    return OneShotTask(task_of(network, device), NetworkSearchSettings().rough(ReconstructionSettings()))


def half(one_shot: Any) -> Tensor:
    """A mask (N,) that keeps a random half of every group."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randperm(group.n_filters, generator=generator) * 2 < group.n_filters for group in one_shot.groups]
    return torch.cat(parts)


def example() -> Tensor:
    """One image."""
    return torch.randn(1, 3, SIDE, SIDE)


def load(network: str, device: str) -> Step:
    """The network read from a file of its weights and copied."""
    from keepdrop.envs.networks.checkpoint import load_checkpoint, save_weights
    from keepdrop.envs.networks.copying import copied

    folder = Path(tempfile.mkdtemp())
    save_weights(made(network, device), folder / "weights.safetensors")
    model = made(network, device)

    def run() -> None:
        load_checkpoint(model, folder / "weights.safetensors")
        copied(model)

    return run


def inspect(network: str, device: str) -> Step:
    """What `keepdrop inspect` does."""
    from keepdrop.experiments.commands.inspect import describe

    model = made(network, device)
    return lambda: {"groups": len(describe(model, torch.randn(3, 3, SIDE, SIDE))["groups"])}


def groups(network: str, device: str, verify: bool = False) -> Step:
    """Groups found and not verified."""
    from keepdrop.envs.groups.finding import find_groups

    model = made(network, device)
    return lambda: {"groups": len(find_groups(model, example(), verify=verify).groups)}


def verified(network: str, device: str) -> Step:
    """Groups found and verified, as every command does."""
    return groups(network, device, verify=True)


def statistics(network: str, device: str) -> Step:
    """What an agent sees of every filter of the network."""
    one_shot = one_shot_of(network, device)
    return lambda: {"filters": len(one_shot.observation.statistics)}


def criterion(network: str, device: str) -> Step:
    """The error curves behind one round of the `reconstruction` criterion."""
    from keepdrop.envs.repair.reconstruction_error import error_curves

    task = task_of(network, device)
    return lambda: {"curves": len(error_curves(task.model, task.groups, *task.fit_images(IMAGES)))}


def dense_part(network: str, device: str) -> Step:
    """What a network's agent needs once: the dense network run for the repair, and what comes before every cut."""
    one_shot = one_shot_of(network, device)
    return lambda: {"obstacle": one_shot.judge.obstacle}


def one_mask(network: str, device: str) -> Step:
    """One mask of a network's agent: cut, repaired and judged on the reward images."""
    one_shot = one_shot_of(network, device)
    keep = half(one_shot)
    assert not one_shot.judge.obstacle
    return lambda: {"accuracy": one_shot.outcomes(keep[None])[0].pruned_accuracy}


def final_cut(network: str, device: str) -> Step:
    """The network of one mask, cut for real and repaired."""
    one_shot = one_shot_of(network, device)
    keep = half(one_shot)
    assert one_shot.reconstruction is not None
    return lambda: {"params": sum(each.numel() for each in one_shot.cut(keep).parameters())}


def middle_layer(network: str, device: str) -> Any:
    """The group in the middle of the network, as a decision of its own."""
    task = task_of(network, device)
    return task.layer(task.groups[len(task.groups) // 2].name)


def layer_ready(network: str, device: str) -> Step:
    """What one layer's agent needs once: statistics, compensation, and what no mask changes."""
    layer = middle_layer(network, device)

    def run() -> dict[str, Any]:
        _ = layer.observation, layer.compensation
        return {"cache_gib": round(layer.search_evaluator.cached_bytes / 2**30, 2)}

    return run


def layer_masks(network: str, device: str) -> Step:
    """16 masks of one layer, half of its filters each."""
    layer = middle_layer(network, device)
    masks = torch.rand(MASKS, layer.n_filters) < 0.5
    _ = layer.observation, layer.compensation, layer.search_evaluator
    return lambda: {"answers": len(layer.outcomes(masks))}


def cut(network: str, device: str) -> Step:
    """Half of the filters taken out of every group, without a repair."""
    from keepdrop.envs.surgery.cutting import prune

    one_shot = one_shot_of(network, device)
    choices = one_shot.choices(half(one_shot))
    return lambda: {"params": sum(each.numel() for each in prune(one_shot.task.model, choices).parameters())}


def pruned(network: str) -> tuple[nn.Module, Any]:
    """The network of `cut`, and its channels in terms of the dense one."""
    from keepdrop.envs.surgery.cutting import prune
    from keepdrop.envs.surgery.kept_channels import KeptChannels

    one_shot = one_shot_of(network, "cpu")
    choices = one_shot.choices(half(one_shot))
    return prune(one_shot.task.model, choices), KeptChannels().after(one_shot.task.model, choices)


def saved(network: str, device: str) -> Step:
    """The pruned network written as data."""
    from keepdrop.envs.files.pruned_network import save_pruned

    model, kept = pruned(network)
    folder = Path(tempfile.mkdtemp())
    return lambda: save_pruned(model, folder, kept=kept, example=example())


def loaded(network: str, device: str) -> Step:
    """The pruned network rebuilt from its files."""
    from keepdrop.envs.files.pruned_network import load_pruned, save_pruned

    model, kept = pruned(network)
    folder = Path(tempfile.mkdtemp())
    save_pruned(model, folder, kept=kept, example=example())
    return lambda: load_pruned(folder, lambda: made(network, "cpu"))


def exported(network: str, device: str) -> Step:
    """The pruned network as ONNX."""
    from keepdrop.experiments.deploy.export import export_onnx

    model, _ = pruned(network)
    return lambda: export_onnx(model, example(), Path(tempfile.mkdtemp()) / "model.onnx")


STEPS: dict[str, Callable[[str, str], Step]] = {
    "load": load,
    "inspect": inspect,
    "groups": groups,
    "verified": verified,
    "statistics": statistics,
    "criterion": criterion,
    "dense_part": dense_part,
    "one_mask": one_mask,
    "final_cut": final_cut,
    "layer_ready": layer_ready,
    "layer_masks": layer_masks,
    "cut": cut,
    "saved": saved,
    "loaded": loaded,
    "exported": exported,
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Processor seconds and GiB at the peak, a row for each step that ran."""
    networks = list(dict.fromkeys(row.split("/")[0] for row in rows))
    lines = [f"| step | {' | '.join(networks)} |", f"|---|{'---:|' * len(networks)}"]
    for step, make in STEPS.items():
        if not any(f"{network}/{step}" in rows for network in networks):
            continue
        cells = [shown(rows.get(f"{network}/{step}", {})) for network in networks]
        lines.append(f"| {(make.__doc__ or '').strip().rstrip('.')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(row: dict[str, Any]) -> str:
    """One cell."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    return f"{row['processor_seconds']:.1f} s, {row['peak']:.1f} GiB" if row else ""


if __name__ == "__main__":
    main()
