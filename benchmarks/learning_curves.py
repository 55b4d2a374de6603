"""How fast agents learn: reward of the greedy decision against mask-images, for one layer and several agents.

    python benchmarks/learning_curves.py --data cifar10.npz --checkpoint resnet20.th [--layer layer3.0.conv1]

Paper's policy against the set policy, Bernoulli against the budget latent, with and without a baseline; the best of
equally many random masks stands beside them. The greedy decision is scored on the whole reward split, which costs
nothing of the budget. Writes benchmarks/results/learning_curves.json after every curve, continues from what it finds
there, and draws docs/assets/learning_curves.svg (matplotlib, extra `plots`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import make_task, opened
from keepdrop.agent.learning.trainer import AgentSettings, Trainer
from keepdrop.agent.policies.layer_matrix import LayerMatrixPolicy
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.envs.filter_pruning import FilterPruningVectorEnv
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.task import LayerTask
from keepdrop.rewards.try_and_learn import TryAndLearn

ROOT = Path(__file__).parents[1]
RESULTS, PLOT = ROOT / "benchmarks/results/learning_curves.json", ROOT / "docs/assets/learning_curves.svg"
MASKS, IMAGES = 16, 250
AGENTS: dict[str, dict[str, Any]] = {
    "set, budget latent": {},
    "set, Bernoulli": {"exploration": "bernoulli"},
    "set, no warm start": {"warm_start": None},
    "set, no baseline": {"baseline": "none"},
    "paper's policy (layer matrix)": {"policy": "layer_matrix", "exploration": "bernoulli"},
}


def make_policy(layer: LayerTask, options: dict[str, Any], seed: int) -> Any:
    """A fresh policy."""
    exploration = options.get("exploration", "budget")
    if options.get("policy") == "layer_matrix":
        n_filters, n_weights = layer.observation.weights.shape
        return LayerMatrixPolicy(n_filters, n_weights, exploration=exploration, seed=seed)
    warm = options.get("warm_start", "taylor")
    names = len(STATISTIC_NAMES)
    return SetPolicy(names, exploration=exploration, warm_start=warm, statistic_names=STATISTIC_NAMES, seed=seed)


def learn(layer: LayerTask, options: dict[str, Any], updates: int, seed: int, bound: float) -> list[float]:
    """Rewards of the greedy decision on the whole reward split, before the first and after every second update."""
    reward = TryAndLearn(bound)
    venv = FilterPruningVectorEnv(layer, reward, MASKS, IMAGES)
    venv.reset(seed=seed)
    settings = AgentSettings(updates=updates, patience=None, baseline=options.get("baseline", "leave_one_out"))
    policy = make_policy(layer, options, seed)
    trainer = Trainer(venv, policy, settings, torch.Generator().manual_seed(seed))
    seen = {key: torch.from_numpy(value) for key, value in layer.observation.as_dict().items()}

    def greedy() -> float:
        with torch.no_grad():
            keep = policy(seen).greedy()
        return reward(layer.outcomes(keep[None])[0]).value

    curve = [greedy()]
    for _ in range(updates // 2):
        trainer.step()
        trainer.step()
        curve.append(greedy())
    return curve


def best_of_random(layer: LayerTask, updates: int, seed: int, bound: float) -> list[float]:
    """The same budget spent on random masks of random widths: the best one found, scored on the whole reward split."""
    reward, generator = TryAndLearn(bound), torch.Generator().manual_seed(seed)
    best, best_reward, curve = None, -float("inf"), []
    for update in range(updates):
        keep_MN = torch.rand(MASKS, layer.n_filters, generator=generator) < torch.rand(MASKS, 1, generator=generator)
        keep_MN[:, 0] |= ~keep_MN.any(1)
        images = torch.randperm(layer.n_images, generator=generator)[:IMAGES]
        for keep, outcome in zip(keep_MN, layer.outcomes(keep_MN, images), strict=True):
            if (value := reward(outcome).value) > best_reward:
                best, best_reward = keep, value
        if update % 2 == 1 and best is not None:
            curve.append(reward(layer.outcomes(best[None])[0]).value)
    return [0.0, *curve]


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean over seeds, one line per agent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for name, curves in found["curves"].items():
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(found["mask_images"], mean, label=name)
    axes.set_xlabel("mask-images (masks x reward images)")
    axes.set_ylabel("reward of the greedy decision")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--layer", default="layer3.0.conv1")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drop-bound", type=float, default=0.02)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    steps = [2 * MASKS * IMAGES * i for i in range(options.updates // 2 + 1)]
    about = {"layer": options.layer, "drop_bound": options.drop_bound, "mask_images": steps}
    found = opened(options.json, about, "curves")
    layer = make_task(options.data, options.checkpoint).layer(options.layer)
    for name, agent in {**AGENTS, "best of random masks": None}.items():
        curves = found["curves"].setdefault(name, [])
        for seed in range(len(curves), options.seeds):
            if agent is None:
                curves.append(best_of_random(layer, options.updates, seed, options.drop_bound))
            else:
                curves.append(learn(layer, agent, options.updates, seed, options.drop_bound))
            options.json.write_text(json.dumps(found) + "\n")
        ends = [curve[-1] for curve in curves]
        print(f"{name}: {statistics.mean(ends):.3f} +- {statistics.stdev(ends):.3f}", flush=True)
    plot(found, options.plot)


if __name__ == "__main__":
    main()
