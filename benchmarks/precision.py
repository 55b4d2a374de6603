"""How often bfloat16 answers otherwise than float32, on real images: every first convolution of a ResNet-20.

    OMP_NUM_THREADS=1 python benchmarks/precision.py --data cifar10.npz --checkpoint resnet20.th

Masks keep each filter with a probability of one half and are evaluated with compensation on the whole reward split,
5,000 of the test images, in both precisions (`evaluation.dtype`). Beside it the processor time of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import make_task
from keepdrop.envs.evaluation.evaluation_settings import EvaluationSettings
from keepdrop.envs.task import LayerTask

RESULTS = Path(__file__).parent / "results" / "precision.json"


def main() -> None:
    """One row per group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = make_task(options.data, options.checkpoint)
    task.settings = replace(EvaluationSettings(), dtype="bfloat16")
    rows = []
    for name in [group.name for group in task.plan.groups if group.name.endswith(".conv1")]:
        rows.append({"group": name, **measure(task.layer(name), options.masks)})
        print(rows[-1], flush=True)
    found = {
        "masks": options.masks,
        "images": len(task.reward_images[0]),
        "answers": statistics.mean(row["answers"] for row in rows),
        "accuracy": max(row["accuracy"] for row in rows),
        "times_as_fast": statistics.geometric_mean(row["times_as_fast"] for row in rows),
        "groups": rows,
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print({key: value for key, value in found.items() if key != "groups"})


def measure(layer: LayerTask, n_masks: int) -> dict[str, Any]:
    """Fraction of answers that differ, the largest difference of an accuracy, and the time of the two."""
    masks = torch.rand(n_masks, layer.n_filters, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    mixes, points, seconds = layer.mixes(masks), [], []
    for evaluator in (layer.evaluator, layer.search_evaluator):
        started = time.thread_time()
        points.append(evaluator.correct_per_image({layer.group.name: masks}, mixes=mixes))
        seconds.append(time.thread_time() - started)
    means = [each.double().mean(1) for each in points]
    return {
        "answers": float((points[0] != points[1]).double().mean()),
        "accuracy": float((means[0] - means[1]).abs().max()),
        "times_as_fast": round(seconds[0] / seconds[1], 3),
    }


if __name__ == "__main__":
    main()
