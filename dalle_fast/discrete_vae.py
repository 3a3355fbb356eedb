"""DALLE-pytorch's own image tokenizer, DiscreteVAE: strided convolutions, residual blocks without norms, and a codebook
that the decoder reads. Parameters bear its names."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.codec import Codec


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Size of a DiscreteVAE; pixels are normalised by mean and deviation. Raises ValueError for a value out of range."""

    vocab_size: int = 512
    embed_dim: int = 512
    layers: int = 3  # each halves the picture
    blocks: int = 0
    hidden: int = 64
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "layers", "hidden", "blocks"):
            least, value = int(name != "blocks"), getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"got {name}={value!r}, expected a whole number from {least}")
        for name in ("mean", "deviation"):
            values = tuple(float(x) for x in getattr(self, name))
            if (
                len(values) != 3
                or not all(-1e3 < x < 1e3 for x in values)
                or (name == "deviation" and min(values) <= 0)
            ):
                raise ValueError(f"got {name}={values}, expected three numbers, deviations above 0")
            object.__setattr__(self, name, values)


class ResidualBlock(nn.Module):
    """conv(relu(conv(relu(conv x)))) + x, the last one 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for kernel in (3, 3, 1)]
        self.net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x  # type: ignore[no-any-return]


class DiscreteVAE(Codec):
    """Pixels to tokens and back; see Codec."""

    name = "discrete_vae"
    config_class = DiscreteVAEConfig

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__(config)
        hidden, blocks = config.hidden, [ResidualBlock(config.hidden) for _ in range(2 * config.blocks)]
        down = [
            nn.Sequential(nn.Conv2d(hidden if i else 3, hidden, 4, stride=2, padding=1), nn.ReLU())
            for i in range(config.layers)
        ]
        first = hidden if config.blocks else config.embed_dim
        up = [
            nn.Sequential(nn.ConvTranspose2d(hidden if i else first, hidden, 4, stride=2, padding=1), nn.ReLU())
            for i in range(config.layers)
        ]
        enter = [nn.Conv2d(config.embed_dim, hidden, 1)] if config.blocks else []
        self.codebook = nn.Embedding(config.vocab_size, config.embed_dim)
        self.encoder = nn.Sequential(*down, *blocks[: config.blocks], nn.Conv2d(hidden, config.vocab_size, 1))
        self.decoder = nn.Sequential(*enter, *blocks[config.blocks :], *up, nn.Conv2d(hidden, 3, 1))

    @property
    def factor(self) -> int:
        return int(2**self.config.layers)

    def _channels(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return like.new_tensor(values)[:, None, None]

    def to_codes(self, pixels: Tensor) -> Tensor:
        mean, deviation = (self._channels(x, pixels) for x in (self.config.mean, self.config.deviation))
        return self.encoder((pixels - mean) / deviation).argmax(1)  # type: ignore[no-any-return]

    def to_pixels(self, codes: Tensor) -> Tensor:
        x = self.decoder(F.embedding(codes, self.codebook.weight).permute(0, 3, 1, 2))
        mean, deviation = (self._channels(y, x) for y in (self.config.mean, self.config.deviation))
        return (x * deviation + mean).clamp(0, 1)  # type: ignore[no-any-return]
