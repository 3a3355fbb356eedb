"""Rectangles of a picture, and what of it stays known when they are drawn anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Columns left … right - 1 and rows top … bottom - 1 of the token grid."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def parse(cls, text: str, height: int, width: int, size: tuple[int, int]) -> Box:
        """ "x0,y0,x1,y1" in cells; or with a trailing "px" in pixels of a picture of `size` (width, height), widened to
        whole cells.

        Raises ValueError for another form, an empty box or one that leaves the picture.
        """
        match = re.fullmatch(r"\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*(px)?\s*", text)
        if not match:
            raise ValueError(f"got box {text!r}, expected x0,y0,x1,y1 in cells, or x0,y0,x1,y1px in pixels")
        x0, y0, x1, y1 = map(int, match.groups()[:4])
        if match[5]:
            if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
                raise ValueError(f"got box {text!r}, expected a rectangle within 0,0,{size[0]},{size[1]}px")
            x0, x1 = x0 * width // size[0], -(-x1 * width // size[0])
            y0, y1 = y0 * height // size[1], -(-y1 * height // size[1])
        box = cls(x0, y0, x1, y1)
        box.check(height, width)
        return box

    def check(self, height: int, width: int) -> None:
        """Raises ValueError unless the box is a part of the grid that is not empty."""
        if not (0 <= self.left < self.right <= width and 0 <= self.top < self.bottom <= height):
            raise ValueError(
                f"got box {self.left},{self.top},{self.right},{self.bottom}, expected a rectangle within 0,0,{width},{height}"
            )


def known_outside(tokens: Tensor, boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """The picture's tokens [height * width] with -1 inside the boxes. Raises ValueError for no box or a bad one."""
    if not boxes:
        raise ValueError("got no box, expected at least one")
    grid = tokens.clone().view(height, width)
    for box in boxes:
        box.check(height, width)
        grid[box.top : box.bottom, box.left : box.right] = -1
    return grid.view(-1)
