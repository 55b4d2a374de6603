"""Image folders: images a second that reach a training, against what Pillow's decoders alone deliver.

    python benchmarks/data.py [--folder DIR] [--images 20000] [--size 224] [--workers 0 1 2] [--cache-gib 4]

The folder of JPEGs is synthetic and made once (a temporary one without --folder). Both take turns, with the same number
of processes: an epoch in random order through `from_folder`, normalised float32 batches of 64, and `Image.open`,
`convert` and an array of the same files, handed to nobody. Medians of --rounds turns, the ratio of each turn by the
clock and by processor time of all processes, which other work on the machine disturbs less. The rows with a cache read
what an epoch before has decoded. Memory is what the processes hold beyond those before the first row. Saves each row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, opened
from keepdrop.envs.data.image_folder import from_folder
from keepdrop.envs.data.images import batches_of
from PIL import Image

RESULTS = Path(__file__).parents[1] / "benchmarks/results/data.json"
BATCH = 64
CLASSES = 10


def make_folder(folder: Path, n_images: int, size: int) -> None:
    """Soft colours with some grain, about as many bytes as photos of that size, unless they are there."""
    generator = np.random.default_rng(0)
    for number in range(n_images + CLASSES):
        part = "train" if number < n_images else "val"
        path = folder / part / f"class{number % CLASSES}" / f"{number:06}.jpg"
        soft = generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            grain = np.random.default_rng(number).normal(0, 8, (size, size, 1))
            pixels = np.asarray(Image.fromarray(soft).resize((size, size), Image.Resampling.BICUBIC)) + grain
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def decoded(paths: Sequence[str]) -> None:
    """What a decoder does, and nothing else."""
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB"))


def decoders(paths: Sequence[str], workers: int) -> None:
    """All files by as many processes, or by this one."""
    if workers == 0:
        return decoded(paths)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=decoded, args=(paths[first::workers],)) for first in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call by the clock and by the processors, of this process and of those that ended in it."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def spent() -> float:
        return sum(each.ru_utime + each.ru_stime for each in map(resource.getrusage, kinds))

    before, started = spent(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "processor": spent() - before}


def epoch(images: Any, seed: int) -> None:
    """Every image once, in random order, as training asks for them."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for batch, _ in batches_of(images, order.split(BATCH)):
        batch[0, 0, 0, 0].item()


def resident_mib() -> float:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def row(folder: Path, options: argparse.Namespace, workers: int, cached: bool) -> dict[str, Any]:
    """One number of workers, with or without a cache."""
    cache_gib = options.cache_gib if cached else 0
    before = resident_mib()
    images: Any = from_folder(folder, options.size, workers=workers, cache_gib=cache_gib).train
    if cached:
        epoch(images, -1)
    turns = []
    for number in range(options.rounds):
        ours = timed(lambda seed=number: epoch(images, seed))  # type: ignore[misc]
        theirs = timed(lambda: decoders(images.files.paths, workers))
        turns.append({"ours": ours, "decoders": theirs})
        print(workers, cached, turns[-1], flush=True)
    found: dict[str, Any] = {"turns": turns, "cached_images": int(images.cache.holds(torch.arange(len(images))).sum())}
    for name in ("ours", "decoders"):
        found[f"{name}_per_second"] = len(images) / statistics.median(turn[name]["seconds"] for turn in turns)
        found[f"{name}_per_processor_second"] = len(images) / statistics.median(
            turn[name]["processor"] for turn in turns
        )
    for unit in ("seconds", "processor"):
        found[f"ratio_{unit}"] = statistics.median(turn["decoders"][unit] / turn["ours"][unit] for turn in turns)
    found["cache_mib"] = images.cache.n_bytes / 2**20
    found["mib"] = resident_mib() - before
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache-gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_folder(folder, options.images, options.size)
        about = {name: getattr(options, name) for name in ("images", "size", "cache_gib", "rounds")}
        found = opened(options.json, about, "rows")
        found["jpeg_kib"] = sum(each.stat().st_size for each in folder.glob("train/*/*")) / options.images / 1024
        for cached in (False, True):
            for workers in options.workers:
                name = f"{workers} workers, {'cache' if cached else 'no cache'}"
                if name not in found["rows"]:
                    found["rows"][name] = {**row(folder, options, workers, cached), "machine": machine()}
                    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
