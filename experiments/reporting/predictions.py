"""Predictions of a segmentation network as pictures: truth, dense, pruned and fine-tuned beside some report images.

Written at the end of a run (`predictions.json`), drawn in its report. Shapes: B images, C classes.
"""

from __future__ import annotations

import base64
import colorsys
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...envs.data.images import LabelledImages
from ...envs.data.metrics import Metric, as_classes
from ...envs.data.objective import display_name, objective_of, output_of
from ...envs.networks.memory_layout import suited
from ...envs.networks.modes import modes_restored
from ...errors import UserError
from ..runs.folder import RunFolder
from .cards import percent
from .markup import Markup, section, tag
from .run_data import PREDICTIONS, Run

N_IMAGES = 6
PIXELS = 256  # longest side of a picture that is stored; larger ones are thinned out
TITLES = {"dense": "dense", "pruned": "pruned", "finetuned": "fine-tuned"}


def write_predictions(networks: Mapping[str, nn.Module], data: LabelledImages, folder: RunFolder) -> None:
    """`predictions.json`: what networks, by their names, answer to some images; nothing where targets are not maps.

    Maps are classes int64 (B, H, W) as large as the image, or yes and no with one channel.
    """
    objective, n = objective_of(data), min(N_IMAGES, len(data))
    places = torch.linspace(0, len(data) - 1, n).long()
    images, targets = data.batch(places)
    if images.dim() != 4 or targets.dim() < 3 or targets.shape[-2:] != images.shape[-2:] or objective.is_of_set:
        return
    truth: Tensor | None = None
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, network in networks.items():
        found = _answers(network, images, targets, objective.metric)
        if found is None:
            return
        outputs, classes, truth = found
        scores = [objective.fraction(objective.points(outputs[i : i + 1], targets[i : i + 1])) for i in range(n)]
        answers[name] = [
            {"score": score, "map": png(_coloured(each))} for score, each in zip(scores, classes, strict=True)
        ]
    assert truth is not None
    rows = [
        {
            "index": int(place),
            "picture": png(_picture(images[i])),
            "truth": png(_coloured(truth[i])),
            "answers": {name: each[i] for name, each in answers.items()},
        }
        for i, place in enumerate(places)
    ]
    folder.write_json(PREDICTIONS, {"metric": objective.name, "images": rows})


@torch.no_grad()
def _answers(
    network: nn.Module, images: Tensor, targets: Tensor, metric: Metric
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Outputs, answered classes and true classes on the CPU; None where the answer is no map of the classes."""
    parameter = next(network.parameters(), None)
    with modes_restored(network):
        given = images if parameter is None else images.to(parameter.device)
        outputs = output_of(network.eval()(suited(network, given))).float().cpu()
    try:
        probabilities, ignored = getattr(metric, "probabilities", False), getattr(metric, "ignore_index", None)
        logits, truth = as_classes(outputs, targets, probabilities, ignored)
    except UserError:
        return None
    if truth.is_floating_point() or logits.dim() != 4 or logits.shape[-2:] != truth.shape[-2:] or truth.dim() != 3:
        return None
    return outputs, logits.argmax(1), truth


def predictions(run: Run) -> Markup | None:
    """The pictures, one row per image."""
    rows = run.predictions.get("images") or []
    if not rows:
        return None
    names = list(rows[0]["answers"])
    head = ["image", "truth", *(TITLES.get(name, name) for name in names)]
    cells = [tag("div", each, class_="head") for each in head]
    for row in rows:
        cells += [_shown(row["picture"], f"report image {row['index']}"), _shown(row["truth"], "its true classes")]
        for name in names:
            answer, title = row["answers"][name], TITLES.get(name, name)
            cells.append(_shown(answer["map"], f"classes by the {title} network", percent(float(answer["score"]), 1)))
    text = (
        f"{len(rows)} images spread evenly over the report split, their true classes, and what each network answers, "
        f"with the {display_name(run.predictions.get('metric'))} of that image. One colour per class."
    )
    return section("Predictions", text, tag("div", *cells, class_="predictions", style=f"--columns: {len(head)}"))


def _shown(encoded: str, words: str, below: str = "") -> Markup:
    picture = tag("img", src=f"data:image/png;base64,{encoded}", alt=words)
    return tag("figure", picture, tag("figcaption", below) if below else None)


def _picture(image: Tensor) -> Tensor:
    """A normalised image (channels, H, W) as uint8 (H, W, 3), from its darkest to its lightest value."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    low, high = float(shown.min()), float(shown.max())
    return ((shown - low) / max(high - low, 1e-6) * 255).round().to(torch.uint8).movedim(0, -1)


def _coloured(classes: Tensor) -> Tensor:
    """Classes (H, W) as colours uint8 (H, W, 3): the first dark, hues a golden ratio apart, what is ignored white."""
    ignored = len(_palette()) - 1
    return _palette()[torch.where((classes < 0) | (classes == 255), ignored, classes % ignored)]


@cache
def _palette() -> Tensor:
    """Colours uint8 (257, 3) of classes, and of what is ignored."""
    hues = ((i * 0.618034 % 1, 0.55 + 0.3 * (i % 2), 0.95 - 0.2 * (i % 3)) for i in range(1, 256))
    colours = [(0.16, 0.18, 0.2), *(colorsys.hsv_to_rgb(*hue) for hue in hues), (1.0, 1.0, 1.0)]
    return (torch.tensor(colours) * 255).round().to(torch.uint8)


def png(pixels: Tensor) -> str:
    """Pixels uint8 (H, W, 3) as a PNG file in base64, thinned out to 256 a side."""
    step = -(-max(pixels.shape[:2]) // PIXELS)
    pixels = pixels[::step, ::step].cpu()
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines, 9)), _chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
