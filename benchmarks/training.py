"""How fast networks train: `fit_network` against hand-written loops and against an earlier version, in turns.

    OMP_NUM_THREADS=1 python benchmarks/training.py --networks resnet20 --batches 128 [--before FOLDER]
    python benchmarks/training.py --device cuda [--before FOLDER] [--compiled resnet56/128/teacher/bfloat16]
    python benchmarks/training.py --print --json FILE          # the table of docs/performance.md

A row is a network, a batch size, with or without a dense teacher of the same kind (distillation), and a precision.
Every loop trains on the same random images (3, 32, 32), shifted and mirrored, in a process of its own, which stays;
they take turns. `ours` is `fit_network`, `ours_compiled` the same with `compile=True`. Hand-written, each as fast as we
could make it:

- `eager`: images on the device, channels-last images and weights, autocast, nobody waits inside an epoch;
- `graph` (GPU): the same step captured as one CUDA graph;
- `compiled`: forward and loss, teacher included, by `torch.compile`, on a GPU with `mode="reduce-overhead"`.

Seconds are the processor's on a CPU, where nothing else is waited for, and those of the clock on a GPU, without the
first epoch (compiling, capturing, moving images; its seconds are kept as `start`). Medians of `--rounds`; a ratio is
the median of those of the rounds, against the best of the hand-written loops. `--before` is a folder that holds an
earlier `keepdrop` package, as in network_search.py. The result is written after every row, and what is in the file is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parents[1] / "benchmarks/results/training.json"
NETWORKS, BATCHES = ("resnet56", "resnet20", "vgg16_bn"), (128, 512)
TEACHERS, PRECISIONS = ("teacher", "alone"), ("bfloat16", "float32")
STEPS = {"cpu": 4, "cuda": 40}  # of an epoch
EPOCHS = {"cpu": (0, 1), "cuda": (1, 2)}  # before the clock starts, and timed
WEIGHT, TEMPERATURE, PADDING = 0.5, 4.0, 4
RATIOS = {"ratio": ("ours", ""), "ratio_compiled": ("ours_compiled", ""), "ratio_before": ("ours", "before")}


def main() -> None:
    """Measure what is missing, print the table; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--teachers", nargs="+", default=TEACHERS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--compiled", nargs="*", help="rows to compile for as well (default: all on a CPU, no others)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="only the table of what is in the file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
    elif options.print:
        print(table(json.loads(options.json.read_text())["rows"]))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """All loops in turns, row after row."""
    from common import machine, opened

    began, kind = time.perf_counter(), torch.device(options.device).type
    about = {"device": kind, "threads": options.threads, "steps": STEPS[kind], "epochs": EPOCHS[kind][1]}
    found = opened(options.json, about, "rows")
    rows = [
        f"{network}/{batch}/{teacher}/{precision}"
        for network in options.networks
        for batch in options.batches
        for teacher in options.teachers
        for precision in options.precisions
    ]
    names = [
        "ours",
        "eager",
        *(["graph"] if kind == "cuda" else []),
        "compiled",
        "ours_compiled",
        *(["before"] if options.before else []),
    ]
    processes = {name: started(name, options) for name in names}
    for row in rows:
        if row in found["rows"] or time.perf_counter() - began > options.seconds:
            continue
        compiles = row in options.compiled if options.compiled is not None else kind == "cpu"
        taking = {name: each for name, each in processes.items() if "compiled" not in name or compiles}
        found["rows"][row] = measured(row, taking, options.rounds)
        found["machine"] = machine(options.device)
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(row, json.dumps(found["rows"][row]), flush=True)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    print(table(found["rows"]))


def started(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A process with one of the loops."""
    command = [sys.executable, __file__, "--serve", "ours" if name == "before" else name]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if name == "before":
        environment["PYTHONPATH"] = str(options.before)
    command += ["--device", options.device, "--threads", str(options.threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def asked(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """The process's answer to a line."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return {"failed": "its process ended"}
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"failed": "its process ended"}


