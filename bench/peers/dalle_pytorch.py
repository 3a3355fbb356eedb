"""DALLE-pytorch 1.6.6 (MIT, lucidrains): its `forward` with a cache, and its public `generate_images` as it is.

The model is its default one: rotary positions, token shift, LayerScale, GEGLU, and 10,000 text tokens; axial layers in the
form that its cache serves (optimize_for_inference). Same weights as ours, same logits.
"""

from __future__ import annotations

import types
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import load_part, rows
from dalle_fast.checkpoints import dalle_pytorch as converter
from dalle_fast.config import ModelConfig

TYPES = ("axial_row", "axial_col", "axial_row", "axial_row")
ADVICE = "pip install --no-deps dalle-pytorch==1.6.6 axial_positional_embedding rotary-embedding-torch einops"


def package() -> Any:
    """Its main module. Its wrappers of pretrained image tokenizers, which import six more packages, stay out."""
    vae = types.ModuleType("dalle_pytorch.vae")
    for name in ("OpenAIDiscreteVAE", "VQGanVAE"):
        setattr(vae, name, type(name, (nn.Module,), {}))
    return load_part("dalle_pytorch", "dalle_pytorch", ADVICE, {"dalle_pytorch.vae": vae})


def build(dim: int, layers: int, heads: int, side: int, text: int, text_vocab: int, image_vocab: int) -> nn.Module:
    """A DALLE with random weights, in float32."""
    module = package()

    class Codes(module.DiscreteVAE):  # type: ignore[name-defined,misc]
        """An image tokenizer that costs nothing: "pictures" carry their tokens in the first channel."""

        def get_codebook_indices(self, images: Tensor) -> Tensor:
            return images[:, 0, :: self.factor, :: self.factor].flatten(1).long()

        def decode(self, tokens: Tensor) -> Tensor:
            return tokens

    scale = 2  # pixels a cell, the fewest that its VAE can have
    vae = Codes(image_size=side * scale, num_tokens=image_vocab, codebook_dim=8, num_layers=1, hidden_dim=8)
    vae.factor = scale
    model: nn.Module = module.DALLE(
        dim=dim, depth=layers, heads=heads, dim_head=64, vae=vae, num_text_tokens=text_vocab, text_seq_len=text,
        attn_types=TYPES, optimize_for_inference=True,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def converted(model: nn.Module, heads: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same architecture and weights in our words."""
    hparams = {
        "heads": heads, "dim_head": 64, "text_seq_len": model.text_seq_len, "attn_types": TYPES, "shift_tokens": True,
        "num_text_tokens": model.num_text_tokens - model.text_seq_len,
    }  # fmt: skip
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    return converter.read({"hparams": hparams, "weights": state}, version="1.6.6")


def in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another type. Its table of angles stays in float32: rounded to bfloat16 its results would be wrong."""
    angles = model.transformer.pos_emb.clone()
    model = model.to(dtype)
    model.transformer.pos_emb = angles
    return model


class ForwardStepper:
    """`forward` with its cache: at each cell all tokens so far go in, those of the cache are not computed again."""

    positions = 32

    @torch.inference_mode()
    def __init__(self, model: nn.Module, text: Tensor, tokens: Tensor, batch: int) -> None:
        self.model, self.text, self.tokens = model, text.expand(batch, -1), rows(tokens, batch)
        self.first = text.shape[1] + 1
        self.side = model.transformer.image_fmap_size
        self.shifted: dict[str, Tensor] = {}
        self.full: dict[str, Any] = {}
        hooks = [
            wrapper.fn.register_forward_pre_hook(
                lambda _, args, key=wrapper.cache_key: self.shifted.__setitem__(key, args[0][:, self.first :])
            )
            for wrapper in model.modules()
            if type(wrapper).__name__ == "CachedAs" and wrapper.cache_key.startswith("preshift")
        ]
        model(text.expand(len(tokens), -1), tokens, cache=self.full)
        for hook in hooks:
            hook.remove()
        self.cache: dict[str, Any] = {}

    @torch.inference_mode()
    def seek(self, cell: int) -> None:
        """The cache as its own decoding would have left it. What it makes itself when given image tokens at once is not
        used: its queues of shifted channels then hold channels that were shifted already."""
        batch, end = len(self.tokens), self.first + cell
        self.cache = {"offset": end}
        for key, value in self.full.items():
            if key.startswith("attn"):
                self.cache[key] = tuple(rows(x[:, :, :end], batch) for x in value)
        for key, x in self.shifted.items():
            quarter = x.shape[-1] // 4
            zero = x.new_zeros(batch, quarter)
            before = [rows(x[:, i], batch) for i in range(max(0, cell - self.side), cell)]
            queue = deque([(zero, zero)] * (self.side - len(before)))
            queue.extend((y[:, :quarter], y[:, quarter : 2 * quarter]) for y in before)
            self.cache[key] = queue
        self.cell = cell

    @torch.inference_mode()
    def step(self) -> Tensor:
        logits = self.model(self.text, self.tokens[:, : self.cell + 1], cache=self.cache)
        self.cell += 1
        return logits[:, -1, self.model.num_text_tokens :].float()

    def nbytes(self) -> int:
        return sum(x.nbytes for value in self.cache.values() if isinstance(value, tuple) for x in value)


class PublicStepper:
    """`generate_images` as users call it, primed with a picture up to a cell, for one more token. It passes no cache on, so
    every token computes all that came before. Draws greedily, so that what it draws can be checked."""

    positions = 8

    def __init__(self, model: nn.Module, text: Tensor, tokens: Tensor, batch: int) -> None:
        self.model, self.text, self.cell = model, text.expand(batch, -1).clone(), 0
        side, factor = model.transformer.image_fmap_size, model.vae.factor
        codes = rows(tokens, batch).view(batch, 1, side, side).float()
        self.picture = codes.repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)

    def seek(self, cell: int) -> None:
        self.cell = cell

    def step(self) -> Tensor:
        """The token drawn for the next cell, [B]."""
        whole = self.model.image_seq_len
        self.model.image_seq_len = self.cell + 2  # where its loop ends
        try:
            drawn: Tensor = self.model.generate_images(
                self.text, filter_thres=1.0, img=self.picture, num_init_img_tokens=self.cell + 1, use_cache=True
            )
        finally:
            self.model.image_seq_len = whole
        return drawn[:, -1]

    def nbytes(self) -> int:
        return 0
