"""Composed scenes for segmentation: handwritten digits on photos or colours, with an exact map of classes, made here.

No picture of the world: what is drawn is known pixel by pixel, so that the maps hold no mistake of an annotator.
Shapes: n scenes of S x S pixels, D things drawn one over the other.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ...errors import UserError
from .arrays import checked_images, read_npz
from .images import ArrayImages, LabelledData
from .sources import digits

DIGITS, BARS = 4, 2  # at most, of each in a scene
AT_ONCE = 500  # scenes drawn together


def composed_scenes(
    n_train: int = 4000,
    n_test: int = 1000,
    size: int = 64,
    seed: int = 0,
    photos: str | os.PathLike[str] | None = None,
) -> LabelledData:
    """Scenes (3, size, size) uint8 with maps (size, size) of 11 classes: 0 the background, 1 + d a pixel of digit d.

    Each has one to four of the embedded digits, turned, sized and coloured at random, which may hide one another, over
    up to two bars of the background class. Backgrounds are blurred colours, or photos from an .npz as `sources.npz`
    reads it: x_train under the scenes to train on, x_test under the others. Digits of the one are not in the other. The
    same arguments give the same scenes.

    Raises UserError for counts below 1, sides that are no multiple of 8 or below 32, and photos not in colour.
    """
    if n_train < 1 or n_test < 1:
        raise UserError(
            f"composed_scenes needs at least one scene of each kind, got n_train={n_train}, n_test={n_test}."
        )
    if size < 32 or size % 8:
        raise UserError(f"composed_scenes needs a size of 32 or more that is a multiple of 8, got size={size}.")
    source, grounds = digits(), {"train": None, "test": None} if photos is None else _photos(Path(photos))
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (part, n_scenes) in enumerate((("train", n_train), ("test", n_test))):
        generator = torch.Generator().manual_seed(2 * seed + number)
        images = getattr(source, part)
        shapes, labels = images.batch(torch.arange(len(images)))
        shapes = (shapes - shapes.min()) / (shapes.max() - shapes.min())
        pieces = [
            _scenes(shapes, labels, grounds[part], min(AT_ONCE, n_scenes - start), size, generator)
            for start in range(0, n_scenes, AT_ONCE)
        ]
        scenes, maps = zip(*pieces, strict=True)
        parts[part] = torch.cat(scenes), torch.cat(maps)
    mean, std = (0.35, 0.35, 0.35), (0.25, 0.25, 0.25)
    train, test = (ArrayImages(images, maps, mean, std, n_classes=0) for images, maps in parts.values())
    return LabelledData(train, test)


def _photos(path: Path) -> dict[str, Tensor | None]:
    arrays = read_npz(path)
    photos = {part: checked_images(arrays[f"x_{part}"], f"x_{part}", str(path)) for part in ("train", "test")}
    for part, images in photos.items():
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise UserError(f"'{path}': x_{part} are no photos; expected uint8 (n, height, width, 3), in colour.")
    return dict(photos)


def _scenes(
    shapes: Tensor, labels: Tensor, photos: Tensor | None, n: int, size: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, S, S) and maps uint8 (n, S, S), from digits (K, 1, 8, 8) in [0, 1] with their labels."""
    images = _ground(photos, n, size, generator)
    maps = torch.zeros(n, size, size, dtype=torch.uint8)
    bar = torch.ones(1, 1, 8, 8)
    for position in range(BARS + DIGITS):
        is_bar = position < BARS
        chosen = torch.randint(1 if is_bar else len(shapes), (n,), generator=generator)
        present = torch.rand(n, generator=generator) < (1.0 if position == BARS else 0.3 if is_bar else 0.5)
        opacity = _placed((bar if is_bar else shapes)[chosen], is_bar, size, generator)
        covered = (opacity > 0.5) & present[:, None, None]
        colours = torch.rand(n, 3, 1, 1, generator=generator)
        colours = colours / colours.amax(1, keepdim=True)
        images = torch.where(covered[:, None], colours * (0.7 + 0.3 * opacity[:, None]), images)
        classes = torch.zeros(n, dtype=torch.uint8) if is_bar else (1 + labels[chosen]).to(torch.uint8)
        maps = torch.where(covered, classes[:, None, None], maps)
    images = images + 0.04 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), maps


def _ground(photos: Tensor | None, n: int, size: int, generator: Generator) -> Tensor:
    """Backgrounds (n, 3, S, S) in [0, 0.6]: darker than what is put on them, in one colour at least."""
    if photos is None:
        rough = torch.rand(n, 3, 5, 5, generator=generator)
    else:
        rough = photos[torch.randint(len(photos), (n,), generator=generator)].float() / 255
    return 0.6 * F.interpolate(rough, (size, size), mode="bilinear", align_corners=False)


def _placed(shapes: Tensor, is_bar: bool, size: int, generator: Generator) -> Tensor:
    """Shapes (n, 1, 8, 8) turned, sized and put somewhere: opacities (n, S, S), 0 outside."""
    n = len(shapes)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    height = drawn(0.3, 0.5)
    width = drawn(0.05, 0.12) if is_bar else height * drawn(0.75, 1.0)
    turn = drawn(0, math.pi) if is_bar else drawn(-0.35, 0.35)
    x, y = drawn(-0.75, 0.75), drawn(-0.75, 0.75)
    cos, sin = turn.cos(), turn.sin()
    # Rows of the map from the scene's coordinates to those of the shape, both -1 to 1.
    across = torch.stack([cos / width, sin / width, -(cos * x + sin * y) / width], 1)
    down = torch.stack([-sin / height, cos / height, (sin * x - cos * y) / height], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [n, 1, size, size], align_corners=False)
    return F.grid_sample(shapes, grid, padding_mode="zeros", align_corners=False)[:, 0]
