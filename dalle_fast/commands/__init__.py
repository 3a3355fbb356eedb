"""The commands of `dalle-fast`, one a file: `HELP`, `options(parser)` and `run(arguments) -> exit code`.

Modules import torch and what needs it inside `run`, so that `dalle-fast --help` answers at once.
"""
