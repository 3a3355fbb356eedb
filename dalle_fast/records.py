"""What lies in a folder of pictures: a PNG a candidate, a contact sheet, and the JSON that draws each of them again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_fast.figures import contact_sheet
from dalle_fast.pipeline import Picture, order
from dalle_fast.ranking import ClipRanker
from dalle_fast.weights import WeightError, read_text, sync, write_atomically

SHEET, RECORD = "sheet.png", "sample.json"
MOST_ON_A_SHEET = 256


@dataclass(frozen=True)
class Entry:
    """A picture whose pixels lie in a file."""

    file: str
    candidate: int
    log_likelihood: float
    known_log_p: float | None
    score: float | None  # CLIP, 100 x cosine
    tokens: list[int]


def write_png(path: Path, image: Image.Image) -> None:
    """Whole or not at all. Raises OSError that names the path."""
    _write(path, lambda temporary: image.save(temporary, format="PNG"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, but for rows of numbers; whole or not at all. The disk holds it at the end, and before it all that was
    written into its folder, which it may speak of. Raises OSError that names the path."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[-\d,\s]+\]", lambda tokens: " ".join(tokens[0].split()), text) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    sync(path.parent)
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for folder in (path.parent, path.parent.parent):
        sync(folder)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:  # it names a temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_picture(folder: Path, picture: Picture) -> Entry:
    """Writes the picture's PNG."""
    name = f"{picture.candidate:04d}.png"
    write_png(folder / name, picture.image)
    return Entry(
        name, picture.candidate, picture.log_likelihood, picture.known_log_p, picture.score, picture.tokens.tolist()
    )


def finish(
    folder: Path,
    entries: Sequence[Entry],
    header: dict[str, Any],
    *,
    by: str | None = None,
    keep: int | None = None,
    ranker: ClipRanker | None = None,
) -> None:
    """Ranks the pictures that were written, by CLIP (`ranker`), likelihood or both; best first on the sheet and in the
    record, of which the first `keep` are kept on the sheet. Without `by`: in turn, and the first MOST_ON_A_SHEET."""
    if by is not None:
        if by != "likelihood":
            assert ranker is not None, "ranking by CLIP takes a CLIP model"
            entries = [entry for part in _parts(entries) for entry in _scored(folder, part, ranker, header["prompt"])]
        fit = [entry.log_likelihood if entry.known_log_p is None else entry.known_log_p for entry in entries]
        entries = [entries[i] for i in order([entry.score for entry in entries], fit, by)]
    shown = entries[: min(keep or MOST_ON_A_SHEET, MOST_ON_A_SHEET)]
    write_png(folder / SHEET, contact_sheet([read_image(folder / entry.file) for entry in shown]))
    write_json(folder / RECORD, {**header, "pictures": [vars(entry) for entry in entries]})


def _parts(entries: Sequence[Entry], size: int = 32) -> Iterator[Sequence[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _scored(folder: Path, entries: Sequence[Entry], ranker: ClipRanker, caption: str) -> list[Entry]:
    scores = ranker.scores([read_image(folder / entry.file) for entry in entries], caption).tolist()
    return [replace(entry, score=score) for entry, score in zip(entries, scores, strict=True)]


def read_image(path: Path) -> Image.Image:
    """A picture file as RGB, upright, on white where it is transparent. Raises ValueError, in one line, for anything that
    is no whole picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGBA")
    except Exception as error:  # Pillow's readers raise a dozen kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ValueError(f"cannot read picture {path}: {reason}") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_tokens(path: Path, candidate: int | None = None) -> Tensor:
    """The tokens [cells] of one picture of a record: of a candidate by its number, else of the first (the best, if they
    are ranked). Raises ValueError, in one line, for another file or no such candidate."""
    try:
        pictures = json.loads(read_text(path))["pictures"]
        found = {int(picture["candidate"]): [int(token) for token in picture["tokens"]] for picture in pictures}
    except WeightError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"cannot read {path}: expected what `dalle-fast sample` writes as {RECORD}") from None
    if not found or (candidate is not None and candidate not in found):
        raise ValueError(f"got candidate {candidate}, but {path} holds {_few(found)}")
    tokens = found[next(iter(found)) if candidate is None else candidate]
    if not all(0 <= token < 2**31 for token in tokens):
        raise ValueError(f"cannot read {path}: tokens of candidate {candidate} are out of range")
    return torch.tensor(tokens, dtype=torch.int64)


def _few(numbers: Iterable[int]) -> str:
    names = [str(number) for number in numbers]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
