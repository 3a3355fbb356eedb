"""`dalle-fast score`: how likely a picture is under a caption, and the caption by itself."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dalle_fast.commands import inputs
from dalle_fast.commands import options as shared

HELP = "log p(picture | caption) and log p(caption)"


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("picture", type=Path, help=inputs.PICTURE)
    option("caption")
    option("--candidate", type=int, metavar="I", help="which picture of a sample.json (the first in it)")
    option("--truncate", action="store_true", help="cut a caption that is too long")
    shared.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    source = inputs.read_picture(arguments.picture, arguments.candidate)
    pipeline = shared.load_pipeline(arguments)
    of_image, of_text = pipeline.score(source, arguments.caption, truncate=arguments.truncate)
    bits = -of_image / pipeline.config.cells / math.log(2)
    print(f"log p(picture | caption) = {of_image:.3f} nats, {bits:.3f} bits a token")
    print(f"log p(caption)           = {of_text:.3f} nats")
    return 0
