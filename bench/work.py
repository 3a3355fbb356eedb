"""The fewest bytes and operations that a case can do with: each weight and each key that the mask allows, once."""

from __future__ import annotations

from typing import NamedTuple

from dalle_fast.config import ModelConfig
from dalle_fast.masks import Mask

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4 + 16 / 128}  # a scale a group


class Work(NamedTuple):
    bytes: float
    flops: float


def weights(config: ModelConfig) -> int:
    """Weights that a step reads: the blocks' matrices and the image rows of the head."""
    inner = config.heads * config.head_dim
    up = config.hidden * (2 if config.activation == "geglu" else 1)
    return config.layers * config.dim * (4 * inner + up + config.hidden) + config.image_vocab * config.dim


def neighbours(config: ModelConfig) -> float:
    """Image keys that a step reads for a candidate, summed over the layers, averaged over the picture."""
    return float(sum(mask.neighbours()[1].mean() for mask in config.masks()))


def step(config: ModelConfig, batch: int, dtype: str) -> Work:
    """One token for each of `batch` candidates of one caption. Keys and values are read in at least 16 bits."""
    cell = 2 * config.heads * config.head_dim  # a key and a value
    text, image = config.layers * config.layout.text_len * cell, neighbours(config) * cell
    moved = weights(config) * BITS[dtype] / 8 + (text + batch * image) * max(16, BITS[dtype]) / 8
    return Work(moved, 2 * batch * (weights(config) + text + image))


def attention(mask: Mask, batch: int, heads: int, dim: int, dtype: str, backward: bool = False) -> Work:
    """A whole sequence: two products over the allowed pairs forward, five more backward."""
    pairs = float(mask.dense().sum())
    tensors, products = (12, 7) if backward else (4, 2)  # q, k, v, out, and all again plus their gradients
    size = batch * heads * mask.layout.total * dim * BITS[dtype] / 8
    return Work(tensors * size, 2 * products * batch * heads * pairs * dim)


def decode(mask: Mask, batch: int, heads: int, dim: int, dtype: str, cell: int) -> Work:
    """One cell of `batch` candidates of one caption: the text once, each candidate's neighbours, q, k, v and out."""
    keys = mask.layout.text_len + batch * int(mask.neighbours()[1][cell])
    pairs = batch * (mask.layout.text_len + int(mask.neighbours()[1][cell]))
    return Work((2 * keys + 4 * batch) * heads * dim * BITS[dtype] / 8, 4 * pairs * heads * dim)


def tail_bytes(config: ModelConfig, bits: float = 16) -> tuple[int, int]:
    """What a candidate adds to memory: with the tails of dalle_fast, and as a dense cache of all 1280 positions."""
    cell = 2 * config.heads * config.head_dim * bits / 8
    ours = sum(mask.tail_slots() for mask in config.masks()) * cell
    return int(ours), int(config.layers * config.layout.total * cell)
