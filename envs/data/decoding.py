"""Image files (JPEG, PNG and others that Pillow reads) as uint8 pixels: upright, scaled, cut to the centre.

Nothing that runs other programs is tried: PostScript, for one, is refused however its file is called.

Shapes: S the side that is wanted, C channels: 3 (RGB) or 1 (grey).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, summarised
from ...ranges import check_given, check_number

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "ppm", "pgm", "webp", "tif", "tiff"})
MODES = {1: "L", 3: "RGB"}
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # by its values, what makes an image upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SIDE = (1, 8192)
WHOLE = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}  # how files begin, and whole ones end


@dataclass(frozen=True)
class Decoder:
    """A file -> pixels uint8 (S, S, C).

    The short side is scaled to `resize` (None: to `size`), then the centre of `size` x `size` is taken. EXIF says which
    side is up. Grey, palettes and CMYK become RGB, or everything grey with one channel; what is transparent keeps its
    colour. Grey of 16 bits is scaled to 8. Large JPEGs are decoded at a half, a quarter or an eighth of their size, as
    long as twice what is wanted is left.
    """

    size: int
    resize: int | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        check_given("size", self.size, SIDE)
        check_number("resize", [self.resize], SIDE)
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"resize is {self.resize}; expected at least the size that is cut out, {self.size}.")
        if self.channels not in MODES:
            raise UserError(
                f"Images of a folder have 3 channels (RGB) or 1 (grey), but mean and std hold {self.channels}; give "
                "three numbers, or one."
            )
        pillow()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, S, C)."""
        return self.size, self.size, self.channels

    def __call__(self, path: str) -> np.ndarray:
        """Pixels uint8 (S, S, C); UserError for a file that cannot be read, and for values without a white."""
        try:
            with pillow().open(path, formats=FORMATS) as image:
                short = 2 * (self.resize or self.size)
                image.draft(None, (short, short))
                plain, mode = _plain(image, path), MODES[self.channels]
                upright = _upright(plain if plain.mode == mode else plain.convert(mode), image)
                pixels = np.asarray(self._fitted(upright))
        except UserError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise unreadable(path, error) from error
        return pixels.reshape(self.shape)

    def _fitted(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        if self.resize is None or self.resize == self.size:
            wanted = (self.size, self.size)
            return image if image.size == wanted else ImageOps.fit(image, wanted)
        side = min(image.size) * self.size / self.resize
        left, top = ((each - side) / 2 for each in image.size)
        box = (left, top, left + side, top + side)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)


def pillow() -> Any:
    """`PIL.Image`; UserError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("Image folders need Pillow; install it with: pip install 'keepdrop[vision]'.") from error
    return Image


def _upright(image: Any, file: Any) -> Any:
    """An image as its file's EXIF says it was taken; as it is where that cannot be read."""
    if file.format == "JPEG" and "exif" not in file.info:
        return image
    try:
        orientation = file.getexif().get(ORIENTATION, 1)
    except Exception:
        return image
    return image.transpose(getattr(pillow().Transpose, TURNS[orientation])) if orientation in TURNS else image


def _plain(image: Any, path: str) -> Any:
    """A Pillow image in 8 bits and without a palette. Pillow itself would clip grey of 16 bits at 255: nearly white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        # Files of 16 bits open as "I;16", with older versions of Pillow as "I".
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"'{path}' holds {'floating' if image.mode == 'F' else '32-bit'} values from {values.min()} to "
                f"{values.max()}, whose white is unknown; save it with 8 or 16 bits per channel."
            )
        return pillow().fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))
    # A palette with transparency goes through RGBA, as Pillow asks for.
    return image.convert("RGBA") if "transparency" in image.info else image


def unreadable(path: str, error: BaseException) -> UserError:
    """The sentence for a file that is no image, or only a part of one."""
    from PIL import UnidentifiedImageError

    known = isinstance(error, UnidentifiedImageError)
    reason = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file" if known else summarised(error)
    return UserError(f"'{path}' is not a readable image ({reason}); fix or remove it.")


def check_file(path: str, decoder: Decoder) -> None:
    """UserError for a file that is no image, or that was cut off: JPEG and PNG by their ends, without decoding them."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            Path(path).stat()
            raise OSError("no regular file")
        with Path(path).open("rb") as file:
            start = file.read(4)
            file.seek(0, 2)
            file.seek(-min(file.tell(), 16), 1)
            end = file.read()
        kind = next((each for each in WHOLE if start.startswith(each)), None)
        if kind is None:
            with pillow().open(path, formats=FORMATS):
                return
    except Exception as error:
        raise unreadable(path, error) from error
    if not end.rstrip(b"\0").endswith(WHOLE[kind]):
        decoder(path)
