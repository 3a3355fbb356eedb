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
    word_tokenizer().save(str(folder / "tokenizer.json"))
    DVAE(DVAEConfig(vocab_size=config.image_vocab, hidden=8, blocks_per_group=1, decoder_init=8)).save(folder)
    return folder


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return tokenizer


def write_tiny_clip(folder: Path) -> Path:
    """Writes a CLIP of random weights with the same words into `folder`, and returns it."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 6, "eos_token_id": 7}
    config = CLIPConfig(
        text_config={**side, **ids, "max_position_embeddings": 16},
        vision_config={**side, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "unk_token": "<unk>"}')
    return folder
