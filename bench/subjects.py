"""What is decoded: models with random weights, one caption, two streams of image tokens, and the logits that must come out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.peers import dalle_pytorch, rudalle
from dalle_fast import backends
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel
from dalle_fast.quantize import quantize

ROW_ROW = ("row", "column", "row", "row")
FLAT = "conv(kernel=11,boundary=flat)"
LOOSER = 3  # times the error of plain PyTorch in the same type on the same model: what a contender may have
MATRICES = tuple(f"{name}.weight" for name in ("qkv", "out", "up", "down", "head"))


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
        self._bounds: dict[str, float] = {}

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

    def bound(self, dtype: str) -> float:
        """The relative error that logits may have: LOOSER times that of the plain model in this type, at the worst of the
        cells. For int8 and int4 it is the plain model in float32 with its matrices rounded."""
        if dtype not in self._bounds:
            model = self.cast(torch.float32 if dtype in ("int8", "int4") else getattr(torch, dtype))
            for name, p in model.named_parameters():
                if dtype in ("int8", "int4") and p.ndim == 2 and name.endswith(MATRICES):
                    kind = "int8" if name.startswith("head") else dtype  # as our engine does
                    p.data = quantize(p, kind).dequantize()  # in place it would change the subject itself
            with torch.inference_mode():
                logits = model(self.text.expand(2, -1).to(DEVICE), self.tokens.to(DEVICE))[1].double()
            errors = [float((logits[:, c + 1] - x).norm() / x.norm()) for c, x in self.expected.items()]
            self._bounds[dtype] = LOOSER * max(1e-6, *errors)
        return self._bounds[dtype]

    def cast(self, dtype: torch.dtype) -> DalleModel:
        with torch.device("meta"):
            model = DalleModel(self.config)
        exact = {} if dtype.itemsize >= 4 else {"rotary": torch.float32}  # angles do not survive 16 bits
        state = {k: v.to(DEVICE, exact.get(k, dtype)) for k, v in self.model.state_dict().items()}
        model.load_state_dict(state, assign=True)
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


def converted(config: ModelConfig, state: dict[str, Tensor]) -> DalleModel:
    """A model of ours with the weights of a peer."""
    with torch.device("meta"):
        model = DalleModel(config)
    model.load_state_dict(state, assign=True)
    return model


def make_dalle_pytorch(small: bool) -> Subject:
    torch.manual_seed(0)
    sizes = (64, 4, 1, 8, 16, 48, 32) if small else (512, 8, 8, 32, 256, 10000, 8192)  # 10,000 text tokens: its default
    peer = sharpened(dalle_pytorch.build(*sizes))
    for name, p in peer.named_parameters():  # else its residual stream hardly notices what the layers do
        if name.endswith("scale"):
            p.fill_(0.5)
    return Subject("dalle-pytorch", converted(*dalle_pytorch.converted(peer, heads=sizes[2])), peer)


def make_rudalle(small: bool) -> Subject:
    torch.manual_seed(0)
    sizes = (64, 5, 1, 8, 16, 48, 32) if small else (512, 8, 8, 32, 128, 16384, 8192)
    peer = sharpened(rudalle.build(*sizes))
    return Subject("rudalle", converted(*rudalle.converted(peer, heads=sizes[2])), peer)


MAKERS: dict[str, Callable[[bool], Subject]] = {
    "paper": make_paper,
    "dalle-pytorch": make_dalle_pytorch,
    "rudalle": make_rudalle,
}
