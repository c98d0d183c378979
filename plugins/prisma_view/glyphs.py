"""Emoji as images, drawn with the system's own emoji font."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prisma_view.colours import Colour

# Names by which Pillow finds the usual emoji fonts, and the sizes of their bitmaps.
_FONTS = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf", "TwitterColorEmoji-SVGinOT.ttf")
_SIZES = (109, 160, 136, 96)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | None:
    for name in _FONTS:
        for size in _SIZES:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return None


@functools.lru_cache(maxsize=512)
def glyph(emoji: str, size: int) -> Image.Image | None:
    """Return an emoji as a square image with alpha, or None where there is no emoji font."""
    font = _font()
    if font is None:
        return None
    canvas = Image.new("RGBA", (240, 240), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((40, 40), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    cut = canvas.crop(box)
    square = Image.new("RGBA", (max(cut.size),) * 2, (0, 0, 0, 0))
    square.paste(cut, ((square.width - cut.width) // 2, (square.height - cut.height) // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def look(emoji: str) -> Colour | None:
    """Return an emoji's main colour, or None where there is no emoji font."""
    drawn = glyph(emoji, 32)
    if drawn is None:
        return None
    pixels = np.asarray(drawn).reshape(-1, 4).astype(float)
    solid = pixels[pixels[:, 3] > 128][:, :3]
    if not len(solid):
        return None
    red, green, blue = np.median(solid, axis=0).round().astype(int).tolist()
    return red, green, blue