def measured(row: str, processes: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, Any]:
    """Images a second of every loop, medians, and the ratios of the rounds."""
    found: dict[str, Any] = {"start": {}, "failed": {}}
    taking = {}
    for name, process in processes.items():
        ready = asked(process, row)
        if "failed" in ready:
            found["failed"][name] = ready["failed"]
        else:
            taking[name] = process
            found["start"][name] = round(ready["start"], 1)
    turns = [{name: asked(process, "turn") for name, process in taking.items()} for _ in range(rounds)]
    speeds = [
        {name: each["images"] / each["seconds"] for name, each in turn.items() if "images" in each} for turn in turns
    ]
    found["images_per_second"] = {
        name: round(statistics.median(turn[name] for turn in speeds), 1)
        for name in taking
        if all(name in turn for turn in speeds)
    }
    theirs = [name for name in ("eager", "graph", "compiled") if name in found["images_per_second"]]
    best = max(theirs, key=found["images_per_second"].__getitem__)
    found["best"] = best
    for name, (mine, other) in RATIOS.items():
        pairs = [(turn.get(mine), turn.get(other or best)) for turn in speeds]
        if all(None not in pair for pair in pairs):
            found[name] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    names = ["before", "eager", "graph", "compiled", "ours", "ours_compiled"]
    names = [name for name in names if any(name in row["images_per_second"] for row in rows.values())]
    shown = " | ".join(names).replace("ours_compiled", "ours, compiled")
    lines = [f"| network | batch | | precision | {shown} | ours / best | ours, compiled / best | ours / before |"]
    lines.append(f"|---|--:|---|---|{'--:|' * len(names)}--:|--:|--:|")
    for key, row in rows.items():
        speeds = [
            f"{row['images_per_second'][name]:,.0f}" if name in row["images_per_second"] else "" for name in names
        ]
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in RATIOS]
        lines.append(f"| {' | '.join([*key.replace('alone', '').split('/'), *speeds, *ratios])} |")
    return "\n".join(lines)


# One of the processes.


def serve(options: argparse.Namespace) -> None:
    """Prepare for each row that comes in, and train whenever it is this process's turn."""
    torch.set_num_threads(options.threads)
    train: Callable[[], dict[str, float]] | None = None
    for line in sys.stdin:
        try:
            if line.strip() != "turn":
                train = None
                train = LOOPS[options.serve](*line.strip().split("/"), torch.device(options.device))
                answer = {"start": train()["start"]}
            else:
                assert train is not None
                answer = train()
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


def ours(
    network: str, batch: str, teacher: str, precision: str, device: torch.device, **more: Any
) -> Callable[[], dict[str, float]]:
    """`fit_network` as fine-tuning calls it."""
    from keepdrop.envs.data.sources import ArrayImages
    from keepdrop.experiments.training.augment import RandomCropFlip
    from keepdrop.experiments.training.loop import TrainSettings, fit_network

    pixels, labels = images_of(int(batch), device.type)
    data = ArrayImages(pixels, labels, [0.5] * 3, [0.25] * 3, 10)
    warm, timed = EPOCHS[device.type]
    chosen = more | ({"distill_weight": WEIGHT} if teacher == "teacher" else {})
    settings = TrainSettings(
        epochs=warm + timed, batch_size=int(batch), lr=0.01, schedule="constant", bf16=precision == "bfloat16", **chosen
    )
    model, dense = built(network, device), built(network, device).eval()

    def train() -> dict[str, float]:
        clock = Clock(device, warm)
        options: dict[str, Any] = {"seed": 0, "augment": RandomCropFlip(PADDING), "device": device}
        fit_network(model, data, settings, **options, teacher=dense, progress=lambda record: clock.epoch())
        return clock.found(timed * len(data))

    return train


def by_hand(kind: str) -> Callable[..., Callable[[], dict[str, float]]]:
    """A loop of our own for this benchmark."""

    def prepared(network: str, batch: str, teacher: str, precision: str, device: torch.device) -> Any:
        loop = Loop(kind, network, int(batch), teacher == "teacher", precision == "bfloat16", device)
        warm, timed = EPOCHS[device.type]

        def train() -> dict[str, float]:
            clock = Clock(device, warm)
            for _ in range(warm + timed):
                loop.epoch()
                clock.epoch()
            return clock.found(timed * len(loop.labels))

        return train

    return prepared


