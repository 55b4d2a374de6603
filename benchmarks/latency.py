"""Latency as the target beside MACs as the target, at equal accuracy before training: the table of docs/latency.md.

    python benchmarks/latency.py --data cifar10.npz --checkpoints DIR --zoo DIR [--only resnet20] [--stages profile]
    python benchmarks/latency.py --show                                      # the tables of what was measured

Of every network the device is profiled first (onnxruntime, batch 1, `--threads`), then an agent decides on all groups
at `target.latency=0.6`, and another at a target of MACs, which is moved until both networks are within half a point of
each other on the report split, repaired and untrained, as is a target of time with whole blocks. All are timed in
onnxruntime beside the dense network: they take turns, and a ratio is the median of the ratios of single turns.
`mobilenetv2` is trained here first, for `--epochs`, as no trained one is at hand; the others were trained elsewhere.
Resumes where it stopped; profiles, weights and masks lie in `--work`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, opened, script
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.data.sources import npz
from keepdrop.envs.data.splits import split
from keepdrop.envs.described_task import DescribedTask, curves_of
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.networks.checkpoint import load_checkpoint, save_weights
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.latency_meter import LatencyFit
from keepdrop.envs.surgery.latency_profile import LatencyProfile, TimeTable, load_profile
from keepdrop.envs.surgery.limits import Limits
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import PruningTask
from keepdrop.experiments.deploy.clock import ProfileClock
from keepdrop.experiments.deploy.profiling import ProfileSettings, one_turn, profile_network
from keepdrop.experiments.deploy.runtimes import runner
from keepdrop.experiments.pruning.agent_places import PRETRAINED
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings, best_of, projection
from keepdrop.experiments.pruning.pretrained import load_pretrained, pretrained_choices
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from torch import Tensor, nn

STORE = Path(__file__).resolve().parent / "results" / "latency.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = torch.zeros(1, 3, 32, 32)
RUNTIME, BATCH = "onnxruntime", 1
LATENCY, EQUAL = 0.6, 0.005  # of the dense time that may be left; of accuracy that counts as equal
MOST_SEARCHES, SLOPE = 4, -0.6  # accuracy lost per fraction of the MACs, before two searches have shown it
TURNS = 60
STAGES = ("train", "profile", "search", "time", "errors")
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1))
"""Of the MobileNetV2-like network: expansion, channels, blocks, stride of the first."""


class InvertedResidual(nn.Module):
    """MobileNetV2's block: wider by a pointwise layer, depthwise, narrow again; a sum where nothing changes size."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        layers = [] if expansion == 1 else [*_normalised(n_in, wide, 1), nn.ReLU6()]
        layers += [*_normalised(wide, wide, 3, stride, wide), nn.ReLU6(), *_normalised(wide, n_out, 1)]
        self.conv = nn.Sequential(*layers)
        self.same = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H / stride, W / stride)."""
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetV2Like(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for images of 32 x 32: fewer strides, fewer blocks, a narrower head."""

    def __init__(self, classes: int = 10, head: int = 256) -> None:
        super().__init__()
        layers, n_in = [*_normalised(3, 16, 3), nn.ReLU6()], 16
        for expansion, n_out, blocks, stride in BLOCKS:
            for place in range(blocks):
                layers.append(InvertedResidual(n_in, n_out, stride if place == 0 else 1, expansion))
                n_in = n_out
        self.features = nn.Sequential(*layers, *_normalised(n_in, head, 1), nn.ReLU6())
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


def _normalised(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(n_out)]


def main() -> None:
    """Measure what is missing, then print the tables."""
    options = parsed()
    if options.show:
        print(tables(json.loads(options.json.read_text())))
        return
    about = {"latency": LATENCY, "runtime": RUNTIME, "batch_size": BATCH, "threads": options.threads}
    found = opened(options.json, about, "rows")
    for name in options.only:
        row = found["rows"].setdefault(name + f", {PRETRAINED}" * (options.agent == PRETRAINED), {})
        bench = Bench(name, options, row, lambda: _write(options, found))
        for stage in options.stages:
            getattr(bench, stage)()
    print(tables(found))


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoints", type=Path, help="folder of resnet20-a.th and resnet56-a.th")
    parser.add_argument("--zoo", type=Path, help="folder with models.py, for separable")
    parser.add_argument("--work", type=Path, default=Path("runs/latency"), help="profiles, weights and masks")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES[:-1]))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["latency", "macs"])
    parser.add_argument("--threads", type=int, default=2, help="of what is timed; searches have one")
    parser.add_argument("--timed", type=int, nargs="+", default=[1], help="threads to time with, beside --threads")
    parser.add_argument("--agent", choices=("trained", PRETRAINED), default="trained", help="or asked, not trained")
    parser.add_argument("--reward-size", type=int, default=5000, help="of the test images; the others judge")
    parser.add_argument("--judged", type=int, help="images that accuracies are of; all others if left out")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--images", type=int, default=300, help="reward images per mask")
    parser.add_argument("--repair-images", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=8, help="of mobilenetv2")
    parser.add_argument("--json", type=Path, default=STORE)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    return parser.parse_args()


