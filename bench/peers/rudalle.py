"""ruDALL-E 1.1.3 (Apache 2.0, Sber): a step of its `generate_images` with use_cache=True, that is `forward` with a cache.

Malevich's architecture (v3) at another width. Same weights as ours, same logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import load_part, rows
from dalle_fast.checkpoints import rudalle as converter
from dalle_fast.config import ModelConfig

ADVICE = "pip install --no-deps rudalle==1.1.3 einops"


def build(dim: int, layers: int, heads: int, side: int, text: int, text_vocab: int, image_vocab: int) -> nn.Module:
    """A DalleModel with random weights, in float32."""
    module = load_part("rudalle", "dalle.model", ADVICE)
    model: nn.Module = module.DalleModel(
        "cpu", num_layers=layers, vocab_size=text_vocab + text, hidden_size=dim, num_attention_heads=heads,
        embedding_dropout_prob=0.1, attention_dropout_prob=0.1, output_dropout_prob=0.1, text_seq_length=text,
        image_tokens_per_dim=side, image_vocab_size=image_vocab, cogview_sandwich_layernorm=True, cogview_pb_relax=True,
        is_bool_mask=True, hf_version="v3",
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def converted(model: nn.Module, heads: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same architecture and weights in our words."""
    return converter.read(dict(model.state_dict()), version=3, heads=heads)


class ForwardStepper:
    """`forward` with its cache, of keys, values and outputs: at each cell all tokens so far go in."""

    positions = 8  # its time is proportional to the position

    @torch.inference_mode()
    def __init__(self, model: Any, text: Tensor, tokens: Tensor, batch: int) -> None:
        self.model = model
        total, dtype = model.total_seq_length, model.to_logits[1].weight.dtype
        whole = torch.cat([text.expand(len(tokens), -1), tokens], dim=1)
        self.input = rows(whole, batch)
        self.mask = torch.ones(batch, 1, total, total, dtype=dtype, device=text.device).tril()
        self.full = model(whole, self.mask[:1], use_cache=True)[1]
        self.cache: dict[int, Any] = {}

    @torch.inference_mode()
    def seek(self, cell: int) -> None:
        self.end, batch = self.model.text_seq_length + cell, len(self.input)
        self.cache = {
            i: (*(rows(x[:, :, : self.end], batch) for x in layer[:2]), rows(layer[2][:, : self.end], batch))
            for i, layer in self.full.items()
        }

    @torch.inference_mode()
    def step(self) -> Tensor:
        self.end += 1
        logits, self.cache = self.model(self.input[:, : self.end], self.mask, use_cache=True, cache=self.cache)
        return logits[:, -1, self.model.vocab_size :].float()

    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.cache.values() for x in layer)
