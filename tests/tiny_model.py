"""A complete model folder that draws in milliseconds: random weights, 16 caption tokens, 8 x 8 cells, 64 x 64 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dalle_fast.config import ModelConfig
from dalle_fast.images import DVAE, DVAEConfig
from dalle_fast.model import DalleModel

WORDS = ("<pad>", "<unk>", "a", "red", "blue", "cube", "on", "circle")


def write_tiny_model(folder: Path) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and the dVAE's files, and returns the folder."""
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny")
    model = DalleModel(config)
    for parameter in model.parameters():  # large enough that the caption decides what is drawn
        torch.nn.init.normal_(parameter, std=0.2)
    model.save(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    DVAE(DVAEConfig(vocab_size=config.image_vocab, hidden=8, blocks_per_group=1, decoder_init=8)).save(folder)
    return folder
