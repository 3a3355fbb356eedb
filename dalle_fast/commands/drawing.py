"""Drawing into a folder: a bar over the tokens, a PNG a picture as soon as it is there, then the sheet and the record."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dalle_fast
from dalle_fast.commands import options

if TYPE_CHECKING:
    from torch import Tensor

    from dalle_fast.pipeline import Picture, Pipeline

OnToken = Callable[[int, "Tensor"], None]
INTERRUPTED = 130
PREVIEW = "preview.png"


def draw(
    pipeline: Pipeline,
    arguments: argparse.Namespace,
    out: Path,
    wave: int,
    pictures: Callable[[OnToken], Iterator[Picture]],
    **more: Any,
) -> int:
    """Writes the pictures, keeps the finished ones at Ctrl-C, and returns the exit code. more: entries of the record."""
    from dalle_fast import records

    started = time.perf_counter()
    entries: list[records.Entry] = []
    latest, finished = None, True
    watch = Watch(pipeline, arguments, out, arguments.n)
    drawn = pictures(watch.on_token)  # which checks its input
    try:
        with watch:
            for latest in drawn:
                entries.append(records.write_picture(out, latest))
    except KeyboardInterrupt:
        finished = False
        if latest is not None and latest.candidate not in [entry.candidate for entry in entries[-1:]]:
            entries.append(records.write_picture(out, latest))
    if not entries:
        raise KeyboardInterrupt
    by = arguments.rank if finished else None
    ranker = pipeline.ranker if by in ("clip", "both") else None
    header = header_of(arguments, arguments.caption, wave, **more)
    records.finish(out, entries, header, by=by, keep=arguments.keep, ranker=ranker)
    seconds = time.perf_counter() - started
    sheet = arguments.out / records.SHEET
    print(f"{len(entries)} of {arguments.n} pictures in {seconds:.1f} s: {sheet}")
    return 0 if finished else INTERRUPTED


def header_of(arguments: argparse.Namespace, caption: str, wave: int, **more: Any) -> dict[str, Any]:
    """All that it takes to draw a picture again."""
    settings = options.settings(arguments)
    return {
        "dalle_fast": dalle_fast.__version__,
        "command": arguments.line,
        "prompt": caption,
        "seed": settings.seed,
        "settings": asdict(settings),
        "model": "bundled" if arguments.model is None else str(arguments.model),
        **{name: getattr(arguments, name) for name in ("device", "dtype", "backend", "fp8_tails", "truncate")},
        "wave": wave,
        "ranked_by": arguments.rank,
        "kept": arguments.keep,
        **more,
    }


class Watch:
    """While entered: a progress bar over the tokens of so many pictures, and the preview if it is asked for."""

    def __init__(self, pipeline: Pipeline, arguments: argparse.Namespace, out: Path, pictures: int) -> None:
        self.cells = pipeline.config.cells
        self.total = pictures * self.cells
        self.preview = Preview(pipeline, out / PREVIEW) if arguments.preview else None
        self.bar: Any = None

    def __enter__(self) -> Watch:
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit=" tokens", desc="drawing")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.preview is not None:
            self.preview.path.unlink(missing_ok=True)

    def on_token(self, j: int, tokens: Tensor) -> None:
        self.bar.update(len(tokens))
        if self.preview is not None:
            self.preview(j, tokens)

    def on_skip(self, pictures: int) -> None:
        """So many pictures are there already."""
        self.bar.update(pictures * self.cells)


class Preview:
    """The wave that is being drawn as one picture, written anew after each row."""

    def __init__(self, pipeline: Pipeline, path: Path) -> None:
        self.pipeline, self.path = pipeline, path
        self.columns: list[Tensor] = []

    def __call__(self, j: int, tokens: Tensor) -> None:
        import torch

        from dalle_fast.figures import contact_sheet
        from dalle_fast.records import MOST_ON_A_SHEET, write_png

        if j == 0:
            self.columns = []
        self.columns.append(tokens[:MOST_ON_A_SHEET].clone())
        if (j + 1) % self.pipeline.config.width == 0:
            images = self.pipeline.decode_partial(torch.stack(self.columns, dim=1))
            write_png(self.path, contact_sheet(images))
