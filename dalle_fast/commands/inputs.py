"""What commands read: a picture from a file or a record, captions from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PICTURE = "a picture file, or the sample.json of a sample, whose tokens are taken as they are"


def read_picture(path: Path, candidate: int | None) -> Image.Image | Tensor:
    """A picture's pixels, or its tokens [cells] from a record. Raises ValueError for what can't be read, and for a
    candidate's number where the file has none."""
    from dalle_fast import records

    if path.suffix.lower() == ".json":
        return records.read_tokens(path, candidate)
    if candidate is not None:
        raise ValueError(f"got candidate={candidate} for {path}, expected a sample.json")
    return records.read_image(path)


def read_prompts(path: str) -> list[str]:
    """The captions of a file, or of standard input for "-": one a line, empty lines left out. Raises ValueError."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"got no caption in {path}, expected one a line")
    return prompts
