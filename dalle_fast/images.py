"""The paper's image tokenizer: a discrete VAE with f=8, between pixels and a grid of codes.

Bottleneck ResNets as in section 2.1 and appendix A of arXiv 2102.12092 and in OpenAI's public decoder: four groups of
blocks, max-pooling on the way in and nearest upsampling on the way out, a 7x7 first convolution, 1x1 convolutions at
the token grid, and the logit-Laplace map between pixels and the decoder's output. Parameters bear OpenAI's names (`w`,
`b`, `blocks.group_1.…`). Fully convolutional: any picture whose sides are multiples of 8.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.codec import Codec
from dalle_fast.discrete_vae import DiscreteVAE
from dalle_fast.vqgan import VQGAN
from dalle_fast.weights import WeightError

FACTOR = 8  # pixels a side of one code
EPSILON = 0.1  # pixels are mapped into [EPSILON, 1 - EPSILON], where the logit-Laplace density is finite
GROUPS = 4


def map_pixels(pixels: Tensor) -> Tensor:
    """phi(x) = (1 - 2 eps) x + eps: pixels in 0..1 to the open interval that the decoder models."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of map_pixels, clamped to 0..1."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """Mean negative log-likelihood of pixels [B, 3, H, W] in 0..1 under decoder output [B, 6, H, W] (paper, appendix A.3).

    The first three channels are the location mu, the others ln b:
    f(x) = exp(-|logit x - mu| / b) / (2 b x (1 - x)), with x the mapped pixel.
    """
    mean, log_scale = output.float().chunk(2, dim=1)
    x = map_pixels(pixels.float())
    distance = (torch.logit(x) - mean).abs() * torch.exp(-log_scale)
    return (distance + log_scale + math.log(2) + torch.log(x * (1 - x))).mean()


@dataclass(frozen=True)
class DVAEConfig:
    """Size of a dVAE; the defaults are OpenAI's. Raises ValueError for a value below 1, or a hidden that 4 does not divide."""

    vocab_size: int = 8192
    hidden: int = 256  # channels at full resolution; 8 times that at the token grid
    blocks_per_group: int = 2
    decoder_init: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"got {field.name}={value!r}, expected a whole number from 1")
        if self.hidden % 4:
            raise ValueError(f"got hidden={self.hidden}, expected a multiple of 4")


class Conv2d(nn.Module):
    """A same-size convolution whose parameters bear OpenAI's names, w [out, in, k, k] and b [out]."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.padding)


class Block(nn.Module):
    """id(x) + gain · conv(relu(conv(relu(conv(relu(conv(relu x))))))): four convolutions at a quarter of the width."""

    def __init__(self, inputs: int, outputs: int, layers: int, kernels: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = (inputs, outputs // 4, outputs // 4, outputs // 4, outputs)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


def _group(
    inputs: int, outputs: int, config: DVAEConfig, kernels: tuple[int, int, int, int], last: nn.Module | None
) -> nn.Module:
    """The group's blocks, then a pool or an upsampling named as OpenAI names it."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(config.blocks_per_group):
        layers[f"block_{i + 1}"] = Block(
            inputs if i == 0 else outputs, outputs, GROUPS * config.blocks_per_group, kernels
        )
    if last is not None:
        layers["upsample" if isinstance(last, nn.Upsample) else "pool"] = last
    return nn.Sequential(layers)


class Encoder(nn.Module):
    """Mapped pixels [B, 3, 8h, 8w] -> code logits [B, vocab, h, w]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n = config.hidden
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, n, 7))
        for i, (inputs, outputs) in enumerate(((n, n), (n, 2 * n), (2 * n, 4 * n), (4 * n, 8 * n))):
            blocks[f"group_{i + 1}"] = _group(inputs, outputs, config, (3, 3, 3, 1), nn.MaxPool2d(2) if i < 3 else None)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(8 * n, config.vocab_size, 1)))
        self.blocks = nn.Sequential(blocks)

    def forward(self, mapped: Tensor) -> Tensor:
        return self.blocks(mapped)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Code weights [B, vocab, h, w] (one-hot, or relaxed) -> mu and ln b of the mapped pixels [B, 6, 8h, 8w]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n = config.hidden
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(config.vocab_size, config.decoder_init, 1))
        for i, (inputs, outputs) in enumerate(
            ((config.decoder_init, 8 * n), (8 * n, 4 * n), (4 * n, 2 * n), (2 * n, n))
        ):
            up = nn.Upsample(scale_factor=2, mode="nearest") if i < 3 else None
            blocks[f"group_{i + 1}"] = _group(inputs, outputs, config, (1, 3, 3, 3), up)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n, 6, 1)))
        self.blocks = nn.Sequential(blocks)

    def forward(self, codes: Tensor) -> Tensor:
        return self.blocks(codes)  # type: ignore[no-any-return]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """forward of one-hot codes, by a table look-up: tokens [B, h, w] int64 -> [B, 6, 8h, 8w]."""
        first = self.blocks[0]
        x = F.embedding(tokens, first.w[:, :, 0, 0].t().contiguous()) + first.b  # type: ignore[operator,index]
        return self.blocks[1:](x.permute(0, 3, 1, 2))  # type: ignore[no-any-return]


class DVAE(Codec):
    """Pixels to tokens and back; see Codec."""

    name = "dvae"
    config_class = DVAEConfig

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def factor(self) -> int:
        return FACTOR

    def to_codes(self, pixels: Tensor) -> Tensor:
        x = map_pixels(pixels).contiguous(memory_format=torch.channels_last)
        return self.encoder(x).argmax(1)  # type: ignore[no-any-return]

    def to_pixels(self, codes: Tensor) -> Tensor:
        return unmap_pixels(torch.sigmoid(self.decoder.from_tokens(codes)[:, :3].float()))

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        return super().load(folder, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


CODECS: tuple[type[Codec], ...] = (DVAE, VQGAN, DiscreteVAE)


def load_codec(folder: Path | str, device: torch.device | str = "cpu") -> Codec:
    """The image tokenizer whose files a folder holds. Raises WeightError for none, for several, or for files that don't fit."""
    found = [codec for codec in CODECS if (Path(folder) / f"{codec.name}.json").exists()]
    if len(found) != 1:
        names = " and ".join(f"{codec.name}.json" for codec in found) or "no image tokenizer"
        expected = ", ".join(f"{codec.name}.json" for codec in CODECS)
        raise WeightError(f"got {folder} with {names}, expected one of {expected}")
    return found[0].load(folder, device)
