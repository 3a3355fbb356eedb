"""VQGAN image tokenizers (Esser et al., arXiv 2012.09841): the convolutional autoencoder of taming-transformers, with its
plain codebook (nearest entry) or the Gumbel one of ruDALL-E and of DALLE-pytorch's larger models (a 1x1 convolution scores
the codes). Parameters bear taming's names. diffusers' VQModel has the same encoder but no Gumbel codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.codec import Codec


@dataclass(frozen=True)
class VQGANConfig:
    """Size of a VQGAN. Raises ValueError for a value out of range.

    channels       at full resolution; level i has channels * multipliers[i]; each level but the last halves the picture
    blocks         residual blocks a level on the way in (one more on the way out)
    attention      levels whose blocks are each followed by attention
    code_channels  z_channels of taming: what the encoder gives; embed_dim: width of a codebook entry
    """

    vocab_size: int = 8192
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (3,)
    code_channels: int = 256
    embed_dim: int = 256
    gumbel: bool = True

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = {
            name: getattr(self, name) for name in ("vocab_size", "channels", "blocks", "code_channels", "embed_dim")
        }
        for name, value in (numbers | {f"multipliers[{i}]": m for i, m in enumerate(self.multipliers)}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"got {name}={value!r}, expected a whole number from 1")
        if not self.multipliers or self.channels % 32:
            raise ValueError(
                f"got channels={self.channels} x {self.multipliers}, expected multiples of 32 on some levels"
            )
        if not all(type(level) is int and 0 <= level < len(self.multipliers) for level in self.attention):
            raise ValueError(f"got attention={self.attention}, expected levels below {len(self.multipliers)}")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), with a 1x1 convolution around if the widths differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class Attention(nn.Module):
    """x + one head of attention over all positions of norm x, with 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (_conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # [B, 1, h w, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros below and to the right, none above and to the left."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Level(nn.Module):
    """The residual blocks of one resolution, each with its attention if the level has any, and the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attention else 0))
        self.resample = list(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in self.resample:
            x = self.get_submodule(name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResidualBlock(channels, channels), Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pixels in -1..1 [B, 3, H, W] -> [B, code_channels, H / factor, W / factor]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = _conv(3, config.channels)
        self.down = nn.ModuleList(
            Level(
                inputs,
                outputs,
                config.blocks,
                i in config.attention,
                **({"downsample": Downsample(outputs)} if i < len(widths) - 1 else {}),
            )
            for i, (inputs, outputs) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], config.code_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """[B, code_channels, h, w] -> pixels in about -1..1 [B, 3, factor h, factor w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in, self.mid = _conv(config.code_channels, widths[-1]), Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                inputs,
                outputs,
                config.blocks + 1,
                i in config.attention,
                **({"upsample": Upsample(outputs)} if i else {}),
            )
            for i, (inputs, outputs) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(cast("list[Level]", list(self.up))):  # level 0 is full resolution
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class VQGAN(Codec):
    """Pixels to tokens and back; see Codec."""

    name = "vqgan"
    config_class = VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = _conv(config.code_channels, config.embed_dim, 1)
        self.post_quant_conv = _conv(config.embed_dim, config.code_channels, 1)
        codebook = nn.Embedding(config.vocab_size, config.embed_dim)
        if config.gumbel:
            self.quantize = nn.ModuleDict({"proj": _conv(config.embed_dim, config.vocab_size, 1), "embed": codebook})
        else:
            self.quantize = nn.ModuleDict({"embedding": codebook})

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.config.multipliers) - 1))

    @property
    def codebook(self) -> Tensor:
        """[vocab_size, embed_dim]."""
        return cast("nn.Embedding", self.quantize["embed" if self.config.gumbel else "embedding"]).weight

    def to_codes(self, pixels: Tensor) -> Tensor:
        x = self.quant_conv(self.encoder(2 * pixels - 1))
        if self.config.gumbel:
            return self.quantize["proj"](x).argmax(1)  # type: ignore[no-any-return]
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(-1, c)
        # |x - e|² without |x|², which is the same for all codes.
        distance = self.codebook.square().sum(1) - 2 * x @ self.codebook.T
        codes: Tensor = distance.argmin(1).view(b, h, w)
        return codes

    def to_pixels(self, codes: Tensor) -> Tensor:
        x = self.decoder(self.post_quant_conv(F.embedding(codes, self.codebook).permute(0, 3, 1, 2)))
        return (x.clamp(-1, 1) + 1) / 2  # type: ignore[no-any-return]
