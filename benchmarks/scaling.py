"""What an engine costs and brings: a network search and a comparison with 1 and 2 workers, the overhead of a mask.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py            # measures what is missing
    python benchmarks/scaling.py --simulate --out docs/assets/scaling.svg

Measured on this machine: seconds of the updates of a search (ResNet-20 on random images of
32 x 32 pixels, workers started beforehand), of a whole `keepdrop compare` on the digits, processes included, and of
items that do nothing but travel as a mask does. 1 and 2 workers take turns, medians over rounds count; the load of the
machine stands beside them. Seconds need two idle cores; `critical_seconds` does not: the processor time of the driver
and of the busiest worker for the masks of one update, which idle cores would take as wall-clock time.

SIMULATED, not measured: more workers than two. An update of M masks on W workers takes its part in the driver, M / W
masks (rounded up) at the times measured one by one, drawn at random, of which the slowest worker counts, and for every
part that travels the measured overhead, one after the other, as the driver sends them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import opened, random_task
from keepdrop import LocalEngine, RayEngine
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.experiments.engines.engine import Engine
from keepdrop.experiments.engines.spread_task import spread_over
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings

RESULTS = Path(__file__).parent / "results" / "scaling.json"
MASKS, IMAGES, UPDATES, ITEMS = 16, 200, 3, 200
KINDS: dict[str, type[LocalEngine] | type[RayEngine]] = {"processes": LocalEngine, "ray": RayEngine}
WORKERS = (1, 2, 4, 8, 16, 32, 64)
COMPARE = ["layers=[conv2,conv3]", "targets.removed=[0.3,0.5]", "methods=[l1-uniform,l2-uniform,fpgm-uniform]"]
COMPARE += ["stages=[zero,full]", "seeds=[0,1,2,3]", "compensate=[true]", "finetune.epochs=60", "quiet=true"]


def main() -> None:
    """Measure, or simulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--parts", nargs="+", default=["search", "compare"], choices=["search", "compare"])
    parser.add_argument("--busy", action="store_true", help="on a machine without idle cores: no wall-clock time")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = {"masks": MASKS, "images": IMAGES, "updates": UPDATES, "threads": torch.get_num_threads()}
    found = opened(options.json, about, "runs")
    if not options.simulate:
        for _ in range(options.rounds):
            for kind in options.kinds:
                for workers, part in itertools.product((1, 2), options.parts):
                    run = search(kind, workers, options.busy) if part == "search" else compare(kind, workers)
                    run["load"] = round(os.getloadavg()[0], 1)
                    found["runs"].setdefault(f"{part} {kind} {workers}", []).append(run)
                    print(part, kind, workers, run, flush=True)
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found["runs"])
    if options.out:
        draw(found["runs"], options.out)


def make_one_shot() -> OneShotTask:
    """ResNet-20 with random weights; how well it answers has no part in the time."""
    torch.manual_seed(0)
    task = random_task(cifar_resnet(20).eval(), 32, (600, 300), "train", IMAGES)
    return OneShotTask(task, ReconstructionSettings(images=200, places=16))


def search(kind: str, workers: int, busy: bool) -> dict[str, Any]:
    """Seconds of the updates of a search, of an item that does nothing, and bytes."""
    one_shot = make_one_shot()
    settings = NetworkSearchSettings(masks=MASKS, images=IMAGES, agent=NetworkAgentSettings(updates=UPDATES))
    engine: Engine = KINDS[kind](workers=workers)  # type: ignore[assignment]
    times: list[float] = []
    with spread_over(engine, one_shot) as judged:
        rough = judged.with_repair(settings.rough(one_shot.repair))
        warm = torch.ones(2 * workers, one_shot.n_filters, dtype=torch.bool)
        warm[:, 0] = False
        rough.outcomes(warm, torch.arange(8))  # workers begin, and measure the dense network's part
        spread = getattr(judged, "spread", None)
        found: dict[str, Any] = {"critical_seconds": critical(rough)}
        if not busy:
            agent = NetworkAgent(settings, judged, lambda trainer, metrics: times.append(time.perf_counter()))
            agent.choose(Target(0.3, "network"), 0)
            found["seconds"] = round(times[-1] - times[0], 3)
        if spread is not None:
            mask, some = torch.ones(1, one_shot.n_filters, dtype=torch.bool), torch.arange(IMAGES)
            before = getattr(spread, "item_bytes", 0)
            started = time.perf_counter()
            spread.in_order(_nothing, [(None, mask, some)] * ITEMS)
            found["item_ms"] = round(1000 * (time.perf_counter() - started) / ITEMS, 3)
            if before:
                found["item_bytes"] = (spread.item_bytes - before) // ITEMS
                found["shared_bytes"] = spread.shared_bytes
    if kind == "processes" and workers == 1:  # one by one, for the simulation
        keep = torch.rand(12, one_shot.n_filters, generator=torch.Generator().manual_seed(0)) > 0.3
        found["mask_seconds"] = [round(_timed(rough, row[None]), 4) for row in keep]
    return found


