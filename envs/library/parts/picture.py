"""Small pictures for environments that show images: shapes, text of one bitmap font, the same PNG bytes every time.

Pillow is optional: only an environment that draws needs it.
"""

import io
from typing import Any

from envs.errors import MalformedEnvironment
from envs.message import ImagePart

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom belong to it."""

BLACK, WHITE, GREY, PALE = (0, 0, 0), (255, 255, 255), (150, 150, 150), (225, 225, 225)
CHAR_WIDTH, CHAR_HEIGHT = 6, 11
"""Of the font, in pixels."""


class Picture:
    """A canvas of `width` x `height` pixels; (0, 0) is top left.

    Example: picture = Picture(224, 160); picture.text(4, 4, "save"); picture.png() -> ImagePart
    """

    def __init__(self, width: int, height: int) -> None:
        """Raises MalformedEnvironment where Pillow is not installed."""
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ModuleNotFoundError as error:
            raise MalformedEnvironment("this environment draws: pip install 'shoal[images]'") from error
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width, height), WHITE)
        self._draw: Any = ImageDraw.Draw(self._image)
        self._draw.fontmode = "1"
        self._draw.font = ImageFont.load_default_imagefont()  # bitmaps: no rasteriser whose version could matter

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = BLACK) -> None:
        self._draw.rectangle(box, fill, outline)

    def line(self, points: list[tuple[int, int]], colour: Colour = BLACK, width: int = 1) -> None:
        self._draw.line(points, colour, width)

    def disc(self, x: int, y: int, radius: int, fill: Colour) -> None:
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def slice(self, x: int, y: int, radius: int, start: float, end: float, fill: Colour) -> None:
        """A piece of a pie; degrees clockwise from three o'clock."""
        self._draw.pieslice((x - radius, y - radius, x + radius, y + radius), start, end, fill, BLACK)

    def text(self, x: int, y: int, text: str, colour: Colour = BLACK, *, scale: int = 1) -> None:
        """One line with its top left corner at (x, y), each pixel of the font `scale` pixels wide and high; "?" stands
        for what is no printable ASCII character."""
        text = "".join(c if " " <= c <= "~" else "?" for c in text)
        if scale == 1:
            self._draw.text((x, y), text, colour)
            return
        from PIL import Image, ImageDraw

        small = Image.new("1", (CHAR_WIDTH * len(text), CHAR_HEIGHT))
        draw: Any = ImageDraw.Draw(small)
        draw.text((0, 0), text, 1, font=self._draw.font)
        self._draw.bitmap((x, y), small.resize((scale * small.width, scale * small.height)), colour)

    def dots(self, points: list[tuple[int, int]], colour: Colour) -> None:
        self._draw.point(points, colour)

    def png(self, window: Box | None = None, *, size: tuple[int, int] | None = None) -> ImagePart:
        """The whole picture, or a `window` of it, shrunk or enlarged to `size` (width, height)."""
        from PIL import Image

        image = self._image if window is None else self._image.crop((*window[:2], window[2] + 1, window[3] + 1))
        if size is not None and size != image.size:
            shrinks = size[0] < image.size[0]
            image = image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)
        data = io.BytesIO()
        image.save(data, "PNG", compress_level=6)
        return ImagePart(data=data.getvalue())
