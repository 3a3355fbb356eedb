"""`dalle-fast regenerate`: draws boxes of a picture anew under a caption."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_fast.commands import drawing, inputs
from dalle_fast.commands import options as shared

if TYPE_CHECKING:
    from dalle_fast.pipeline import Picture

HELP = "draw boxes of a picture anew"


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("picture", type=Path, help=inputs.PICTURE)
    option("caption", help="what the whole picture shows")
    option(
        "--box",
        action="append",
        required=True,
        metavar="X0,Y0,X1,Y1",
        help="in cells, or X0,Y0,X1,Y1px; may be repeated",
    )
    option("--candidate", type=int, metavar="I", help="which picture of a sample.json (the first in it)")
    shared.add_drawing(parser)
    shared.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    from dalle_fast.regions import Box
    from dalle_fast.sampling import default_wave

    shared.check_drawing(arguments)
    settings = shared.settings(arguments)
    source = inputs.read_picture(arguments.picture, arguments.candidate)
    with shared.output_folder(arguments.out) as out:
        pipeline = shared.load_pipeline(arguments)
        size = getattr(source, "size", None)  # of a picture in pixels; of tokens it is a method
        size = pipeline.size if callable(size) or size is None else size
        boxes = [Box.parse(text, pipeline.config.height, pipeline.config.width, size) for text in arguments.box]
        wave = arguments.wave or default_wave(pipeline.engine, arguments.n, settings)

        def pictures(on_token: drawing.OnToken) -> Iterator[Picture]:
            return pipeline.regenerate(
                source,
                arguments.caption,
                boxes,
                arguments.n,
                settings,
                wave=wave,
                first=arguments.first,
                truncate=arguments.truncate,
                score_known=arguments.rank in ("likelihood", "both"),
                on_token=on_token,
            )

        more = {"source": str(arguments.picture), "boxes": [list(astuple(box)) for box in boxes]}
        return drawing.draw(pipeline, arguments, out, wave, pictures, **more)
