"""`dalle-fast sample`: pictures of a caption, or of many captions as a job that can be killed and resumed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dalle_fast.commands import drawing, inputs
from dalle_fast.commands import options as shared

if TYPE_CHECKING:
    from dalle_fast.pipeline import Picture

HELP = "draw pictures of a caption"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("caption", nargs="?", help="what to draw")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="captions instead, one a line (-: standard input); the same command again goes on where it was stopped",
    )
    shared.add_drawing(parser)
    shared.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    shared.check_drawing(arguments)
    if (arguments.caption is None) == (arguments.prompts is None):
        raise ValueError("got a caption and --prompts" if arguments.prompts else "got no caption, expected one")
    return one(arguments) if arguments.prompts is None else many(arguments)


def one(arguments: argparse.Namespace) -> int:
    from dalle_fast.sampling import default_wave

    settings = shared.settings(arguments)
    with shared.output_folder(arguments.out) as out:
        pipeline = shared.load_pipeline(arguments)
        wave = arguments.wave or default_wave(pipeline.engine, arguments.n, settings)

        def pictures(on_token: drawing.OnToken) -> Iterator[Picture]:
            return pipeline.sample(
                arguments.caption,
                arguments.n,
                settings,
                wave=wave,
                first=arguments.first,
                truncate=arguments.truncate,
                on_token=on_token,
            )

        return drawing.draw(pipeline, arguments, out, wave, pictures)


def many(arguments: argparse.Namespace) -> int:
    from dalle_fast import jobs

    settings = shared.settings(arguments)
    prompts = inputs.read_prompts(arguments.prompts)
    with shared.output_folder(arguments.out) as out:
        pipeline = shared.load_pipeline(arguments)
        job = jobs.Job(
            pipeline,
            prompts,
            out,
            arguments.n,
            settings,
            wave=arguments.wave,
            first=arguments.first,
            truncate=arguments.truncate,
            by=arguments.rank,
            keep=arguments.keep,
        )
        done = 0
        with job, drawing.Watch(pipeline, arguments, out, arguments.n * len(prompts)) as watch:
            try:
                for _ in job.run(on_token=watch.on_token, on_skip=watch.on_skip, command=arguments.line):
                    done += 1
            except KeyboardInterrupt:
                pass
    print(f"{done} of {len(prompts)} captions, {arguments.n} pictures each: {arguments.out}")
    if done < len(prompts):
        print("the same command goes on")
        return drawing.INTERRUPTED
    return 0
