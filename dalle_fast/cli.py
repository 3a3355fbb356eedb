"""The command line, `dalle-fast COMMAND`. Bad input costs one line, exit code 2, and leaves no file."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import dalle_fast
from dalle_fast.commands import classify, convert, info, masks, rank, regenerate, sample, score

COMMANDS = {
    "sample": sample,
    "regenerate": regenerate,
    "rank": rank,
    "classify": classify,
    "score": score,
    "convert": convert,
    "info": info,
    "masks": masks,
}
BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: it says what is wrong, and --help says the rest."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser() -> Parser:
    top = Parser(prog="dalle-fast", description="Text in, ranked pictures out: DALL-E 1 at the speed of memory.")
    top.add_argument("--version", action="version", version=dalle_fast.__version__)
    top.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, command in COMMANDS.items():
        below = commands.add_parser(name, help=command.HELP, description=command.__doc__)
        command.options(below)
        below.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    line = shlex.join(["dalle-fast", *(sys.argv[1:] if argv is None else argv)])
    arguments.line = line.encode("utf-8", "replace").decode()  # arguments that are no UTF-8 can't be written
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.debug or not is_bad_input(error):
            raise
        print(f"dalle-fast {arguments.command}: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def is_bad_input(error: Exception) -> bool:
    """Whether the user can mend it. Of RuntimeErrors, which may be bugs: a backend's refusal and missing memory."""
    if not isinstance(error, RuntimeError):
        return True
    import torch

    from dalle_fast.backends import BackendUnavailable

    return isinstance(error, BackendUnavailable | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot write {error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
