"""A pretrained agent on networks it has not seen: families left out in turn; writes the tables of docs/reuse.md.

    keepdrop pretrain zoo=zoo.yaml run_dir=run ...                       # first: what was tried in every network
    python benchmarks/reuse.py --zoo zoo.yaml --run run --modules models # resumes where it stopped; --fresh starts anew

For each part of the zoo that is left out (a family, or with `--by name` one network) a policy is trained on what the
first round of the pretraining tried in all others. It then decides, frozen, on what was left out, at every target,
beside `reconstruction` (what it corrects) and four criteria in equal shares (l1, l2, fpgm, taylor). Everything is cut,
repaired in closed form and judged on images of the report split; nothing is trained. `asked` is what `keepdrop prune
agents=...` does: of the policy's choice, half of it, its order alone, `reconstruction` and equal shares of l2 the best
on the reward split. Rows are
written one by one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from common import machine, opened
from keepdrop.agent.criteria import scores
from keepdrop.agent.learning.many_networks import PolicyGradientSettings, improve
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.envs.described_task import DescribedTask
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.group_descriptions import DESCRIPTION_NAMES, GENERAL
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.cutoff import spread_evenly
from keepdrop.envs.surgery.targets import Target
from keepdrop.experiments.config.schema import SamplingConfig, SplitConfig
from keepdrop.experiments.pretraining.worlds import Subject, experience, read_record, target_name
from keepdrop.experiments.pretraining.zoo import ZooNetwork, read_zoo
from keepdrop.experiments.pruning.network_search import projection
from keepdrop.experiments.pruning.pretrained import corrected
from torch import Tensor

STORE = Path(__file__).resolve().parent / "results" / "reuse.json"
CRITERIA = ("l1", "l2", "fpgm", "taylor")
TARGETS = (0.3, 0.5, 0.7)


def main() -> None:
    """Judge what is missing, then print the tables."""
    arguments = parsed()
    store = Path(arguments.store)
    if arguments.fresh:
        store.unlink(missing_ok=True)
    found = opened(store, {"by": arguments.by, "images": arguments.images}, "rows")
    zoo = read_zoo(arguments.zoo, arguments.modules)
    for network in () if arguments.show else zoo:
        if not fnmatchcase(network.name, arguments.only) or all(
            f"{network.name} {removed}" in found["rows"] for removed in TARGETS
        ):
            continue
        policy = trained_without(zoo, getattr(network, arguments.by), arguments)
        for removed, row in judged(network, policy, arguments):
            found["rows"][f"{network.name} {removed}"] = row
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps({**found, **machine("cpu")}, indent=1) + "\n")
            print(network.name, removed, row, flush=True)
    print(table(found["rows"]))


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True, help="the zoo file of the pretraining")
    parser.add_argument("--run", required=True, help="the folder of the pretraining")
    parser.add_argument("--modules", nargs="*", default=[], help="whose code the zoo file may call")
    parser.add_argument("--by", choices=("family", "name"), default="family", help="what is left out together")
    parser.add_argument("--images", type=int, default=1000, help="of the report split, and of the reward split")
    parser.add_argument("--only", default="*", help="shell-style pattern of names to judge")
    parser.add_argument("--step", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=4)
    parser.add_argument("--shrink", type=float, default=0.25)
    parser.add_argument("--store", default=str(STORE))
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--show", action="store_true", help="judge nothing")
    return parser.parse_args()


def trained_without(zoo: Sequence[ZooNetwork], left_out: str, arguments: argparse.Namespace) -> GroupPolicy:
    """A policy that learned from the first round in all networks but those."""
    worlds = [
        experience(read_record(file))
        for network in zoo
        if getattr(network, arguments.by) != left_out
        for file in sorted((Path(arguments.run) / "worlds" / network.name).glob("*.round-0.json"))
    ]
    torch.manual_seed(0)
    policy = GroupPolicy(DESCRIPTION_NAMES, STATISTIC_NAMES, arguments.hidden, read=GENERAL)
    policy.normalise([world.rows for world in worlds])
    chosen = PolicyGradientSettings(step=arguments.step, shrink=arguments.shrink)
    improve(policy, worlds, chosen)
    return policy


def judged(network: ZooNetwork, policy: GroupPolicy, arguments: argparse.Namespace) -> Any:
    """A row for each target that the network can meet."""
    folder = Path(arguments.run) / "worlds" / network.name
    subject = Subject(network, SplitConfig("test", 2000), 3000, SamplingConfig(), folder)
    one_shot = OneShotTask(subject.task, ReconstructionSettings())
    report = subject.task.splits.report.select(torch.arange(arguments.images))
    for removed in TARGETS:
        target = Target(removed, "network")
        if not (folder / f"{target_name(target)}.safetensors").is_file():
            continue
        started = time.perf_counter()
        masks = choices(subject.world(target), policy)
        asked = ("policy", "half", "order", "reconstruction", "l2")
        reward_images = torch.arange(min(arguments.images, one_shot.n_images))
        outcomes = one_shot.outcomes(torch.stack([masks[name] for name in asked]), reward_images)
        reward = {name: outcome.pruned_accuracy for name, outcome in zip(asked, outcomes, strict=True)}
        accuracy = {name: accuracy_on(one_shot.cut(mask), report) for name, mask in masks.items()}
        best = max(asked, key=lambda name: reward[name])
        yield (
            removed,
            {
                "family": network.family,
                "dense": accuracy_on(subject.task.model, report),
                **accuracy,
                "asked": accuracy[best],
                "decided_by": best,
                "reward": reward,
                "kept": [round(float(part.double().mean()), 3) for part in one_shot.named(masks["policy"]).values()],
                "seconds": round(time.perf_counter() - started, 1),
            },
        )


def choices(world: DescribedTask, policy: GroupPolicy) -> dict[str, Tensor]:
    """The masks (N,) of everybody, at the target."""
    observation = {key: torch.from_numpy(value) for key, value in world.observation.as_dict().items()}
    project = projection(world, world.target)
    with torch.no_grad():
        ranked = zip(("policy", "half", "order"), corrected(policy, observation).values(), strict=True)
        found = {name: project(scores_N) for name, scores_N in ranked}
        plan = policy.plan(len(observation["descriptions"]))
        found["reconstruction"] = project(policy.scores(observation, plan))
    owner = observation["groups"].long()
    for criterion in CRITERIA:
        parts = [
            spread_evenly(
                scores(
                    {key: observation[key][owner == place] for key in ("weights", "statistics")},
                    STATISTIC_NAMES,
                    criterion,
                )
            )
            for place in range(len(world.groups))
        ]
        found[criterion] = project(torch.cat(parts))
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean accuracies by target, and how often and by how much the frozen agent is ahead."""
    lines = [
        "| removed | cells | dense | l2 | best criterion | reconstruction | policy alone | as asked | asked - best "
        "criterion (95 %) | ahead of it | asked - reconstruction (95 %) |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for removed in (*TARGETS, None):
        own = [row for name, row in rows.items() if removed is None or name.endswith(f" {removed}")]
        if not own:
            continue
        best = [max(row[name] for name in CRITERIA) for row in own]
        means = [statistics.mean(row[name] for row in own) for name in ("dense", "l2")]
        means += [statistics.mean(best)]
        means += [statistics.mean(row[name] for row in own) for name in ("reconstruction", "policy", "asked")]
        lead = [row["asked"] - other for row, other in zip(own, best, strict=True)]
        over = [row["asked"] - row["reconstruction"] for row in own]
        ahead = sum(each > 0 for each in lead)
        figures = " | ".join(f"{100 * each:.2f}" for each in means)
        name = "all" if removed is None else f"{100 * removed:.0f} %"
        lines.append(
            f"| {name} | {len(own)} | {figures} | {interval(lead)} | {ahead} of {len(own)} | {interval(over)} |"
        )
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Mean in points, with a bootstrap interval over cells."""
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(values, k=len(values))) for _ in range(2000))
    low, high = means[50], means[-51]
    return f"{100 * statistics.mean(values):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


if __name__ == "__main__":
    main()
