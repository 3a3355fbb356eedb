"""`dalle-fast info`: what is installed, what can run here, and why not the rest."""

from __future__ import annotations

import argparse

HELP = "what is installed, what can run here, and why not the rest"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME", help="size, weights and cache of a model preset instead")


def run(arguments: argparse.Namespace) -> int:
    from dalle_fast import env

    print(env.describe() if arguments.preset is None else env.describe_preset(arguments.preset))
    return 0