class Clock:
    """Seconds of epochs, those of the processor on a CPU."""

    def __init__(self, device: torch.device, warm: int) -> None:
        self.device, self.warm = device, warm
        self.times = [self.now()]

    def now(self) -> float:
        """Once everything is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def epoch(self) -> None:
        """One has ended."""
        self.times.append(self.now())

    def found(self, n_images: int) -> dict[str, float]:
        """Of the epochs that count, and of those before."""
        return {
            "images": n_images,
            "seconds": self.times[-1] - self.times[self.warm],
            "start": self.times[max(self.warm, 1)] - self.times[0],
        }


class Loop:
    """The step of a training, written by hand."""

    def __init__(self, kind: str, network: str, batch: int, teacher: bool, bf16: bool, device: torch.device) -> None:
        self.kind, self.batch, self.bf16, self.device = kind, batch, bf16, device
        pixels, self.labels = (each.to(device) for each in images_of(batch, device.type))
        self.images = (pixels / 255 - 0.5) / 0.25
        self.model = built(network, device).to(memory_format=torch.channels_last)
        dense = built(network, device).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.dense = dense if teacher else None
        weights = [each for each in self.model.parameters() if each.dim() > 1]
        others = [each for each in self.model.parameters() if each.dim() <= 1]
        groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.loss: Any = torch.compile(self.loss_of, mode=mode) if kind == "compiled" else self.loss_of
        self.step = self.replayed() if kind == "graph" else self.taken

    def epoch(self) -> float:
        """All images once; the loss is looked at in the end."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for images, labels in self.batches():
            total += self.step(images, labels)
        return float(total)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Shifted and mirrored."""
        order = torch.randperm(len(self.labels), device=self.device)
        for chosen in order.split(self.batch):
            images, n_images = self.images[chosen], len(chosen)
            side = images.shape[-1]
            crops = F.pad(images, (PADDING,) * 4).unfold(2, side, 1).unfold(3, side, 1)
            shifts = torch.randint(2 * PADDING + 1, (2, n_images), device=self.device)
            images = crops[torch.arange(n_images, device=self.device), :, shifts[0], shifts[1]]
            mirrored = torch.rand(n_images, 1, 1, 1, device=self.device) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[chosen]

    def loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, with the teacher's share (Hinton et al. 2015)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            answers = self.model(images)
            if self.dense is not None:
                with torch.no_grad():
                    taught = self.dense(images).float()
        answers = answers.float()
        loss = F.cross_entropy(answers, labels)
        if self.dense is None:
            return loss
        mine, theirs = (F.log_softmax(each / TEMPERATURE, 1) for each in (answers, taught))
        apart = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        return (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * apart

    def taken(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step."""
        if self.kind == "compiled" and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def replayed(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The step as a CUDA graph: what it is given is copied to where the graph reads."""
        self.model.train()
        images, labels = (each.clone() for each in next(self.batches()))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.taken(images, labels)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = self.taken(images, labels)

        def step(given: Tensor, targets: Tensor) -> Tensor:
            images.copy_(given)
            labels.copy_(targets)
            graph.replay()
            return loss

        return step


LOOPS = {kind: by_hand(kind) for kind in ("eager", "graph", "compiled")}
LOOPS |= {"ours": ours, "ours_compiled": partial(ours, compile=True)}


def images_of(batch: int, kind: str) -> tuple[Tensor, Tensor]:
    """Random pixels uint8 (n, 3, 32, 32) and labels (n,), as many as an epoch takes."""
    generator, n_images = torch.Generator().manual_seed(0), STEPS[kind] * batch
    pixels = torch.randint(256, (n_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(10, (n_images,), generator=generator)


def built(network: str, device: torch.device) -> nn.Module:
    """With random weights."""
    from keepdrop.envs.networks import built_in

    torch.manual_seed(0)
    depth = network.removeprefix("resnet")
    return (built_in.cifar_resnet(int(depth)) if depth.isdigit() else getattr(built_in, network)()).to(device)


if __name__ == "__main__":
    main()
