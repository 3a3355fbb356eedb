"""`dalle-fast classify`: which of several captions fits a picture best, by CLIP, without training (zero-shot)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_fast.commands import options as shared

HELP = "which of several captions fits a picture best"


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("picture", type=Path)
    option("captions", nargs="+", metavar="caption")
    option(
        "--template",
        action="append",
        metavar="TEXT",
        help="a sentence with {} for the caption, such as 'a photo of a {}'; several are averaged ({} alone)",
    )
    shared.add_clip(parser)


def run(arguments: argparse.Namespace) -> int:
    from dalle_fast.pipeline import check_captions, load_ranker
    from dalle_fast.records import read_image

    templates = arguments.template or ["{}"]
    check_captions(arguments.captions, templates)
    image = read_image(arguments.picture)
    found = load_ranker(arguments.model, arguments.clip).classify(image, arguments.captions, templates).tolist()
    for share, caption in sorted(zip(found, arguments.captions, strict=True), key=lambda pair: -pair[0]):
        print(f"{share:7.2%}  {caption}")
    return 0
