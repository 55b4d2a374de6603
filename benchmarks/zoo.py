"""Trained networks by others, cut to half their MACs; writes the table of trained networks in docs/models.md.

    python benchmarks/zoo.py --zoo ../shared/zoo --data cifar10.npz      # resumes where it stopped; --fresh starts anew
    python benchmarks/zoo.py --zoo ... --data ... --only 'resnet20*'      # some of them; --show prints the table alone

The folder holds `zoo.json` (names, normalisation, source and licence of the weights), `models.py` with `load(name)`,
and the weights; the data are CIFAR-10 arrays (x_train, y_train, x_test, y_test). Nothing is searched: the
`reconstruction` criterion chooses which half of the MACs goes (uniform L2 where it cannot), the cut network is repaired
in closed form and fine-tuned for a fixed number of epochs. Reward images (2,000 test images) guard the fine-tuning;
accuracies are those of the other test images. Each row is written as soon as it is done. On one machine everything but
the seconds is deterministic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from common import machine, opened, script, section
from keepdrop.envs.data.sources import npz
from keepdrop.envs.data.splits import Splits, split
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import PruningTask
from keepdrop.errors import UserError
from keepdrop.experiments.compare.methods import CriterionMethod, Masks, Observations, ReconstructionMethod
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.guarded import fine_tune
from keepdrop.experiments.training.train_settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
PAGE, STORE = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "zoo.json"
START, END = "<!-- trained networks -->", "<!-- end of trained networks -->"
REMOVED, N_REWARD = 0.5, 2000


def main() -> None:
    """Measure what is missing, one row after the other, then write the table."""
    arguments = parsed()
    store, budget = Path(arguments.store), {"epochs": arguments.epochs, "fit_images": arguments.fit_images}
    if arguments.fresh:
        store.unlink(missing_ok=True)
    found = opened(store, {"removed": REMOVED, **budget}, "networks")
    known = json.loads((Path(arguments.zoo) / "zoo.json").read_text())
    for entry in () if arguments.show else known:
        name = entry["name"]
        if name in found["networks"] or not fnmatchcase(name, arguments.only):
            continue
        found["networks"][name] = row = measured(entry, arguments)
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(found, indent=1) + "\n")
        print(name, row, flush=True)
    text = table(found)
    print(text)
    if not arguments.dry:
        PAGE.write_text(section(PAGE.read_text(), START, END, text))


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True, help="folder with zoo.json, models.py and the weights")
    parser.add_argument("--data", required=True, help="CIFAR-10 as an .npz file")
    parser.add_argument("--only", default="*", help="shell-style pattern of names")
    parser.add_argument("--epochs", type=float, default=1.0, help="of fine-tuning")
    parser.add_argument("--fit-images", type=int, default=10000, help="that are fine-tuned on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", default=str(STORE), help="where rows are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--dry", action="store_true", help="leave docs/models.md as it is")
    return parser.parse_args()


def measured(entry: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row; accuracies are fractions on the report split."""
    started = time.perf_counter()
    model = script("zoo_models", Path(arguments.zoo) / "models.py").load(entry["name"]).to(arguments.device)
    splits = splits_of(entry, arguments.data, arguments.fit_images)
    images = splits.reward.batch(torch.arange(3))[0].to(arguments.device)
    everything = find_groups(model, images, verify=False)
    about = {"family": entry["family"], "source": entry["repository"], "licence": entry["licence"]}
    about |= {"found": len(everything.groups), "macs": count_cost(model, images[:1]).macs}
    try:
        task = PruningTask(model, splits, seed=0, device=arguments.device)
        row = pruned(task, arguments.epochs)
    except UserError as error:
        return {**about, "failed": str(error)}
    seconds = round(time.perf_counter() - started, 1)
    return {**about, "prunable": len(task.plan.groups), **row, "seconds": seconds, **machine(arguments.device)}


def pruned(task: PruningTask, epochs: float) -> dict[str, Any]:
    """Half of the MACs removed, repaired, fine-tuned."""
    chosen, masks = masks_of(task)
    one_shot = OneShotTask(task, ReconstructionSettings())
    keep = one_shot.joined(masks)
    bare, cut = OneShotTask(task, None).cut(keep), one_shot.cut(keep)
    train = TrainSettings(epochs=epochs, batch_size=128, distill_weight=0.5)
    tuned, judged = fine_tune(cut, task.splits, train, seed=0, augment=RandomCropFlip(), teacher=task.model)
    example = task.example
    accuracies = {"dense": task.model, "cut": bare, "repaired": cut, "finetuned": tuned}
    return {
        "chosen_by": chosen,
        "macs_left": count_cost(cut, example).macs / task.base.cost.macs,
        "params_left": count_cost(cut, example).params / task.base.cost.params,
        **{name: accuracy_on(model, task.splits.report) for name, model in accuracies.items()},
        "n_report": len(task.splits.report),
        "fine_tuning": judged.facts(),
    }


def masks_of(task: PruningTask) -> tuple[str, Masks]:
    """What stays of each group, and which method chose it: `reconstruction`, or uniform L2 where that cannot."""
    target = Target(REMOVED, "network")
    try:
        return "reconstruction", ReconstructionMethod().choose(task, target, 0)
    except UserError:
        return "l2, uniform", CriterionMethod("l2", "uniform", Observations()).choose(task, target, 0)


def splits_of(entry: Mapping[str, Any], data: str, fit_images: int) -> Splits:
    """Reward and report from the test images, the first `fit_images` of the training images for fine-tuning."""
    splits = split(npz(data, entry["mean"], entry["std"]), reward_from="test", reward_size=N_REWARD, seed=0)
    return dataclasses.replace(splits, fit=splits.fit.select(torch.arange(min(fit_images, len(splits.fit)))))


def table(found: Mapping[str, Any]) -> str:
    """The section of the page."""
    rows = found["networks"]
    lines = [
        START,
        "## Trained networks",
        "",
        f"CIFAR-10 networks that others trained, with {100 * found['removed']:g} % of their MACs removed; made by "
        "`python benchmarks/zoo.py`,",
        "whose head says how. No agent is trained: `reconstruction` chooses the filters (L2 in equal shares where it",
        "cannot). *cut*: just cut; *repaired*: after the closed-form repair; *fine-tuned*: after "
        f"{found['epochs']:g} more epoch{'s' * (found['epochs'] != 1)} on {found['fit_images']:,}",
        "of 50,000 training images (a budget for an hour of one core), or as repaired where that did not help on the",
        "reward images. Accuracies in % on test images nothing was chosen on; standard errors are about 0.3 points.",
        "",
        "| network | family | found | prunable | MACs | MACs left | parameters left | dense | cut | repaired | "
        "fine-tuned | chosen by |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        *(line(name, row) for name, row in sorted(rows.items())),
        END,
    ]
    return "\n".join(lines) + "\n"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row of the table."""
    head = f"| `{name}` | {row['family']} | {row['found']} "
    if "failed" in row:
        return f"{head}| | {row['macs'] / 1e6:.1f} M | | | | | | | failed: {row['failed'].replace('|', '/')} |"
    figures = [f"{100 * row[key]:.1f} %" for key in ("macs_left", "params_left")]
    figures += [f"{100 * row[key]:.2f}" for key in ("dense", "cut", "repaired", "finetuned")]
    return f"{head}| {row['prunable']} | {row['macs'] / 1e6:.1f} M | {' | '.join(figures)} | {row['chosen_by']} |"


if __name__ == "__main__":
    main()
