"""Kinds of networks (signals, pairs, detection, CRNN, Hugging Face ...) pruned; writes a table of docs/models.md.

    python benchmarks/kinds.py                          # resumes where it stopped; --fresh starts anew
    python benchmarks/kinds.py --only 'crnn*' --dry     # some of them, and docs/models.md stays as it is

One small network of every kind is trained here, on scikit-learn's digits or on data drawn at random (nothing is
downloaded), and goes through `keepdrop.prune(model, train, test, macs_removed=..., finetune=...)`: one agent chooses,
what it leaves is repaired in closed form and trained on. Each row is written as soon as it is done. The row of Hugging
Face needs transformers. On one machine everything but the seconds is deterministic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import keepdrop
import torch
from common import machine, opened, script, section
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.errors import UserError
from keepdrop.experiments.pruning.network_search import NetworkSearchSettings
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
PAGE, STORE = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "kinds.json"
START, END = "<!-- kinds of networks -->", "<!-- end of kinds of networks -->"
SEARCH = NetworkSearchSettings(masks=8, images=200, repair_images=300, agent=NetworkAgentSettings(updates=6))
FINETUNE = keepdrop.TrainSettings(epochs=5, batch_size=64, distill_weight=0.5)
TRAIN = 1200  # of the 1,797 digits


@dataclass(frozen=True)
class Kind:
    """A network, its data, and how it is trained and scored.

    Attributes:
        what: the network, in words.
        network: makes it.
        train, test: (inputs, targets), or data sets.
        loss: of the training, (whatever the network answers in training mode, targets).
        settings: of `keepdrop.Settings`: the metric, its loss, which output counts.
        removed: fraction of the MACs.
        epochs: of the training.
        fit: a loop of its own, (model, train).
        finetune: how the cut network is trained.
    """

    what: str
    network: Callable[[], nn.Module]
    train: Any
    test: Any
    loss: Callable[[Any, Tensor], Tensor] = functional.cross_entropy
    settings: Mapping[str, Any] = field(default_factory=dict)
    removed: float = 0.5
    epochs: int = 20
    fit: Callable[[nn.Module, Any], None] | None = None
    finetune: Any = FINETUNE


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels, in an order drawn once: training, test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    targets = torch.tensor(labels)[order]
    return (pixels[:TRAIN], targets[:TRAIN]), (pixels[TRAIN:], targets[TRAIN:])


def on_digits(change: Callable[[Tensor, Tensor], Any]) -> dict[str, Any]:
    """`train` and `test` of a kind: what `change` makes of images and labels."""
    train, test = digits()
    return {"train": change(*train), "test": change(*test)}


def blocks(conv: Any, norm: Any, widths: tuple[int, ...], pool: Any = None) -> list[nn.Module]:
    """Convolution, normalisation, ReLU for every width, halved after the first where there is a pooling."""
    found: list[nn.Module] = []
    for number, (fan_in, width) in enumerate(pairwise(widths)):
        found += [conv(fan_in, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
        found += [pool(2)] if pool and number == 0 else []
    return found


def images_of(*widths: int, norm: Any = nn.BatchNorm2d) -> list[nn.Module]:
    """Blocks for images."""
    return blocks(nn.Conv2d, norm, widths, nn.MaxPool2d)


def waves(count: int, sides: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Noise (count, 2, *sides) and a wave along the last side, whose frequency is the class, of five."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    phase = 6.28 * torch.rand(count, 2, 1, generator=generator)
    wave = torch.sin(6.28 * (labels.view(-1, 1, 1) + 2) * torch.linspace(0, 1, sides[-1]) + phase)
    noise = torch.randn(count, 2, *sides, generator=generator)
    return 1.2 * noise + wave.view(count, 2, *[1] * (len(sides) - 1), sides[-1]), labels


def signals() -> Kind:
    """Waves of five frequencies in noise, (n, 2, 96)."""
    layers = [*blocks(nn.Conv1d, nn.BatchNorm1d, (2, 24, 32, 32), nn.MaxPool1d), nn.AdaptiveAvgPool1d(1)]
    made = partial(nn.Sequential, *layers, nn.Flatten(), nn.Linear(32, 5))
    return Kind("1-d CNN, three convolutions", made, waves(1500, (96,), 0), waves(800, (96,), 1), epochs=10)


def volumes() -> Kind:
    """The same along the last side of volumes, (n, 2, 4, 4, 24)."""
    layers = [*blocks(nn.Conv3d, nn.BatchNorm3d, (2, 16, 24, 24), nn.MaxPool3d), nn.AdaptiveAvgPool3d(1)]
    made = partial(nn.Sequential, *layers, nn.Flatten(), nn.Linear(24, 5))
    return Kind("3-d CNN, three convolutions", made, waves(800, (4, 4, 24), 0), waves(500, (4, 4, 24), 1), epochs=10)


class Siamese(nn.Module):
    """Whether two images show the same digit, one logit (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*images_of(1, 24, 32, 32)), nn.Linear(64, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """See the class."""
        left, right = (functional.adaptive_max_pool2d(self.body(each), 2).flatten(1) for each in (left, right))
        apart = (left - right).abs().view(len(left), 32, 4)
        return self.head(torch.cat([apart.mean(2), apart.amax(2)], 1)).squeeze(1)


def pairs(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((lefts, rights), 1. where both are the same digit): half of them are."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(labels), generator=generator)
    for number in range(0, len(labels), 2):
        alike = (labels == labels[number]).nonzero().squeeze(1)
        order[number] = alike[int(torch.randint(len(alike), (), generator=generator))]
    return (images, images[order]), (labels == labels[order]).float()


def siamese() -> Kind:
    """Pairs of digits, the same one or not."""
    return Kind(
        "pair of images, one logit",
        Siamese,
        **on_digits(pairs),
        loss=functional.binary_cross_entropy_with_logits,
        settings={"metric": keepdrop.BinaryAccuracy()},
        epochs=40,
    )


class ImageAndVector(nn.Module):
    """An image and a vector in, {"digit": (B, 10), "sum": (B, 1)} out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.vector = nn.Sequential(*images_of(1, 16, 32, 32)), nn.Linear(2, 8)
        self.digit, self.sum = nn.Linear(40, 10), nn.Linear(40, 1)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """See the class."""
        pooled = functional.adaptive_max_pool2d(self.body(image), 1).flatten(1)
        both = torch.cat([pooled, functional.relu(self.vector(vector))], 1)
        return {"sum": self.sum(both), "digit": self.digit(both)}


def parted(images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The image without its left half, and the brightness of two parts of that half as a vector."""
    left = torch.stack([images[:, 0, :4, :4].mean((1, 2)), images[:, 0, 4:, :4].mean((1, 2))], 1)
    right = images.clone()
    right[..., :3] = -1
    return {"image": right, "vector": left}, labels


def several() -> Kind:
    """A part of a digit as an image, another as a vector."""
    return Kind(
        "image and vector in, dictionary out",
        ImageAndVector,
        **on_digits(parted),
        loss=lambda answer, labels: functional.cross_entropy(answer["digit"], labels),
        settings={"output": "digit"},
    )


class Auxiliary(nn.Module):
    """A second head that runs in training alone, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.end = nn.Sequential(*images_of(1, 24, 32)), nn.Sequential(*images_of(32, 32)[:3])
        self.side, self.head = nn.Sequential(nn.Conv2d(32, 12, 1), nn.ReLU()), nn.Linear(32, 10)
        self.extra = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Any:
        """See the class."""
        maps = self.body(images)
        out = self.head(self.end(maps).amax((2, 3)))
        return (out, self.extra(self.side(maps).amax((2, 3)))) if self.training else out


def auxiliary() -> Kind:
    """Digits, with a second head."""

    def loss(answers: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        return functional.cross_entropy(answers[0], labels) + 0.3 * functional.cross_entropy(answers[1], labels)

    return Kind("auxiliary head in training", Auxiliary, **on_digits(lambda *pair: pair), loss=loss)


class LeNet(nn.Module):
    """The tutorials': no normalisation, `view` behind a map larger than 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32 * 2 * 2, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        maps = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        maps = functional.max_pool2d(functional.relu(self.conv2(maps)), 2)
        return self.fc2(functional.relu(self.fc1(maps.view(maps.size(0), -1))))


def lenet() -> Kind:
    """Digits, without normalisation."""
    return Kind("LeNet with `view`, no normalisation", LeNet, **on_digits(lambda *pair: pair))


class UNet(nn.Module):
    """Images (B, 1, 16, 16) -> one logit a pixel (B, 1, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Sequential(*blocks(nn.Conv2d, nn.BatchNorm2d, (1, 16))), self.block(16, 32)
        self.up, self.end = nn.ConvTranspose2d(32, 16, 2, stride=2), self.block(32, 16)
        self.head = nn.Conv2d(16, 1, 1)

    def block(self, fan_in: int, width: int) -> nn.Module:
        """One of its blocks."""
        return nn.Sequential(*blocks(nn.Conv2d, nn.BatchNorm2d, (fan_in, width)))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        fine = self.down(images)
        return self.head(self.end(torch.cat([fine, self.up(self.deep(functional.max_pool2d(fine, 2)))], 1)))


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (count, 1, 16, 16) with a disc and a bar, and the pixels of the disc (count, 1, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.arange(16.0)] * 2, indexing="ij")
    middle = 3 + 10 * torch.rand(2, count, 1, 1, generator=generator)
    radius = 2 + 2 * torch.rand(count, 1, 1, generator=generator)
    inside = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 <= radius**2
    bar = (x - 15 * torch.rand(count, 1, 1, generator=generator)).abs() < 1
    noise = 0.8 * torch.randn(count, 16, 16, generator=generator)
    return (noise + 1.5 * (inside | bar)).unsqueeze(1), inside.unsqueeze(1).float()


def segmentation() -> Kind:
    """Discs to be told from bars."""
    return Kind(
        "U-Net, one logit a pixel",
        UNet,
        discs(800, 0),
        discs(400, 1),
        loss=functional.binary_cross_entropy_with_logits,
        settings={"metric": keepdrop.Dice()},
        epochs=15,
    )


def detection() -> Kind:
    """Shapes in images, by `examples/detection.py`."""
    example = script("detection", ROOT / "examples" / "detection.py")
    train, test = example.data(600)
    return Kind(
        "detector on two scales, own loss and loop",
        example.Detector,
        train,
        test,
        settings={"metric": keepdrop.MeanAveragePrecision(example.decode, iou=0.5), "loss": example.loss},
        fit=lambda model, data: example.fit(model, data, 20, lr=1e-2),
        finetune=lambda model: example.fit(model, train, 8, lr=3e-3),
        removed=0.3,
    )


class ConvNeXt(nn.Module):
    """Two blocks with LayerNorm over the stream, layer scale on the branches."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, stride=2)
        self.deep = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        maps = self.stem(images)
        for deep, norm, wide, narrow, scale in zip(
            self.deep, self.norms, self.wide, self.narrow, self.scales, strict=True
        ):
            branch = narrow(functional.gelu(wide(norm(deep(maps).permute(0, 2, 3, 1)))))
            maps = maps + (scale * branch).permute(0, 3, 1, 2)
        return self.head(maps.mean((2, 3)))


def layer_scale() -> Kind:
    """Digits, by ConvNeXt's blocks."""
    return Kind("ConvNeXt blocks", ConvNeXt, **on_digits(lambda *pair: pair), epochs=40)


def group_norm() -> Kind:
    """Digits, with groups of channels normalised."""
    layers = [*images_of(1, 24, 32, 32, norm=partial(nn.GroupNorm, 4)), nn.AdaptiveMaxPool2d(1)]
    made = partial(nn.Sequential, *layers, nn.Flatten(), nn.Linear(32, 10))
    return Kind("CNN with GroupNorm", made, **on_digits(lambda *pair: pair))


class CRNN(nn.Module):
    """Columns of the maps are the steps of an LSTM of two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*images_of(1, 24, 32))
        self.lstm, self.head = nn.LSTM(32 * 4, 32, bidirectional=True, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        steps, _ = self.lstm(self.body(images).permute(0, 3, 1, 2).flatten(2))
        return self.head(steps.mean(1))


def crnn() -> Kind:
    """Digits, read column by column."""
    return Kind("convolutions, then an LSTM", CRNN, **on_digits(lambda *pair: pair), removed=0.4)


class Attending(nn.Module):
    """Positions of the maps attend to each other, by linear projections and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.place = nn.Sequential(*images_of(1, 24, 32)), nn.Parameter(torch.zeros(1, 16, 32))
        self.project, self.back = nn.Linear(32, 96), nn.Linear(32, 32)
        self.wide, self.narrow, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        tokens = self.body(images).flatten(2).transpose(1, 2) + self.place
        queries, keys, values = self.project(tokens).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        tokens = self.back(found)
        return self.head((tokens + self.narrow(functional.gelu(self.wide(tokens)))).mean(1))


def attention() -> Kind:
    """Digits, whose places attend to each other."""
    return Kind("convolutions, then attention", Attending, **on_digits(lambda *pair: pair), removed=0.4)


def hugging_face() -> Kind:
    """Digits enlarged to 32 x 32, by a class of transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed; pip install 'keepdrop[transformers]'.")
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    large = on_digits(lambda images, labels: (functional.interpolate(images, scale_factor=4), labels))
    return Kind(
        "transformers' ResNet",
        lambda: ResNetForImageClassification(config),
        **large,
        loss=lambda answer, labels: functional.cross_entropy(answer.logits, labels),
        epochs=8,
    )


KINDS: dict[str, Callable[[], Kind]] = {
    "signals": signals,
    "volumes": volumes,
    "two inputs": siamese,
    "several outputs": several,
    "auxiliary head": auxiliary,
    "memory order": lenet,
    "segmentation": segmentation,
    "detection": detection,
    "layer scale": layer_scale,
    "GroupNorm": group_norm,
    "CRNN": crnn,
    "attention": attention,
    "Hugging Face": hugging_face,
}


def main() -> None:
    """Measure what is missing, one row after the other, then write the table."""
    arguments = parsed()
    store = Path(arguments.store)
    if arguments.fresh:
        store.unlink(missing_ok=True)
    found = opened(store, {"experiment": "kinds of networks"}, "networks")
    for name, made in KINDS.items():
        if name in found["networks"] or arguments.show or not fnmatchcase(name.lower(), arguments.only.lower()):
            continue
        try:
            torch.manual_seed(0)
            row = measured(made())
        except UserError as error:
            row = {"failed": str(error)}
        print(name, row, flush=True)
        found["networks"][name] = row
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found["networks"])
    print(text)
    if not arguments.dry:
        PAGE.write_text(section(PAGE.read_text(), START, END, text))


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell-style pattern of kinds")
    parser.add_argument("--store", default=str(STORE), help="where rows are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--dry", action="store_true", help="leave docs/models.md as it is")
    return parser.parse_args()


def measured(kind: Kind) -> dict[str, Any]:
    """One row; accuracies are fractions on the report images."""
    started = time.perf_counter()
    model = kind.network()
    (kind.fit or partial(fitted, kind=kind))(model, kind.train)
    settings = keepdrop.Settings(network=SEARCH, **kind.settings)
    result = keepdrop.prune(
        model.eval(), kind.train, kind.test, macs_removed=kind.removed, finetune=kind.finetune, settings=settings
    )
    return {
        "what": kind.what,
        "groups": len(result.layers),
        "filters": [sum(each.n_kept for each in result.layers), sum(each.n_filters for each in result.layers)],
        "macs": result.base_macs,
        "macs_left": result.macs / result.base_macs,
        "params_left": result.params / result.base_params,
        "metric": result.metric,
        "dense": result.base_accuracy,
        "cut": result.pruned_accuracy,
        "finetuned": result.accuracy,
        "kept": None if result.finetuning is None else result.finetuning.kept,
        "seconds": round(time.perf_counter() - started, 1),
        **machine(),
    }


def fitted(model: nn.Module, data: tuple[Any, Tensor], kind: Kind) -> None:
    """Train `model` in place, by Adam with one cycle of rates."""
    inputs, targets = data
    steps = -(-len(targets) // 64)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps * kind.epochs)
    for _ in range(kind.epochs):
        for batch in torch.randperm(len(targets)).split(64):
            kind.loss(answered(model, inputs, batch), targets[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def answered(model: nn.Module, inputs: Any, batch: Tensor) -> Any:
    """What the network answers to some of the inputs: a tensor, a tuple or a dictionary of them."""
    if isinstance(inputs, Mapping):
        return model(**{name: each[batch] for name, each in inputs.items()})
    return model(*(each[batch] for each in (inputs if isinstance(inputs, tuple) else (inputs,))))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The section of the page."""
    lines = [
        START,
        "## Kinds of networks",
        "",
        "One small network of every kind, trained and pruned by `python benchmarks/kinds.py`, whose head says how: on",
        "scikit-learn's digits, or on data drawn at random (signals, volumes, segmentation, detection). One agent",
        f"chooses ({SEARCH.agent.updates} updates of {SEARCH.masks} masks), which is a short search. *cut*: cut and "
        "repaired; *fine-tuned*: or as",
        "cut where fine-tuning did not help on the reward images. Scores in %, one seed.",
        "",
        "| kind | network | groups | filters left | MACs | MACs left | parameters left | score | dense | cut | "
        "fine-tuned |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|",
        *(line(name, rows[name]) for name in KINDS if name in rows),
        END,
    ]
    return "\n".join(lines) + "\n"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row of the table."""
    if "failed" in row:
        return f"| {name} | failed: {row['failed'].replace('|', '/')} | | | | | | | | | |"
    kept, filters = row["filters"]
    figures = [f"{100 * row[key]:.1f} %" for key in ("macs_left", "params_left")]
    scores = [f"{100 * row[key]:.2f}" for key in ("dense", "cut", "finetuned")]
    macs = f"{row['macs'] / 1e6:.2f} M"
    cells = [name, row["what"], row["groups"], f"{kept} of {filters}", macs, *figures, row["metric"], *scores]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
