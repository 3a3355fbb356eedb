"""What several commands ask for: a model, how to draw, how to rank, where to write."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_fast.pipeline import Pipeline
    from dalle_fast.sampling import SamplingSettings

RANKS = ("clip", "likelihood", "both")


def add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the bundled model by default")
    parser.add_argument("--clip", metavar="FOLDER", help="the CLIP model, if the model's folder brings none")


def add_model(parser: argparse.ArgumentParser) -> None:
    add_clip(parser)
    option = parser.add_argument
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (%(default)s)")
    option("--dtype", default="auto", help="auto, float32, bfloat16, float16, int8, int4 (%(default)s)")
    option("--backend", default="auto", help="auto, or one that `dalle-fast info` lists (%(default)s)")
    option(
        "--fp8-tails",
        action="store_true",
        help="the longest caches in 8 bits: nearly twice the pictures at a time on a GPU",
    )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("-n", "--n", type=int, default=8, help="pictures (%(default)s)")
    option("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where they go (%(default)s)")
    option("--seed", type=int, default=0, help="candidate i of a seed is one picture, whatever -n (%(default)s)")
    option("--first", type=int, default=0, metavar="I", help="number of the first picture, to go on (%(default)s)")
    option("--temperature", type=float, default=1.0, help="above 0 (%(default)s)")
    option("--top-k", type=int, default=0, help="keep the k most likely tokens; 0: all (%(default)s)")
    option("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this share (%(default)s)")
    option("--guidance", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1: none (%(default)s)")
    option("--truncate", action="store_true", help="cut a caption that is too long")
    option("--rank", choices=RANKS, help="put the best first, by CLIP, by the model's own likelihood or by both")
    option("--keep", type=int, metavar="K", help="only the best K on the sheet (ranked by clip unless --rank says)")
    option("--wave", type=int, help="pictures drawn at a time (else 8, or on a GPU what fits its memory)")
    option("--preview", action="store_true", help="write preview.png, the pictures that grow, after each row")


def check_drawing(arguments: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range; --keep ranks by CLIP where nothing else is asked for."""
    for name, least, most in (("n", 1, 10**7), ("first", 0, 2**62), ("wave", 1, 10**5), ("keep", 1, 10**7)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"got {name}={value}, expected at least {least}")
        if value is not None and value > most:
            raise ValueError(f"got {name}={value}, expected at most {most}")
    if arguments.keep is not None:
        if arguments.keep > arguments.n:
            raise ValueError(f"got keep={arguments.keep}, expected at most n={arguments.n}")
        arguments.rank = arguments.rank or "clip"


def settings(arguments: argparse.Namespace) -> SamplingSettings:
    from dalle_fast.sampling import SamplingSettings

    return SamplingSettings(arguments.temperature, arguments.top_k, arguments.top_p, arguments.guidance, arguments.seed)


def load_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """The model that the options name, its CLIP model included if it is asked to rank by it."""
    from dalle_fast.pipeline import Pipeline

    pipeline = Pipeline.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        clip=arguments.clip,
        fp8_tails=arguments.fp8_tails,
    )
    if getattr(arguments, "rank", None) in ("clip", "both"):
        pipeline.ranker  # noqa: B018  (now, and not after all pictures are drawn)
    return pipeline


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Makes the folder, checks that it can be written, and removes what it made if nothing was put there.

    Raises OSError, naming the path, if it can't.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".dalle-fast-writable"
        probe.touch()
        probe.unlink()
        yield path
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
