"""`metric=` and `loss=` from the command line: what cannot be judged is refused before anything is written."""

import re
from pathlib import Path

import numpy as np
import pytest

BAD = {
    "top1": (
        [],
        "A target is torch.int64 (8, 8), but top-1 accuracy needs one integer label per image; choose another",
    ),
    "shape": (["metric=mean_iou"], "The network returns (2, 10) for targets torch.int64 (2, 8, 8); expected integer"),
    "score": (["metric=custom", "metric._target_=torch.add"], "The metric add fails on outputs torch.float32 (2, 10)"),
    "augment": (
        ["metric=mean_iou", "augment=shift"],
        "Targets of shape (8, 8) are maps of the images, and augmentation",
    ),
    "path": (["metric=custom", "metric._target_=no.where"], "metric could not be built from no.where: ModuleNotFound"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_judged_is_refused(refused, tmp_path, name):
    overrides, sentence = BAD[name]
    rng = np.random.default_rng(0)
    images = {part: rng.random((size, 1, 8, 8), np.float32) for part, size in (("train", 30), ("test", 20))}
    maps = {f"y_{part}": (each[:, 0] > 0.5).astype(np.uint8) for part, each in images.items()}
    np.savez(tmp_path / "maps.npz", **{f"x_{part}": each for part, each in images.items()}, **maps)
    chosen = overrides if name == "augment" else ["augment=null", *overrides]
    line = refused("prune", "data=npz", "data.path=maps.npz", "split.reward_size=10", *chosen)
    assert line.startswith(sentence)


def test_people_read_the_name_of_the_metric(keepdrop, tiny, checkpoint):
    done = keepdrop("prune", *tiny, f"checkpoint={checkpoint}", "metric=topk", "metric.k=3", "run_dir=run")
    assert done.code == 0
    assert "TopK(k=3), pruned" in done.out and "Base TopK(k=3) on" in done.out
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", Path("run/report.html").read_text(), flags=re.DOTALL)
    assert "TopK(k=3) against MACs" in page and "TopK(k=3), fine-tuned" in page
    said = re.findall(r".{0,30}\baccurac.{0,30}", done.out + page, flags=re.IGNORECASE)
    assert said == []
