"""The code that each 8x8 cell of a training scene should get, so that a transformer has little to guess.

A plain cell's code says its colour. Any other cell's code says its *form* only, whatever the colours on its two sides:
forms are k-means centres of the same scenes painted in one canonical colour. The decoder sees neighbouring cells and
fills in the colours. So a red triangle's slanted edge has the codes of every triangle's edge, and colour combinations
never seen in training need no code of their own. 1455 different forms occur in the grammar; a vocabulary of 512 keeps
471 of them apart.

The codebook is a file beside this one, codebook.npz: its numbers are what the dVAE and the transformer were trained with
and must outlive any change of the layouts. `Codebook.build` made it from the layouts of that time; from today's it makes
another, for which the dVAE and the transformer would have to be trained anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from . import render
from .grammar import COLOURS, GARMENTS, sample_scene

_CANONICAL = {"background": (158, 204, 255), "fill": (255, 0, 0)}
CODEBOOK = Path(__file__).with_name("codebook.npz")
_FLAT = 8 / 255  # a cell whose channels vary less than this is plain


def cells(picture: np.ndarray) -> np.ndarray:
    """[256, 256, 3] -> [1024, 64, 3]: the pixels of each cell, in raster order."""
    side = picture.shape[0] // render.CELL
    return (
        picture.reshape(side, render.CELL, side, render.CELL, 3).swapaxes(1, 2).reshape(side * side, render.CELL**2, 3)
    )


def plain_colours() -> list[tuple[float, ...]]:
    """Every colour of the palette in every shade, the backgrounds, black and white, 0..255. No beak fills a cell."""
    tones = [tuple(min(shade * c, 255.0) for c in render.PALETTE[name]) for name in COLOURS for shade in render.SHADES]
    grounds = [render.BACKGROUNDS[name] for name in render.BACKGROUND_NAMES]
    return [*tones, *grounds, render.FIXED["black"], render.FIXED["paper"]]


def canonical(placed: list[render.Placed]) -> np.ndarray:
    """The scene painted in the canonical colours, whatever its own."""
    plain = [part._replace(colours=dict.fromkeys(part.colours, "canonical"), shade=1.0) for part in placed]
    return render.paint("canonical", plain)


render.PALETTE["canonical"] = _CANONICAL["fill"]
render.BACKGROUNDS["canonical"] = _CANONICAL["background"]


class Codebook:
    """Colours of plain cells [n, 3], then forms [vocab - n, 192]."""

    def __init__(self, colours: np.ndarray, forms: np.ndarray) -> None:
        self.colours, self.forms = colours, forms
        self._templates: dict[int, tuple] = {}

    @classmethod
    def build(cls, vocab: int, scenes: int = 1500, seed: int = 7) -> Codebook:
        """Every plain colour, and the forms that occur in `scenes` training scenes. Deterministic."""
        rng = np.random.default_rng(seed)
        counts: dict[bytes, int] = {}
        for _ in range(scenes):
            _, placed = render.layout(sample_scene(rng), rng)
            form = cells(canonical(placed))
            flat = np.ptp(form, axis=1).max(-1) <= _FLAT
            for patch in (form[~flat] * 255 + 0.5).astype(np.uint8):
                counts[patch.tobytes()] = counts.get(patch.tobytes(), 0) + 1
        patches = np.stack([np.frombuffer(key, np.uint8) for key in sorted(counts)]).astype(np.float32) / 255
        weight = np.sqrt([counts[key] for key in sorted(counts)])
        table = np.array(plain_colours(), np.float32) / 255
        return cls(table, _k_means(patches, weight, vocab - len(table), rng))

    @classmethod
    def load(cls, path: Path = CODEBOOK) -> Codebook:
        with np.load(path) as file:
            return cls(file["colours"].astype(np.float32) / 255, file["forms"].astype(np.float32))

    def save(self, path: Path) -> None:
        """Colours in 0..255 and forms in 0..1, at half precision."""
        np.savez_compressed(path, colours=(self.colours * 255).astype(np.float16), forms=self.forms.astype(np.float16))

    def __len__(self) -> int:
        return len(self.colours) + len(self.forms)

    def label(self, background: str, placed: list[render.Placed]) -> np.ndarray:
        """[1024] int64 codes of a scene as laid out by render.layout, whose sprites never share a cell."""
        side = render.SIZE // render.CELL
        codes = np.full((side, side), self._plain(np.asarray(render.BACKGROUNDS[background]) / 255))
        for part in placed:
            forms, layers = self._template(part.sprite)
            region = codes[part.row : part.row + forms.shape[0], part.column : part.column + forms.shape[1]]
            np.copyto(region, forms, where=forms >= 0)
            for i in np.unique(layers[layers >= 0]):
                layer = part.sprite[i]
                fixed = layer.paint in render.FIXED
                rgb = (
                    np.asarray(render.FIXED[layer.paint] if fixed else render.PALETTE[part.colours[layer.paint]]) / 255
                )
                region[layers == i] = self._plain((rgb * (1.0 if fixed else part.shade * layer.shade)).clip(0, 1))
        return codes.reshape(-1)

    def _plain(self, rgb: np.ndarray) -> int:
        return int(((self.colours - rgb) ** 2).sum(1).argmin())

    def _template(self, sprite: tuple[render.Layer, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Per cell of a sprite: its form's code or -1, and if plain the index of the layer on top, -1 for the background."""
        if id(sprite) not in self._templates:  # sprites are cached for good, so an id stays theirs
            height, width = (n // render.CELL for n in sprite[0].mask.shape)
            form = cells(
                canonical([render.Placed(sprite, 0, 0, {"fill": "red", **dict.fromkeys(GARMENTS, "red")}, 1.0)])
            )
            flat = np.ptp(form, axis=1).max(-1) <= _FLAT
            forms = np.full(len(form), -1)
            forms[~flat] = len(self.colours) + _nearest(form[~flat].reshape(-1, self.forms.shape[1]), self.forms)
            half = render.CELL // 2
            layers = np.full((height, width), -1)
            for i, layer in enumerate(sprite):
                layers[layer.mask[half :: render.CELL, half :: render.CELL] > 0.5] = i
            side = render.SIZE // render.CELL
            forms = forms.reshape(side, side)[:height, :width]
            layers[forms >= 0] = -1
            self._templates[id(sprite)] = (sprite, forms, layers)
        return self._templates[id(sprite)][1:]


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((centres**2).sum(1) - 2 * x @ centres.T).argmin(1)


def _k_means(x: np.ndarray, weight: np.ndarray, count: int, rng: np.random.Generator, rounds: int = 30) -> np.ndarray:
    """Weighted k-means, centres first chosen far from each other (k-means++)."""
    centres = x[[int(np.argmax(weight))]]
    distance = ((x - centres[0]) ** 2).sum(1)
    while len(centres) < count:
        chance = distance * weight
        centres = np.concatenate([centres, x[[rng.choice(len(x), p=chance / chance.sum())]]])
        distance = np.minimum(distance, ((x - centres[-1]) ** 2).sum(1))
    for _ in range(rounds):
        nearest = _nearest(x, centres)
        for i in np.unique(nearest):
            mine = nearest == i
            centres[i] = np.average(x[mine], axis=0, weights=weight[mine])
    return centres


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """[256, 256, 3] uint8 -> [3, 256, 256] float32 in 0..1."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255
