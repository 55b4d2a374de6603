"""Which recipe trains a pruned network best: distillation, weight averaging (EMA) and the rate, on the reward split.

    python benchmarks/recipe.py --data cifar10.npz --checkpoint resnet20.th [--steps 400] [--distill 0 0.5 0.9]

A ResNet whose first convolutions lost a share of the network's MACs, chosen by the `reconstruction` criterion and
repaired, is trained for a few hundred minibatches under every setting. The averages of several decays follow one and
the same training, so they cost nothing; each is also judged with its batch norm measured anew on 2,000 fit images.
Writes after every figure and continues from what it finds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from pathlib import Path

from common import machine, make_task, opened
from foresight import judged
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import PruningTask
from keepdrop.experiments.compare.methods import ReconstructionMethod
from keepdrop.experiments.runs.seeds import derive_seed
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.averaging import Average
from keepdrop.experiments.training.loop import TrainSettings, fit_network, recalibrate_bn
from keepdrop.experiments.training.rate import usable_rate
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

RESULTS = Path(__file__).parents[1] / "benchmarks/results/recipe.json"
DECAYS = (0.99, 0.999)


def trained(cut: nn.Module, task: PruningTask, settings: TrainSettings, seed: int, device: str) -> dict[str, nn.Module]:
    """The last weights, and their averages by decay."""
    model = copy.deepcopy(cut)
    averages = {decay: Average(model, decay) for decay in DECAYS}
    steps = itertools.count()

    def follow(*_: object) -> None:
        step = next(steps)
        for average in averages.values():
            average.update(step)

    hook = register_optimizer_step_post_hook(follow)
    try:
        options = {"augment": RandomCropFlip(), "device": device, "teacher": task.model}
        fit_network(model, task.splits.fit, settings, seed=derive_seed(seed, "finetune"), **options)
    finally:
        hook.remove()
    found = {"last": model}
    for decay, average in averages.items():
        found[f"ema {decay:g}"] = copy.deepcopy(model)
        found[f"ema {decay:g}"].load_state_dict(average.tensors)
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--removed", type=float, default=0.5)
    parser.add_argument("--steps", type=int, nargs="+", default=[400], help="minibatches of 128")
    parser.add_argument("--distill", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--temperature", type=float, nargs="+", default=[4.0])
    parser.add_argument("--top-lr", type=float, nargs="+", default=[0.05], help="lowered to what the steps can use")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fp32", action="store_true", help="bfloat16 otherwise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = make_task(options.data, options.checkpoint, ["layer*.conv1"], 20, options.device)
    one_shot = OneShotTask(task, ReconstructionSettings(images=1000))
    found = opened(options.json, {"network": "resnet20", "removed": options.removed, "fp32": options.fp32}, "rows")
    found.setdefault("machine", machine(options.device))
    masks = ReconstructionMethod().choose(task, Target(options.removed, "network"), 0)
    cut = one_shot.cut(one_shot.joined(masks))
    found.setdefault("repaired", judged(cut, task))
    per_epoch = -(-len(task.splits.fit) // 128)
    grid = itertools.product(options.seeds, options.steps, options.distill, options.temperature, options.top_lr)
    for seed, steps, distill, temperature, top_lr in grid:
        name = f"{steps} steps, distill {distill:g}, temperature {temperature:g}, top_lr {top_lr:g}, seed {seed}"
        if name in found["rows"]:
            continue
        shares = {"distill_weight": distill, "temperature": temperature, "top_lr": top_lr}
        settings = TrainSettings(epochs=steps / per_epoch, batch_size=128, bf16=not options.fp32, **shares)
        settings = TrainSettings(**{**vars(settings), "lr": usable_rate(task.splits.fit, settings)})
        started = time.process_time()
        row = {"lr": settings.lr}
        for kind, model in trained(cut, task, settings, seed, options.device).items():
            row[kind] = judged(model, task)
            if kind != "last":
                recalibrate_bn(model, task.splits.fit, 2000, derive_seed(seed, "bn"))
                row[f"{kind}, batch norm anew"] = judged(model, task)
        found["rows"][name] = {**row, "seconds": time.process_time() - started}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {kind: each["accuracy"] for kind, each in row.items() if kind != "lr"}, flush=True)


if __name__ == "__main__":
    main()
