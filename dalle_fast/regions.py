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
    def parse(cls, text: str, height: int, width: int, factor: int) -> Box:
        """ "x0,y0,x1,y1" in cells, or in pixels with a trailing "px" (widened to whole cells of `factor` pixels).

        Raises ValueError for another form, an empty box or one that leaves the picture.
        """
        match = re.fullmatch(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*(px)?\s*", text)
        if not match:
            raise ValueError(f"got box {text!r}, expected x0,y0,x1,y1 in cells, or x0,y0,x1,y1px in pixels")
        x0, y0, x1, y1 = map(int, match.groups()[:4])
        if match[5]:
            x0, y0, x1, y1 = x0 // factor, y0 // factor, -(-x1 // factor), -(-y1 // factor)
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
