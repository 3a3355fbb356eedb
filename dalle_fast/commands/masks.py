"""`dalle-fast masks`: draws the attention patterns and says what each costs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "draw the attention patterns and say what each costs"


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--out", type=Path, default=Path("masks.png"), metavar="FILE", help="the picture (%(default)s)")
    option("--layout", default="256+32x32", metavar="T+HxW", help="what the numbers are for (%(default)s)")
    option("--draw", default="6+4x4", metavar="T+HxW", help="what is drawn (%(default)s)")
    option("--pattern", action="append", metavar="P", help="column, 'conv(kernel=3)' …; all by default")


def run(arguments: argparse.Namespace) -> int:
    from dalle_fast import figures
    from dalle_fast.layout import SequenceLayout
    from dalle_fast.masks import Mask, Pattern
    from dalle_fast.records import write_png

    patterns = [Pattern.parse(text) for text in arguments.pattern or figures.PATTERNS]
    layout, drawn = SequenceLayout.parse(arguments.layout), SequenceLayout.parse(arguments.draw)
    side = min(drawn.height, drawn.width)
    write_png(arguments.out, figures.draw_masks([Mask(figures.fit_kernel(p, side), drawn) for p in patterns]))
    print(figures.mask_table([Mask(pattern, layout) for pattern in patterns]))
    print(f"drawn on {drawn}: {arguments.out}")
    return 0
