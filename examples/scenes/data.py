"""Training examples: scenes as image codes, captions as text ids, drawn afresh for every step."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset

from dalle_fast import onednn

from . import render
from .grammar import FAMILIES, Scene, captions, sample_caption, sample_scene
from .steady_codes import Codebook

TEXT_VOCAB = 256
SHARES = (0.6, 0.15, 0.25)  # of FAMILIES in training: blocks take the most learning, clocks the least


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that training may show. Blocks with no square and no cube get a second draw half of the time: that those are
    as high as they are wide is what the transformer learns last.
    """
    family = FAMILIES[int(rng.choice(len(FAMILIES), p=SHARES))]
    scene = sample_scene(rng, family)
    if family == "blocks" and not {"square", "cube"} & {block.shape for block in scene.blocks} and rng.random() < 0.5:
        scene = sample_scene(rng, family)
    return scene


def train_tokenizer(path: Path, scenes: int = 4000, seed: int = 3) -> Tokenizer:
    """A BPE of the grammar's captions, lower-cased; id 0 is the pad. Every word of the grammar becomes one token."""
    rng = np.random.default_rng(seed)
    lines = [line for _ in range(scenes) for line in captions(sample_scene(rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789',.-!?")
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=TEXT_VOCAB, special_tokens=["[PAD]"], initial_alphabet=letters, show_progress=False
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


class Batches(Dataset):
    """Item i is the batch of step i: text [B, caption_len] int64, codes [B, 1024] int64. Depends on the seed and i alone.

    A tenth of the captions is dropped (all pads), so that guidance has something to steer away from.
    """

    def __init__(
        self, tokenizer: Tokenizer, codebook: Codebook, size: int, caption_len: int, seed: int, steps: int
    ) -> None:
        self.tokenizer, self.codebook, self.size = tokenizer, codebook, size
        self.caption_len, self.seed, self.steps = caption_len, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, step))
        text = torch.zeros(self.size, self.caption_len, dtype=torch.int64)
        codes = []
        for i in range(self.size):
            scene = training_scene(rng)
            caption = sample_caption(scene, rng)
            codes.append(torch.from_numpy(self.codebook.label(*render.layout(scene, rng))))
            if rng.random() >= 0.1:
                ids = self.tokenizer.encode(caption).ids
                text[i, : len(ids)] = torch.tensor(ids)
        return text, torch.stack(codes)


def working_type(device: str) -> torch.dtype:
    """What training computes in, beside float32 weights: bfloat16, but float32 on a CPU without instructions for it, where
    PyTorch's products in bfloat16 take a hundred times as long."""
    slow = torch.device(device).type == "cpu" and onednn.why_not(torch.empty(0, dtype=torch.bfloat16))
    return torch.float32 if slow else torch.bfloat16


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
