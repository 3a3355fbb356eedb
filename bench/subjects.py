"""What is decoded: models with random weights, one caption, two streams of image tokens, and the logits that must come out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from dalle_fast import backends
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel

ROW_ROW = ("row", "column", "row", "row")
FLAT = "conv(kernel=11,boundary=flat)"
# Of a result of plain PyTorch in the same type, measured over 8 layers at width 512: float32 2e-6, bfloat16 0.01; the
# quantized types are held against what rounding the weights does by itself.
BOUND = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01, "int8": 0.05, "int4": 0.4}


def paper(small: bool) -> ModelConfig:
    """The paper's architecture, 512 wide with 8 layers, or as small as makes sense."""
    if small:
        return ModelConfig.preset("tiny", head_dim=64)
    patterns = (*ROW_ROW, *ROW_ROW[:3], FLAT)
    return ModelConfig(dim=512, layers=8, heads=8, patterns=patterns)


class Subject:
    """A model of dalle_fast in float32 and what it is fed. `peer`: the same weights in the peer's own class."""

    def __init__(self, name: str, model: DalleModel, peer: Any = None) -> None:
        self.name, self.config, self.peer = name, model.config, peer
        self.model = model.eval().requires_grad_(False)
        g = torch.Generator().manual_seed(1)
        used = self.config.caption_len // 4  # the rest is padding, as in most captions
        self.text = torch.zeros(1, self.config.caption_len, dtype=torch.int64)
        self.text[0, :used] = torch.randint(1, self.config.text_vocab, (used,), generator=g)
        self.tokens = torch.randint(0, self.config.image_vocab, (2, self.config.cells), generator=g)

    @cached_property
    def cells(self) -> list[int]:
        """Where results are compared: the first cell, past a row, past a ring, and towards the end."""
        last = self.config.cells - 2
        return sorted({0, min(self.config.width + 3, last), last * 5 // 12, last * 11 // 12})

    @cached_property
    def expected(self) -> dict[int, Tensor]:
        """By cell, the logits [2, image_vocab] after its token: the whole sequence, dense, in float64."""
        with torch.inference_mode(), backends.use("reference"):
            logits = self.cast(torch.float64)(self.text.expand(2, -1).to(DEVICE), self.tokens.to(DEVICE))[1]
        return {cell: logits[:, cell + 1].clone() for cell in self.cells}

    def cast(self, dtype: torch.dtype) -> DalleModel:
        with torch.device("meta"):
            model = DalleModel(self.config)
        model.load_state_dict({k: v.to(DEVICE, dtype) for k, v in self.model.state_dict().items()}, assign=True)
        return model.eval().requires_grad_(False)


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights attend to everything alike, and a wrong key would not show. Larger queries and keys make it show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("qkv" in name or "query_key_value" in name) and name.endswith("weight"):
                p[: len(p) * 2 // 3] *= 4
    return model


def make_paper(small: bool) -> Subject:
    torch.manual_seed(0)
    model = DalleModel(paper(small))
    sharpened(model)
    return Subject("paper", model)


MAKERS: dict[str, Callable[[bool], Subject]] = {"paper": make_paper}