def resnet(depth: int) -> Callable[[argparse.Namespace], nn.Module]:
    """A trained CIFAR ResNet."""

    def build(options: argparse.Namespace) -> nn.Module:
        model = cifar_resnet(depth)
        load_checkpoint(model, options.checkpoints / f"resnet{depth}-a.th")
        return model

    return build


def separable(options: argparse.Namespace) -> nn.Module:
    """Inverted, depthwise, without residuals and trained: expansion 4, GELU."""
    model: nn.Module = script("zoo_models", options.zoo / "models.py").load("separable-a")
    return model


def mobilenetv2(options: argparse.Namespace) -> nn.Module:
    """Inverted residuals, as trained by the stage `train`; untrained before it."""
    torch.manual_seed(0)
    model, weights = MobileNetV2Like(), options.work / "mobilenetv2.safetensors"
    if weights.is_file():
        load_checkpoint(model, weights)
    return model


NETWORKS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "resnet20": resnet(20),
    "resnet56": resnet(56),
    "separable": separable,
    "mobilenetv2": mobilenetv2,
}
NORMALISED = {"separable": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
KINDS = ("latency", "macs", "latency-blocks", "macs-8")
"""Who decides: `-blocks` may let whole blocks vanish, `-8` keeps multiples of eight channels."""


class Bench:
    """One network: what is done of it is in `row`, which `write` puts on disk.

    Args:
        name: of `NETWORKS`.
        options: command line.
        row: of the results.
        write: puts the results on disk.
    """

    def __init__(self, name: str, options: argparse.Namespace, row: dict[str, Any], write: Callable[[], None]) -> None:
        self.name, self.options, self.row, self.write = name, options, row, write
        options.work.mkdir(parents=True, exist_ok=True)
        self.model = NETWORKS[name](options).eval()
        self._task: PruningTask | None = None
        self._curves: Any = None

    def train(self) -> None:
        """Train the network that nobody has trained."""
        weights = self.options.work / f"{self.name}.safetensors"
        if self.name != "mobilenetv2" or weights.is_file():
            return
        torch.set_num_threads(1)
        settings = TrainSettings(epochs=self.options.epochs, batch_size=128, top_lr=0.1, warmup=0.2, bf16=False)
        data, snapshot = self._splits().fit, self.options.work / f"{self.name}.snapshot"
        shown = {"progress": lambda at: print("train", at, flush=True), "snapshot": snapshot}
        started = time.perf_counter()
        fit_network(self.model, data, settings, seed=0, augment=RandomCropFlip(), **shown)
        save_weights(self.model.eval(), weights)
        self.row["trained"] = {"epochs": self.options.epochs, "seconds": round(time.perf_counter() - started)}
        self.write()

    def profile(self) -> None:
        """Measure what widths cost here; resumes by itself."""
        torch.set_num_threads(self.options.threads)
        found = profile_network(self.model, IMAGES, ProfileSettings((BATCH,), (RUNTIME,)), path=self._profile)
        self.row["profile"] = summary(found, found.table(RUNTIME, BATCH))
        self.write()

    @property
    def _profile(self) -> Path:
        return self.options.work / f"{self.name}.profile.json"

    def _splits(self) -> Any:
        return split(
            npz(self.options.data, *NORMALISED.get(self.name, (MEAN, STD))),
            reward_from="test",
            reward_size=self.options.reward_size,
            seed=0,
        )

    def _tasks(self, kind: str) -> OneShotTask:
        if self._task is None:
            clock = ProfileClock(load_profile(self._profile), RUNTIME, BATCH)
            self._task = PruningTask(self.model, self._splits(), clock=clock)
            dense = accuracy_on(self.model, self._report(self._task))
            self.row |= {"accuracy": dense, "dense_macs": self._task.cost.macs, "groups": len(self._task.groups)}
        task = self._task
        if kind.count("-"):
            limits = Limits(whole_blocks=True) if kind.endswith("blocks") else Limits(round_to=int(kind.split("-")[1]))
            task = PruningTask(task.model, task.splits, base=task.base, clock=task.clock, limits=limits)
        return OneShotTask(task, ReconstructionSettings(images=self.options.repair_images))

    def _report(self, task: PruningTask) -> Any:
        images = task.splits.report
        return images if self.options.judged is None else images.select(torch.arange(self.options.judged))

    def search(self) -> None:
        """The network of every kind: that of a time first, the others at its accuracy."""
        torch.set_num_threads(1)
        for kind in self.options.kinds:
            known = self.row.setdefault(kind, {"searches": []})
            if kind == "latency" and not known["searches"]:
                self._searched(kind, Target(latency=LATENCY))
            while kind != "latency" and not self._is_matched(known["searches"]):
                of_time = kind.startswith("latency")
                gone = round(self._next_gone(known["searches"], of_time), 4)
                self._searched(kind, Target(latency=round(1 - gone, 4)) if of_time else Target(gone, "network"))

    def _is_matched(self, searches: Sequence[dict[str, Any]]) -> bool:
        """Whether one is of the same accuracy, or enough were tried."""
        near = [abs(each["accuracy"] - wanted(self.row)["accuracy"]) <= EQUAL for each in searches]
        return any(near) or len(searches) >= MOST_SEARCHES

    def _next_gone(self, searches: Sequence[dict[str, Any]], of_time: bool) -> float:
        """The share to try, of MACs or of the time: first that of the network of the time, then along two tries."""
        aim = wanted(self.row)
        if not searches:
            return 1 - LATENCY if of_time else float(aim["removed"])
        near = sorted(searches, key=lambda each: abs(each["accuracy"] - aim["accuracy"]))
        gone = [1 - float(each["target"].split("=")[1]) if of_time else each["removed"] for each in near]
        slope = SLOPE
        if len(near) > 1 and gone[0] != gone[1]:
            slope = min((near[0]["accuracy"] - near[1]["accuracy"]) / (gone[0] - gone[1]), SLOPE / 4)
        step = (aim["accuracy"] - near[0]["accuracy"]) / slope
        return min(0.95, max(0.02, gone[0] + max(-0.15, min(0.15, step))))

    def _searched(self, kind: str, target: Target) -> None:
        started, one_shot = time.perf_counter(), self._tasks(kind)
        masks, decided_by = (self._asked if self.options.agent == PRETRAINED else self._trained)(one_shot, target)
        network = one_shot.cut(one_shot.joined(masks))
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        found = {
            "target": str(target),
            "removed": round(1 - count_cost(network, IMAGES).macs / one_shot.task.cost.macs, 4),
            "accuracy": accuracy_on(network, self._report(one_shot.task)),
            "decided_by": decided_by,
            "predicted": round(self._predicted(one_shot, kept), 4),
            "seconds": round(time.perf_counter() - started),
            "kept": kept,
        }
        self.row[kind]["searches"].append(found)
        print(self.name, kind, {key: value for key, value in found.items() if key != "kept"}, flush=True)
        self.write()

    def _trained(self, one_shot: OneShotTask, target: Target) -> tuple[dict[str, Tensor], str]:
        chosen = NetworkAgentSettings(updates=self.options.updates)
        agent = NetworkAgent(NetworkSearchSettings(images=self.options.images, agent=chosen), one_shot)
        return agent.choose(target, 0), agent.facts["decided_by"]

    def _asked(self, one_shot: OneShotTask, target: Target) -> tuple[dict[str, Tensor], str]:
        """What `agents=pretrained` does; what is seen of the layers is shared between targets."""
        self._curves = self._curves or curves_of(one_shot.task, one_shot.groups)
        seen = DescribedTask(one_shot.task, target, one_shot.repair, one_shot.layers, self._curves)
        project, agent = projection(one_shot, target), load_pretrained(PRETRAINED)
        choices = {name: project(scores) for name, scores in pretrained_choices(agent, seen).items()}
        best, _ = best_of(one_shot, list(choices.values()))
        return one_shot.named(list(choices.values())[best]), list(choices)[best]

    def _predicted(self, one_shot: OneShotTask, kept: dict[str, int]) -> float:
        assert one_shot.task.clock is not None
        meter = one_shot.task.clock(one_shot.task.model, one_shot.groups)
        return float(meter.seconds([kept[group.name] for group in one_shot.groups]) / meter.whole)

    def time(self) -> None:
        """Dense and pruned networks in turns, with the threads that were profiled and those of `--timed`."""
        kinds = {kind: each for kind in KINDS if (each := chosen(self.row, kind)) is not None}
        networks = {"dense": self.model} | {kind: self._cut(kind, each["kept"]) for kind, each in kinds.items()}
        for threads in dict.fromkeys((self.options.threads, *self.options.timed)):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                runners = {name: runner(network.eval(), RUNTIME, IMAGES) for name, network in networks.items()}
                seconds = in_turns(runners, TURNS)
            self.row[f"times, {threads} threads"] = {name: compared(seconds, name) for name in seconds}
        self.write()

    def _cut(self, kind: str, kept: dict[str, int]) -> nn.Module:
        """A network of these widths: which filters stay makes no difference to its time."""
        groups = self._tasks(kind).groups
        return prune(self.model, {group: torch.arange(group.n_filters) < kept[group.name] for group in groups})

    def errors(self) -> None:
        """How far predictions are off, eager and in onnxruntime, at batch 1 and 64, with one and two threads."""
        for threads in (1, 2):
            torch.set_num_threads(threads)
            path = self.options.work / f"{self.name}.errors-{threads}.json"
            for batch in (1, 64):
                found = profile_network(self.model, IMAGES, ProfileSettings((batch,), ("eager", RUNTIME)), path=path)
                for table in found.tables:
                    key = f"{table.runtime}, batch {table.batch_size}, {threads} threads"
                    self.row.setdefault("errors", {})[key] = summary(found, table)
                self.write()


def summary(profile: LatencyProfile, table: TimeTable) -> dict[str, Any]:
    """The dense time, and how far predictions are off on copies that were not fitted to."""
    errors = sorted(map(abs, LatencyFit(profile, table.samples).errors(table.checks)))
    return {
        "dense_ms": round(1e3 * table.dense_seconds, 4),
        "copies": len(table.samples),
        "error": round(statistics.median(errors), 4),
        "largest": round(errors[-1], 4),
    }


def in_turns(runners: dict[str, Callable[[Tensor], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of a pass by network and turn, each turn in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(turns):
        names = list(runners)[:: 1 if turn % 2 else -1]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(one_turn(runners[name], IMAGES, IMAGES.device))
    return seconds


def wanted(row: dict[str, Any]) -> dict[str, Any]:
    """The search that the others are compared with."""
    return dict(row["latency"]["searches"][0])


def chosen(row: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The search that counts: of those of MACs the one nearest in accuracy."""
    searches = row.get(kind, {}).get("searches", [])
    return min(searches, key=lambda each: abs(each["accuracy"] - wanted(row)["accuracy"]), default=None)


def compared(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Median time, and how many times as fast as each other network, with quartiles over turns."""
    faster = {}
    for other in (each for each in seconds if each != name):
        ratios = [theirs / ours for theirs, ours in zip(seconds[other], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        faster[other] = [round(each, 3) for each in (middle, low, high)]
    return {"ms": round(1e3 * statistics.median(seconds[name]), 4), "faster_than": faster}


def tables(found: dict[str, Any]) -> str:
    """What docs/latency.md shows."""
    threads = found["threads"]
    lines = [
        "| network | decided at | MACs removed | accuracy | time | as fast as dense x | as the MACs' x |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["rows"].items():
        times = row.get(f"times, {threads} threads")
        if times is None:
            continue
        for kind, each in times.items():
            best = chosen(row, kind)
            accuracy, removed = (best["accuracy"], best["removed"]) if best else (row["accuracy"], 0.0)
            what = best["target"] if best else "dense"
            ratios = [each["faster_than"].get(other) for other in ("dense", "macs")]
            shown = [f"{one[0]:.2f} ({one[1]:.2f} to {one[2]:.2f})" if one else "" for one in ratios]
            lines.append(
                f"| {name} | {what}{kind.partition('-')[2] and ', ' + kind.partition('-')[2]} | {100 * removed:.1f} % "
                f"| {100 * accuracy:.2f} % | {each['ms']:.3f} ms | {' | '.join(shown)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