def _timed(one_shot: OneShotTask, masks: torch.Tensor) -> float:
    started = time.perf_counter()
    one_shot.outcomes(masks, torch.arange(IMAGES))
    return time.perf_counter() - started


def critical(judged: OneShotTask) -> float:
    """Processor seconds that judging the masks of an update takes at least: the driver's and the busiest worker's."""
    generator, some = torch.Generator().manual_seed(0), torch.arange(IMAGES)
    keep = torch.rand(MASKS, judged.n_filters, generator=generator) > 0.3
    spread, found = getattr(judged, "spread", None), []
    for _ in range(3):
        driver = time.process_time()
        if spread is None:
            judged.outcomes(keep, some)
            busiest = 0.0
        else:
            parts = [(judged.repair, part, some) for part in keep.split(-(-MASKS // spread.count))]
            busiest = max(spread.in_order(_processor_seconds, parts))
        found.append(time.process_time() - driver + busiest)
    return round(statistics.median(found), 3)


def _processor_seconds(held: OneShotTask, item: Any) -> float:
    from keepdrop.experiments.engines.spread_task import _judge

    started = time.process_time()
    _judge(held, item)
    return time.process_time() - started


def _nothing(held: OneShotTask, item: Any) -> None:
    return None


def compare(kind: str, workers: int) -> dict[str, Any]:
    """Seconds of a whole comparison of a network trained before, processes and all."""
    program = str(Path(sys.executable).with_name("keepdrop"))
    engine = ["engine=ray", f"engine.workers={workers}"] if kind == "ray" else [f"workers={workers}"]
    with tempfile.TemporaryDirectory() as folder:
        base = [program, "train-cnn", "base.epochs=3", "quiet=true", "run_dir=base"]
        subprocess.run(base, cwd=folder, check=True, capture_output=True)
        line = [program, "compare", *COMPARE, *engine, "checkpoint=base/model.safetensors", "run_dir=run"]
        started = time.perf_counter()
        subprocess.run(line, cwd=folder, check=True, capture_output=True)
        return {"seconds": round(time.perf_counter() - started, 2)}


def middle(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> float:
    """The median of what was measured; nan where it was not."""
    values = [run[key] for run in runs.get(name, []) if key in run]
    return statistics.median(values) if values else float("nan")


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and how much faster two workers are."""
    for part in ("search", "compare"):
        for kind in KINDS:
            one, two = (middle(runs, f"{part} {kind} {workers}", "seconds") for workers in (1, 2))
            if part == "search":
                least = [middle(runs, f"search {kind} {workers}", "critical_seconds") for workers in (1, 2)]
                print(
                    f"{kind:10} by processor time {least[0]:.2f} and {least[1]:.2f} s: {least[0] / least[1]:.2f} times"
                )
            if one == one:  # not nan
                print(f"{part:8} {kind:10} 1 worker {one:.1f} s, 2 workers {two:.1f} s: {one / two:.2f} times as fast")
    name = "search ray 2"
    print(
        f"ray: {middle(runs, name, 'item_ms'):.2f} ms and {middle(runs, name, 'item_bytes'):.0f} bytes an item, "
        f"{middle(runs, name, 'shared_bytes') / 1e6:.1f} MB once a node"
    )


def simulated(runs: dict[str, list[dict[str, Any]]], masks: int, workers: int, rounds: int = 200) -> float:
    """Seconds of an update, by the model that the head of this file describes."""
    times = [each for run in runs["search processes 1"] for each in run.get("mask_seconds", [])]
    overhead = middle(runs, "search ray 2", "item_ms") / 1000
    draw_one, size = random.Random(0), -(-masks // workers)
    parts = [min(size, masks - first) for first in range(0, masks, size)]
    found = [max(sum(draw_one.choices(times, k=part)) for part in parts) for _ in range(rounds)]
    return statistics.mean(found) + overhead * len(parts)


def draw(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Simulated speed-up against workers, and the two points that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4))
    for masks in (10, 64, 256):
        one = simulated(runs, masks, 1)
        axes.plot(WORKERS, [one / simulated(runs, masks, each) for each in WORKERS], label=f"simulated, {masks} masks")
    for kind, marker in (("processes", "s"), ("ray", "o")):
        one, two = (middle(runs, f"search {kind} {workers}", "critical_seconds") for workers in (1, 2))
        axes.plot([2], [one / two], marker, label=f"measured (processor time), {kind}, {MASKS} masks")
    axes.plot(WORKERS, WORKERS, ":", color="grey", label="workers")
    axes.set(xlabel="workers", ylabel="times as fast as one", xscale="log", yscale="log")
    axes.set_xticks(WORKERS, labels=[str(each) for each in WORKERS])
    axes.set_yticks(WORKERS, labels=[str(each) for each in WORKERS])
    axes.set_title("An update of a network search: simulation, not measured")
    axes.legend(loc="lower right", fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
