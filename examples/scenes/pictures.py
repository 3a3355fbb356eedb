"""Draws the README's pictures anew: docs/pictures, their commands in the README, and the tokens that tests hold them to.

`python -m examples.scenes.pictures`, after the bundled weights or the settings below have changed. Look at what it drew.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle_fast.pipeline import Pipeline
from dalle_fast.regions import Box
from dalle_fast.sampling import SamplingSettings
from dalle_fast.weights import write_text

from . import checker

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER, TOKENS, README = ROOT / "docs/pictures", ROOT / "tests/demo_pictures.json", ROOT / "README.md"
SETTINGS = SamplingSettings(temperature=0.6, top_p=0.95)  # what suits the bundled weights; the Makefile has them too
OPTIONS = f"--temperature {SETTINGS.temperature:g} --top-p {SETTINGS.top_p:g}"
# File, caption, seed. CLIP's first choice of eight is kept.
SHOWN = (
    ("penguin", "a penguin wearing a red hat, yellow gloves, a blue shirt and green pants", 0),
    ("clock", "a pentagon-shaped green clock showing three o'clock", 0),
    ("blocks", "a blue square on top of a red square on top of a green square", 0),
)
REDRAWN = "a penguin wearing a red hat, yellow gloves, a blue shirt and {} pants"  # from its belt down
PANTS = ("orange", "purple", "red", "yellow")


def draw(pipeline: Pipeline, name: str, caption: str, seed: int) -> dict:
    """Save the picture; its caption, command, settings, candidate and tokens."""
    settings = dataclasses.replace(SETTINGS, seed=seed)
    best = pipeline.rank(list(pipeline.sample(caption, 8, settings)), keep=1)[0]
    best.image.save(FOLDER / f"{name}.png")
    return {
        "caption": caption,
        "command": f'dalle-fast sample "{caption}" -n 8 --keep 1 --seed {seed} {OPTIONS} --dtype float32',
        "settings": dataclasses.asdict(settings),
        "candidate": best.candidate,
        "tokens": best.tokens.tolist(),
    }


def redraw(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    """The penguin beside itself with other pants, in one strip."""
    strip = [Image.open(FOLDER / "penguin.png")]
    for colour in PANTS:
        drawn = pipeline.regenerate(tokens, REDRAWN.format(colour), [Box(0, 20, 32, 32)], 4, SETTINGS)
        best = pipeline.rank(list(drawn), keep=1)[0]
        seen = checker.read(np.asarray(best.image)).garments
        print(f"{colour} pants: the checker sees {seen}")
        strip.append(best.image)
    sheet = Image.new("RGB", (260 * len(strip) - 4, 256), "white")
    for i, image in enumerate(strip):
        sheet.paste(image, (260 * i, 0))
    sheet.save(FOLDER / "region.png")


def main() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="float32")
    drawn = [draw(pipeline, *row) for row in SHOWN]
    redraw(pipeline, torch.tensor(drawn[0]["tokens"]))
    text = re.sub(r"(?<=\d,)\s+(?=\d)", " ", json.dumps(drawn, indent=1))  # the tokens on one line
    write_text(TOKENS, text + "\n")
    commands = iter([picture["command"] for picture in drawn])
    shown = r'^dalle-fast sample ".*" -n 8 --keep 1 .*$'
    write_text(README, re.sub(shown, lambda _: next(commands), README.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
