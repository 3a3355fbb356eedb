"""Captions to token ids, with a `tokenizers` file."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dalle_fast.weights import WeightError


class CaptionError(ValueError):
    """A caption that the model cannot be given; the message is one line."""


class CaptionTokenizer:
    """Turns captions into ids of a fixed length, 0 for padding. The file may hold any pipeline of the `tokenizers` library;
    id 0 must be free for padding.

    Raises WeightError if the file can't be read.
    """

    def __init__(self, path: str | Path, caption_len: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise WeightError(f"cannot read tokenizer {path}: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.caption_len = caption_len

    def encode(self, caption: str, *, truncate: bool = False) -> Tensor:
        """[1, caption_len] int64. Raises CaptionError for an empty caption, one that is too long (unless `truncate`), or one
        of which the tokenizer knows no part."""
        if not caption.strip():
            raise CaptionError("got an empty caption, expected some text")
        encoding = self._tokenizer.encode(caption)
        ids = encoding.ids
        unknown = [self._tokenizer.token_to_id(name) for name in ("[UNK]", "<UNK>", "<unk>", "▁")]  # ▁: a word begins
        content = [
            i for i, special in zip(ids, encoding.special_tokens_mask, strict=True) if not special and i not in unknown
        ]
        if not content:
            raise CaptionError(
                f"got caption {caption!r}, in which this model's tokenizer knows no word, expected its script"
            )
        if len(ids) > self.caption_len:
            if not truncate:
                raise CaptionError(
                    f"got a caption of {len(ids)} tokens, expected at most {self.caption_len} (or truncate it)"
                )
            ids = ids[: self.caption_len]
        return torch.tensor([ids + [0] * (self.caption_len - len(ids))])

    def empty(self) -> Tensor:
        """The caption of nothing, all padding: what guidance steers away from. [1, caption_len]."""
        return torch.zeros(1, self.caption_len, dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i]))
