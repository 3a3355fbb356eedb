"""Pictures that a trained model draws for training captions, judged by the checker: what CLIP must learn to tell apart.

`python -m examples.scenes.draw_for_clip --help`. Held-out combinations are not asked for. A run that was interrupted goes
on with the first caption that is not in the file yet.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dalle_fast.pipeline import DEMO, Pipeline
from dalle_fast.sampling import SamplingSettings

from . import checker
from .data import SHARES
from .grammar import FAMILIES, Scene, sample_caption, sample_scene

SAVE_EVERY = 50  # captions


@dataclass(frozen=True)
class Drawn:
    """A scene and what the model drew for it: pictures [n, 256, 256, 3] uint8, and which of them show it exactly."""

    scene: Scene
    pictures: np.ndarray
    exact: np.ndarray


def question(i: int, seed: int = 77, shares: Sequence[float] = SHARES) -> tuple[Scene, str]:
    """The scene and the caption number i; families in the given shares."""
    rng = np.random.default_rng((seed, i))
    scene = sample_scene(rng, FAMILIES[int(rng.choice(len(FAMILIES), p=shares))])
    return scene, sample_caption(scene, rng)


def read(path: Path, seed: int | None = None, shares: Sequence[float] | None = None) -> list[Drawn]:
    """What `main` wrote. Raises ValueError if the captions were others then: a change of the grammar, or another seed or
    other shares than those given."""
    with np.load(path) as file:
        pictures, exact, captions = file["pictures"], file["exact"], file["captions"]
        seed = int(file["seed"]) if seed is None else seed
        shares = file["shares"].tolist() if shares is None else shares
    asked = [question(i, seed, shares) for i in range(len(captions))]
    if [caption for _, caption in asked] != captions.tolist():
        raise ValueError(f"got {path} with other captions than these, expected it to be drawn anew")
    return [Drawn(scene, p, e) for (scene, _), p, e in zip(asked, pictures, exact, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="model folder (the bundled one)")
    parser.add_argument("--out", type=Path, required=True, help="the file, e.g. out/drawn.npz")
    parser.add_argument("--captions", type=int, default=600)
    parser.add_argument("--n", type=int, default=6, help="pictures a caption (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.9, help="warmer than usual, to see more mistakes")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=77, help="of the captions and of the pictures")
    parser.add_argument(
        "--shares", type=float, nargs=len(FAMILIES), default=SHARES, help=f"of {', '.join(FAMILIES)} (as in training)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if min(args.shares) < 0 or abs(sum(args.shares) - 1) > 1e-6:
        parser.error(f"got --shares {args.shares}, expected shares that add up to 1")
    drawn = read(args.out, args.seed, args.shares) if args.out.exists() else []
    pictures, exact = [d.pictures for d in drawn], [d.exact for d in drawn]
    pipeline = Pipeline.load(args.model, device=args.device, dtype=args.dtype)
    for i in tqdm(range(len(drawn), args.captions), initial=len(drawn), total=args.captions, unit=" captions"):
        scene, caption = question(i, args.seed, args.shares)
        settings = SamplingSettings(args.temperature, guidance_scale=args.guidance, seed=args.seed * 10**6 + i)
        drawing = np.stack([np.asarray(p.image) for p in pipeline.sample(caption, args.n, settings)])
        pictures.append(drawing)
        exact.append(np.array([all(checker.check(picture, scene).values()) for picture in drawing]))
        if (i + 1) % SAVE_EVERY == 0 or i + 1 == args.captions:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            part = args.out.with_suffix(".tmp.npz")
            captions = np.array([question(j, args.seed, args.shares)[1] for j in range(i + 1)])
            asked = {"captions": captions, "seed": args.seed, "shares": args.shares}
            np.savez_compressed(part, pictures=np.stack(pictures), exact=np.stack(exact), **asked)
            os.replace(part, args.out)
    print(f"wrote {args.out}: {len(exact)} captions, {np.mean(exact):.1%} of their pictures exact")


if __name__ == "__main__":
    main()
