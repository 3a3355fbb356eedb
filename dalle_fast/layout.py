"""The geometry of one sequence: text first, then an image in raster order."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TEXT_LEN = 512
MAX_SIDE = 64


@dataclass(frozen=True)
class SequenceLayout:
    """`text_len` text positions followed by `height` x `width` image cells.

    A *cell* is the index of an image position in raster order, 0 … height * width - 1; the sequence index of cell c is
    text_len + c. No alignment is assumed: DALLE-pytorch's image begins at 257.

    Raises ValueError for a text length outside 1 … 512 or a side outside 1 … 64.
    """

    text_len: int = 256
    height: int = 32
    width: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.text_len <= MAX_TEXT_LEN:
            raise ValueError(f"got text_len={self.text_len}, expected 1 to {MAX_TEXT_LEN}")
        for name in ("height", "width"):
            if not 1 <= getattr(self, name) <= MAX_SIDE:
                raise ValueError(f"got {name}={getattr(self, name)}, expected 1 to {MAX_SIDE}")

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def total(self) -> int:
        """Length of the whole sequence."""
        return self.text_len + self.cells

    def __str__(self) -> str:
        return f"{self.text_len}+{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> SequenceLayout:
        """The inverse of str(): "256+32x32"."""
        match = re.fullmatch(r"(\d+)\+(\d+)x(\d+)", text)
        if not match:
            raise ValueError(f"got layout {text!r}, expected TEXT+HEIGHTxWIDTH such as '256+32x32'")
        return cls(*map(int, match.groups()))
