"""How well a dVAE keeps scenes, and draws them from the codes that they should have, which a perfect transformer would draw.

`python -m examples.scenes.evaluate_dvae --help`. The scenes are those of evaluate.py's captions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle_fast.images import DVAE
from dalle_fast.pipeline import DEMO
from dalle_fast.weights import write_text

from . import checker, render
from .evaluate import CAPTIONS, Question, hashes, questions
from .grammar import FAMILIES
from .steady_codes import Codebook, to_tensor


def is_exact(picture: torch.Tensor, question: Question) -> bool:
    """Whether the checker finds every attribute in a picture [3, 256, 256] in 0..1."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return all(checker.check(pixels, question.scene).values())


@torch.inference_mode()
def answer(dvae: DVAE, codebook: Codebook, question: Question, rng: np.random.Generator) -> dict[str, Any]:
    """Of one scene: PSNR in dB of its reconstruction, and whether that and its codes decoded are exact."""
    background, placed = render.layout(question.scene, rng)
    pixels = to_tensor(render.finish(background, placed, rng))
    again = dvae.decode(dvae.encode(pixels[None]))[0]
    codes = torch.from_numpy(codebook.label(background, placed)).view(1, 32, 32)
    return {
        "psnr": -10 * float((again - pixels).square().mean().log10()),
        "exact": is_exact(again, question),
        "exact_from_codes": is_exact(dvae.decode(codes)[0], question),
    }


def evaluate(dvae: DVAE, asked: list[Question], seed: int = 0) -> list[dict[str, Any]]:
    """Means by family and by held_out, then of all."""
    rng, codebook = np.random.default_rng(seed), Codebook.load()
    answers = [(q, answer(dvae, codebook, q, rng)) for q in tqdm(asked, unit=" scenes", disable=None)]
    rows = []
    for family in (*FAMILIES, "all"):
        for held_out in (False, True):
            mine = [a for q, a in answers if q.held_out == held_out and family in (q.scene.family, "all")]
            if mine:
                means = {name: float(np.mean([a[name] for a in mine])) for name in mine[0]}
                rows.append({"family": family, "held_out": held_out, "scenes": len(mine), **means})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| family | combinations | scenes | PSNR | exact | its codes decoded: exact |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        kind = "held out" if row["held_out"] else "seen in training"
        measured = f"{row['psnr']:.1f} dB | {row['exact']:.1%} | {row['exact_from_codes']:.1%}"
        lines.append(f"| {row['family']} | {kind} | {row['scenes']} | {measured} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of dvae.json (the bundled one)")
    parser.add_argument("--scenes", type=int, default=CAPTIONS, help="how many of the 600 (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the rows go, e.g. bench/results/scenes-dvae.json")
    args = parser.parse_args()
    asked = questions()[: args.scenes]
    rows = evaluate(DVAE.load(args.model), asked)
    print(table(rows))
    if args.json:
        what = "scenes: what the dVAE keeps of them, and what it makes of the codes that they should have"
        whole = {"what": what, "weights": hashes(args.model), "scenes": len(asked), "rows": rows}
        write_text(args.json, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
