"""The command line: `dalle-fast sample | info | masks`. Bad input: one line, exit code 2, and no file left."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import dalle_fast

if TYPE_CHECKING:
    from PIL import Image

    from dalle_fast.pipeline import Picture, Pipeline

BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage: it says what is wrong, and --help says the rest."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    top = Parser(prog="dalle-fast", description="Text in, ranked pictures out: DALL-E 1 at the speed of memory.")
    top.add_argument("--version", action="version", version=dalle_fast.__version__)
    top.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    _sample_options(commands.add_parser("sample", help="draw pictures of a caption"))
    info = commands.add_parser("info", help="what is installed, what can run here, and why not the rest")
    info.add_argument("--preset", metavar="NAME", help="size, weights and cache of a model preset instead")
    info.set_defaults(run=run_info)
    masks = commands.add_parser("masks", help="draw the attention patterns and say what each costs")
    masks.add_argument("--out", type=Path, default=Path("masks.png"), metavar="FILE", help="the picture (%(default)s)")
    masks.add_argument("--layout", default="256+32x32", metavar="T+HxW", help="what the numbers are for (%(default)s)")
    masks.add_argument("--draw", default="6+4x4", metavar="T+HxW", help="what is drawn (%(default)s)")
    masks.add_argument("--pattern", action="append", metavar="P", help="column, 'conv(kernel=3)' …; all by default")
    masks.set_defaults(run=run_masks)
    return top


def _sample_options(sample: argparse.ArgumentParser) -> None:
    def option(*names: str, **how: Any) -> None:
        sample.add_argument(*names, **how)

    option("caption")
    option("-n", type=int, default=8, help="pictures (%(default)s)")
    option("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where they go (%(default)s)")
    option("--seed", type=int, default=0, help="candidate i of a seed is one picture, whatever -n (%(default)s)")
    option("--first", type=int, default=0, metavar="I", help="number of the first picture, to go on (%(default)s)")
    option("--model", type=Path, metavar="FOLDER", help="the bundled model by default")
    option("--temperature", type=float, default=1.0, help="above 0 (%(default)s)")
    option("--top-k", type=int, default=0, help="keep the k most likely tokens; 0: all (%(default)s)")
    option("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this share (%(default)s)")
    option("--guidance", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1: none (%(default)s)")
    option("--truncate", action="store_true", help="cut a caption that is too long")
    option("--rank", action="store_true", help="order the contact sheet by CLIP")
    option("--keep", type=int, metavar="K", help="rank, and put only the best K on the sheet")
    option("--clip", type=Path, metavar="FOLDER", help="the CLIP model to rank with, if the model brings none")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (%(default)s)")
    option("--dtype", default="auto", help="auto, float32, bfloat16, float16, int8, int4 (%(default)s)")
    option("--backend", default="auto", help="auto, or one that `dalle-fast info` lists (%(default)s)")
    option("--wave", type=int, help="pictures drawn at a time (else 8, or on a GPU what fits its memory)")
    sample.set_defaults(run=run_sample)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    arguments.line = shlex.join(["dalle-fast", *(sys.argv[1:] if argv is None else argv)])
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

    return isinstance(error, BackendUnavailable | torch.OutOfMemoryError)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot write {error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def run_info(arguments: argparse.Namespace) -> int:
    from dalle_fast import env

    print(env.describe() if arguments.preset is None else env.describe_preset(arguments.preset))
    return 0


def run_masks(arguments: argparse.Namespace) -> int:
    from dalle_fast import figures
    from dalle_fast.layout import SequenceLayout
    from dalle_fast.masks import Mask, Pattern

    patterns = [Pattern.parse(text) for text in arguments.pattern or figures.PATTERNS]
    layout, drawn = SequenceLayout.parse(arguments.layout), SequenceLayout.parse(arguments.draw)
    side = min(drawn.height, drawn.width)
    _write_png(arguments.out, figures.draw_masks([Mask(figures.fit_kernel(p, side), drawn) for p in patterns]))
    print(figures.mask_table([Mask(pattern, layout) for pattern in patterns]))
    print(f"drawn on {drawn}: {arguments.out}")
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    from dalle_fast.pipeline import Pipeline
    from dalle_fast.sampling import SamplingSettings, default_wave

    for name, least in (("n", 1), ("first", 0), ("wave", 1), ("keep", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"got {name}={value}, expected at least {least}")
    if arguments.keep is not None and arguments.keep > arguments.n:
        raise ValueError(f"got keep={arguments.keep}, expected at most n={arguments.n}")
    settings = SamplingSettings(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.guidance, arguments.seed
    )
    with output_folder(arguments.out) as out:
        pipeline = Pipeline.load(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            backend=arguments.backend,
            clip=arguments.clip,
        )
        ranked = arguments.rank or arguments.keep is not None
        if ranked:
            _load_ranker(pipeline)
        wave = arguments.wave or default_wave(pipeline.engine, arguments.n, settings)
        started = time.perf_counter()
        pictures, finished = [], True
        try:
            for picture in _drawn(pipeline, arguments, settings, wave):
                pictures.append(picture)
                _write_png(out / file_name(picture), picture.image)
        except KeyboardInterrupt:
            finished = False
            for picture in pictures[-1:]:  # perhaps interrupted while it was being written
                _write_png(out / file_name(picture), picture.image)
        if not pictures:
            raise KeyboardInterrupt
        if ranked and finished:
            pictures = pipeline.rank(pictures)
        from dalle_fast.figures import contact_sheet
        from dalle_fast.weights import write_text

        sheet = [picture.image for picture in pictures[: arguments.keep]]
        _write_png(out / "sheet.png", contact_sheet(sheet))
        write_text(out / "sample.json", record(pictures, arguments, wave))
    seconds = time.perf_counter() - started
    print(f"{len(pictures)} of {arguments.n} pictures in {seconds:.1f} s: {arguments.out / 'sheet.png'}")
    return 0 if finished else INTERRUPTED


def _load_ranker(pipeline: Pipeline) -> None:
    try:
        pipeline.ranker  # noqa: B018
    except ImportError:
        raise ValueError("ranking needs the package transformers: pip install 'dalle_fast[clip]'") from None


def _drawn(pipeline: Pipeline, arguments: argparse.Namespace, settings: Any, wave: int) -> Iterator[Picture]:
    """The pictures, with a progress bar over their tokens."""
    from tqdm import tqdm

    pictures = pipeline.sample(
        arguments.caption,
        arguments.n,
        settings,
        wave=wave,
        first=arguments.first,
        truncate=arguments.truncate,
        on_token=lambda j, tokens: bar.update(len(tokens)),
    )
    with tqdm(total=arguments.n * pipeline.config.cells, unit=" tokens", desc="drawing") as bar:
        yield from pictures


def file_name(picture: Picture) -> str:
    return f"{picture.candidate:04d}.png"


def record(pictures: Sequence[Picture], arguments: argparse.Namespace, wave: int) -> str:
    """What sample.json says: all that it takes to draw each picture again, and its tokens; best first if ranked."""
    first = pictures[0]
    entries = [
        {
            "file": file_name(picture),
            "candidate": picture.candidate,
            "log_likelihood": picture.log_likelihood,
            "score": picture.score,
            "tokens": picture.tokens.tolist(),
        }
        for picture in pictures
    ]
    whole = {
        "dalle_fast": dalle_fast.__version__,
        "command": arguments.line,
        "prompt": first.caption,
        "seed": first.settings.seed,
        "settings": asdict(first.settings),
        "model": "bundled" if arguments.model is None else str(arguments.model),
        **{name: getattr(arguments, name) for name in ("device", "dtype", "backend", "truncate")},
        "wave": wave,
        "pictures": entries,
    }
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    return re.sub(r"\[[-\d,\s]+\]", lambda tokens: " ".join(tokens[0].split()), text) + "\n"


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


def _write_png(path: Path, image: Image.Image) -> None:
    from dalle_fast.weights import write_atomically

    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


if __name__ == "__main__":
    sys.exit(main())
