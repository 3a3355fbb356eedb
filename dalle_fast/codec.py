"""What image tokenizers share: checks, batches, files."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dalle_fast import weights
from dalle_fast.weights import WeightError


class Codec(nn.Module):
    """Pixels [B, 3, H, W] in 0..1 to tokens [B, H / factor, W / factor] and back. Files: NAME.json and NAME.safetensors."""

    name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels a side of one code."""

    @abstractmethod
    def to_codes(self, pixels: Tensor) -> Tensor:
        """A batch of pixels in the model's type, not checked, to int64 codes."""

    @abstractmethod
    def to_pixels(self, codes: Tensor) -> Tensor:
        """A batch of codes, not checked, to pixels in 0..1."""

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch: int = 8) -> Tensor:
        """Pixels [B, 3, factor h, factor w] in 0..1 -> the most likely codes [B, h, w] int64, `batch` pictures at a time.

        Raises ValueError for another shape, or values outside 0..1 (NaN included).
        """
        f = self.factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % f or pixels.shape[3] % f or 0 in pixels.shape:
            raise ValueError(
                f"got pixels {list(pixels.shape)}, expected [B, 3, height, width] with sides that {f} divides"
            )
        if not pixels.is_floating_point() or not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(f"got {pixels.dtype} pixels, expected floating point within 0..1")
        weight = next(self.parameters())
        return torch.cat([self.to_codes(part.to(weight.device, weight.dtype)) for part in torch.split(pixels, batch)])

    @torch.no_grad()
    def decode(self, tokens: Tensor, batch: int = 8) -> Tensor:
        """Codes [B, h, w] -> pixels [B, 3, factor h, factor w] in 0..1, float32, `batch` pictures at a time.

        Raises ValueError for another shape or type, or a code outside the vocabulary.
        """
        if tokens.ndim != 3 or 0 in tokens.shape or tokens.is_floating_point():
            raise ValueError(
                f"got {tokens.dtype} tokens {list(tokens.shape)}, expected whole numbers [B, height, width]"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"got tokens {int(tokens.min())} to {int(tokens.max())}, expected 0 to {self.vocab_size - 1}"
            )
        device = next(self.parameters()).device
        parts = [self.to_pixels(part.to(device).long()).float() for part in torch.split(tokens, batch)]
        return torch.cat(parts).contiguous()

    def config_json(self) -> str:
        return json.dumps(asdict(self.config), indent=2) + "\n"

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Writes NAME.json and NAME.safetensors; weights in `dtype` if given."""
        state = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in self.state_dict().items()}
        weights.save(Path(folder) / f"{self.name}.safetensors", state)
        weights.write_text(Path(folder) / f"{self.name}.json", self.config_json())

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        """Reads what `save` wrote, as float32. Raises WeightError, in one line, for files that are missing or do not fit."""
        path = Path(folder) / f"{cls.name}.json"
        try:
            config = cls.config_class(**json.loads(weights.read_text(path)))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            if isinstance(error, WeightError):
                raise
            raise WeightError(f"cannot use {path}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        state = weights.load(path.with_suffix(".safetensors"), model.state_dict(), dtype=torch.float32, device=device)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)
