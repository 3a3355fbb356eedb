"""Trains the bundled dVAE on crops of rendered scenes; resumes from its checkpoint.

`python -m examples.scenes.train_dvae --help`.

The paper's objective (Gumbel-softmax relaxation, temperature annealed to 1/16, logit-Laplace likelihood) with two
additions: a squared-error term, and a cross-entropy that ties the encoder to steady_codes.py. In the last quarter of the
steps the decoder learns alone, from those codes themselves, which are what the transformer draws; cells that are not plain
then count more, as the decoder has to find their colours in other cells, and every other picture is of pieces.py, which
have all forms in all colours. There is no KL term: it would reward using all codes equally often, and here a plain
background should cost nothing.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dalle_fast.images import DVAE, DVAEConfig, logit_laplace_loss, map_pixels, unmap_pixels

from . import pieces, render
from .data import SHARES, working_type
from .grammar import FAMILIES, sample_scene
from .steady_codes import Codebook, to_tensor

CROP = 10  # cells a side
ALONE = 0.75  # of the steps, after which the decoder learns alone
FORM_WEIGHT = 5.0  # of the squared error in cells that are not plain, from then on


def scene_layout(rng: np.random.Generator) -> render.Layout:
    family = FAMILIES[int(rng.choice(len(FAMILIES), p=SHARES))]
    return render.layout(sample_scene(rng, family), rng)


class Pictures(NamedTuple):
    """Rendered pictures [n, 3, 256, 256] uint8, their codes [n, 32, 32], and per picture the cells that are not plain."""

    pictures: torch.Tensor
    codes: torch.Tensor
    busy: list[torch.Tensor]


def rendered(
    count: int, codebook: Codebook, seed: int, layouts: Sequence[Callable[[np.random.Generator], render.Layout]]
) -> Pictures:
    """`count` pictures, by each of `layouts` in turn."""
    rng = np.random.default_rng(seed)
    pictures, codes, busy = [], [], []
    for i in tqdm(range(count), desc="pictures", disable=None):
        background, placed = layouts[i % len(layouts)](rng)
        picture = render.finish(background, placed, rng)
        label = torch.from_numpy(codebook.label(background, placed))
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        codes.append(label.view(32, 32))
        busy.append((label >= len(codebook.colours)).nonzero()[:, 0])
    return Pictures(torch.stack(pictures), torch.stack(codes), busy)


def batch_of(data: Pictures, step: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops [size, 3, 80, 80] and codes [size, 10, 10] of one step; three in four contain a cell that is not plain."""
    rng = np.random.default_rng((seed, step))
    xs, ys = [], []
    for _ in range(size):
        i = int(rng.integers(len(data.pictures)))
        r, c = (int(v) for v in rng.integers(0, 33 - CROP, 2))
        if rng.random() < 0.75 and len(data.busy[i]):
            cell = int(data.busy[i][int(rng.integers(len(data.busy[i])))])
            r, c = (int(np.clip(v - rng.integers(0, CROP), 0, 32 - CROP)) for v in divmod(cell, 32))
        xs.append(data.pictures[i, :, 8 * r : 8 * (r + CROP), 8 * c : 8 * (c + CROP)])
        ys.append(data.codes[i, r : r + CROP, c : c + CROP])
    return torch.stack(xs).float() / 255, torch.stack(ys)


def loss_of(
    model: DVAE, x: torch.Tensor, codes: torch.Tensor, plain: int, progress: float, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss at `progress` in 0..1 through training, and figures to show. Codes below `plain` are plain colours."""
    if progress >= ALONE:
        relaxed = F.one_hot(codes, model.config.vocab_size).permute(0, 3, 1, 2).float()
        anchor = x.new_zeros(())
        weight = torch.where(codes >= plain, FORM_WEIGHT, 1.0).repeat_interleave(8, 1).repeat_interleave(8, 2)
        figures = {}
    else:
        logits = model.encoder(map_pixels(x).contiguous(memory_format=torch.channels_last)).float()  # [B, V, h, w]
        anchor = F.cross_entropy(logits, codes)
        temperature = math.exp(math.log(1 / 16) * min(1.0, progress / 0.5))
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        relaxed = ((logits + noise) / temperature).softmax(1)
        weight = x.new_ones(())
        figures = {"ce": anchor, "agree": (logits.argmax(1) == codes).float().mean()}
    mean, log_scale = model.decoder(relaxed).float().chunk(2, dim=1)
    likelihood = logit_laplace_loss(torch.cat([mean, log_scale.clamp(min=-2)], 1), x)
    error = (unmap_pixels(torch.sigmoid(mean)) - x).square().mean(1)
    return 0.2 * likelihood + 30 * (error * weight).mean() + anchor, {"psnr": -10 * error.mean().log10(), **figures}


@torch.no_grad()
def quality(model: DVAE, scenes: int, seed: int) -> tuple[float, float]:
    """Mean PSNR in dB of reconstructions of fresh whole scenes, and different codes a scene."""
    rng = np.random.default_rng(seed)
    psnr, distinct = [], []
    for _ in range(scenes):
        x = to_tensor(render.render(sample_scene(rng), rng))[None]
        tokens = model.encode(x)
        psnr.append(-10 * float((model.decode(tokens) - x).square().mean().log10()))
        distinct.append(len(tokens.unique()))
    return float(np.mean(psnr)), float(np.mean(distinct))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of dvae.json and dvae.safetensors; the checkpoint is beside"
    )
    parser.add_argument(
        "--init", type=Path, help="folder of a dVAE: its decoder goes on alone, from the last quarter's start"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=3000, help="to render and learn from")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="at first; it falls to 0 in the second half, with --init from half of it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    codebook = Codebook.load()
    print(f"{len(codebook.colours)} plain colours, {len(codebook.forms)} forms", flush=True)
    model = DVAE.load(args.init) if args.init else DVAE(DVAEConfig(len(codebook), args.hidden, 1, 128))
    model.to(args.device, torch.float32).requires_grad_(True)
    average = {name: p.detach().clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    first, checkpoint = 0, args.out / "dvae-training.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, average = state["step"], state["average"]
    began = ALONE if args.init else 0.0

    @lru_cache(maxsize=1)
    def pictures(alone: bool) -> Pictures:
        layouts = (scene_layout, pieces.layout) if alone else (scene_layout,)
        return rendered(args.pictures, codebook, args.seed, layouts)

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="dVAE", mininterval=5)
    for step in bar:
        progress = began + (1 - began) * step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200, 2 * (1 - progress))
        x, codes = (y.to(args.device) for y in batch_of(pictures(progress >= ALONE), step, args.batch, args.seed))
        noise = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        with torch.autocast(args.device, torch.bfloat16, working_type(args.device) == torch.bfloat16):
            loss, figures = loss_of(model, x, codes, len(codebook.colours), progress, noise)
        optimizer.zero_grad()  # with no gradient at all, AdamW leaves the encoder alone
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - min(0.995, step / (step + 20)))
        if step % 50 == 0:
            bar.set_postfix({name: f"{float(value.detach()):.3f}" for name, value in figures.items()})
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "average": average,
                },
                checkpoint.with_suffix(".tmp"),
            )
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            final = DVAE(model.config)
            final.load_state_dict({name: value.cpu() for name, value in average.items()})
            final.save(args.out, torch.float16)
            psnr, distinct = quality(DVAE.load(args.out), 12, 10**6)
            tqdm.write(f"step {step + 1}: {psnr:.2f} dB on whole scenes, {distinct:.0f} different codes a scene")


if __name__ == "__main__":
    main()
