"""The transformer: thin, one definition for training and for decoding (passes.py says how attention is computed)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast import weights
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.ops import Embedding
from dalle_fast.passes import FullPass, Pass, PrefixPass, Rotary, StepPass, rotate
from dalle_fast.weights import WeightFile


class Block(nn.Module):
    """x += scale · norm_out(attention(shift(norm x))), then the same with the MLP; norm_out, scale and shift as configured."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.config = index, config
        inner = config.heads * config.head_dim
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(2))
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias)  # rows q | k | v, head by head
        self.out = nn.Linear(inner, config.dim)
        self.up = nn.Linear(config.dim, config.hidden * (2 if config.activation == "geglu" else 1))
        self.down = nn.Linear(config.hidden, config.dim)
        if config.sandwich_norm:
            self.attention_norm_out, self.mlp_norm_out = (
                nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(2)
            )
        if config.layer_scale:
            initial = 0.1 if index < 18 else 1e-5 if index < 24 else 1e-6  # CaiT's, as DALLE-pytorch has them
            self.attention_scale, self.mlp_scale = (nn.Parameter(torch.full((config.dim,), initial)) for _ in range(2))

    def attention(self, x: Tensor, run: Pass) -> Tensor:
        batch, n, _ = x.shape
        h = self.attention_norm(x)  # [B, n, d]
        if self.config.token_shift:
            h = run.shift(2 * self.index, h)
        qkv = self.qkv(h).view(batch, n, 3, self.config.heads, self.config.head_dim).permute(2, 0, 3, 1, 4)
        if run.rotary is not None:
            qkv = rotate(qkv, run.rotary)
        h = run.attend(self.index, *qkv.unbind(0))  # [B, H, n, D]
        h = self.out(h.transpose(1, 2).reshape(batch, n, -1))
        if self.config.sandwich_norm:
            h = self.attention_norm_out(h)
        return h * self.attention_scale if self.config.layer_scale else h  # type: ignore[no-any-return]

    def mlp(self, x: Tensor, run: Pass) -> Tensor:
        h = self.mlp_norm(x)
        if self.config.token_shift:
            h = run.shift(2 * self.index + 1, h)
        h = self.down(self.hidden(h))
        if self.config.sandwich_norm:
            h = self.mlp_norm_out(h)
        return h * self.mlp_scale if self.config.layer_scale else h  # type: ignore[no-any-return]

    def hidden(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., hidden]: the MLP's first product and its activation."""
        h = self.up(h)
        if self.config.activation == "geglu":
            value, gate = h.chunk(2, dim=-1)
            return value * F.gelu(gate)
        return F.gelu(h, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")


class DalleModel(nn.Module):
    """Text and image tokens in, logits out.

    On torch's meta device it allocates nothing and `sum(p.numel() for p in model.parameters())` is its size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.masks = config.masks()
        self.text_embedding = nn.Embedding(config.text_logits, config.dim)  # the pads come last, one a caption position
        self.image_embedding = nn.Embedding(config.image_vocab, config.dim)
        self.rotary: Tensor | None
        self.register_buffer("rotary", rotary_table(config) if config.positions == "rotary" else None)  # [total, R]
        if config.positions == "learned":
            self.text_positions = nn.Parameter(torch.empty(config.section_len, config.dim))
            self.row_positions = nn.Parameter(torch.empty(config.height, config.dim))
            self.column_positions = nn.Parameter(torch.empty(config.width, config.dim))
        if config.start == "learned":
            self.start = nn.Parameter(torch.empty(config.dim))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))  # of Block
        self.final_norms = nn.Sequential(
            *(nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(config.final_norms))
        )
        self.head = nn.Linear(config.dim, config.text_logits + config.image_vocab)  # rows text | pads | image
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of deviation 0.02, the two projections into the residual stream scaled by 1/√(2·layers) (GPT-2's)."""
        for name, p in self.named_parameters():
            if p.ndim == 2 or name == "start":
                scale = (
                    0.02 / math.sqrt(2 * self.config.layers) if name.endswith(("out.weight", "down.weight")) else 0.02
                )
                nn.init.normal_(p, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    # Embeddings and logits.

    def text_section(self, text: Tensor) -> Tensor:
        """Caption ids [B, caption_len], 0 for padding -> the text section's ids [B, section_len]."""
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.caption_len or text.dtype != torch.int64:
            raise ValueError(f"got text {list(text.shape)} {text.dtype}, expected [B, {config.caption_len}] int64")
        pads = config.text_vocab + torch.arange(config.caption_len, device=text.device)
        text = torch.where(text == 0, pads, text)
        return text if config.lead_token is None else F.pad(text, (1, 0), value=config.lead_token)

    def embed_section(self, section: Tensor) -> Tensor:
        """[B, section_len] -> [B, section_len, d]."""
        x: Tensor = self.text_embedding(section)
        return x + self.text_positions if self.config.positions == "learned" else x

    def embed_start(self, section: Tensor) -> Tensor:
        """What stands in cell 0 before the first image token: [B, 1, d]. Only for models that have a start cell."""
        if self.config.start == "text":
            return self.embed_section(section)[:, -1:]
        x = self.start.expand(section.shape[0], 1, -1)
        return x + self.row_positions[0] + self.column_positions[0] if self.config.positions == "learned" else x

    @property
    def first_place(self) -> int:
        """The place of image token 0. A learned start counts as a cell of its own: token j is read at cell j + 1 and takes
        that cell's place."""
        return int(self.config.start == "learned")

    def image_embedding_tables(self) -> Embedding:
        """embed_image as the op draw takes it."""
        learned = self.config.positions == "learned"
        rows, columns = (self.row_positions, self.column_positions) if learned else (None, None)
        return Embedding(self.image_embedding.weight, rows, columns, self.first_place)

    def embed_image(self, tokens: Tensor, first: Tensor | int = 0) -> Tensor:
        """Image tokens first, first + 1, … [B, n] -> [B, n, d]."""
        x: Tensor = self.image_embedding(tokens)
        if self.config.positions != "learned":
            return x
        if isinstance(first, int) and tokens.shape[1] == 1:  # the usual step on a CPU, by the fewest ops
            row, column = divmod(first + self.first_place, self.config.width)
            return x + self.row_positions[row] + self.column_positions[column]
        place = first + self.first_place + torch.arange(tokens.shape[1], device=tokens.device)
        # Not by indexing, whose gradient adds up in an order of its own on several threads of a CPU.
        rows = F.embedding(place // self.config.width, self.row_positions)
        return x + rows + F.embedding(place % self.config.width, self.column_positions)

    def image_logits(self, x: Tensor) -> Tensor:
        """[..., d] after the blocks -> [..., image_vocab]; only the image rows of the joint head are computed."""
        text = self.config.text_logits
        logits: Tensor = F.linear(self.final_norms(x), self.head.weight[text:], self.head.bias[text:])
        return logits

    def text_logits(self, x: Tensor) -> Tensor:
        """[..., d] after the blocks -> [..., text_vocab + caption_len]."""
        text = self.config.text_logits
        logits: Tensor = F.linear(self.final_norms(x), self.head.weight[:text], self.head.bias[:text])
        return logits

    # Passes.

    def rotary_at(self, positions: slice | Tensor, dtype: torch.dtype) -> Rotary | None:
        """None for a model without rotary positions."""
        return None if self.rotary is None else Rotary.of(self.rotary[positions], self.config.head_dim, dtype)

    def run_blocks(self, x: Tensor, run: Pass) -> Tensor:
        """[B, n, d] -> [B, n, d]."""
        blocks = cast("list[Block]", list(self.blocks))
        if self.config.reversible:  # two streams, their mean at the end
            a = b = x
            for block in blocks:
                a = a + block.attention(b, run)
                b = b + block.mlp(a, run)
            return self.finish((a + b) / 2)
        for block in blocks:
            x = x + block.attention(x, run)
            x = x + block.mlp(x, run)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """What comes between the blocks and the last norm: [B, n, d] -> [B, n, d]."""
        return x / x.amax(-1, keepdim=True) if self.config.divide_by_max else x

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, caption_len] int64 (0: padding), image [B, n] int64 with n <= cells.

        Returns text_logits [B, text_len, text_vocab + caption_len], where position i predicts text-section token i + 1, and
        image_logits [B, min(n + 1, cells), image_vocab], where image_logits[:, j] predicts image token j.
        Raises ValueError for other shapes.
        """
        config, text_len = self.config, self.config.layout.text_len
        if image.ndim != 2 or image.shape[0] != text.shape[0] or image.shape[1] > config.cells:
            raise ValueError(f"got image {list(image.shape)}, expected [{text.shape[0]}, up to {config.cells}]")
        section = self.text_section(text)
        parts = [self.embed_section(section)[:, :text_len]]
        if config.start != "none":
            parts.append(self.embed_start(section))
        parts.append(self.embed_image(image[:, : config.cells - 1]))  # the last token predicts nothing
        x = torch.cat(parts, dim=1)
        x = self.run_blocks(x, FullPass(self.masks, self.rotary_at(slice(x.shape[1]), x.dtype)))
        return self.text_logits(x[:, :text_len]), self.image_logits(x[:, text_len - 1 + config.first_cell :])

    def loss(self, text: Tensor, image: Tensor) -> Tensor:
        """1/8 of the mean text cross-entropy (padding included, as the paper trains it) + 7/8 of the image's; nats."""
        text_logits, image_logits = self(text, image)
        targets = self.text_section(text)[:, 1:]
        text_logits = text_logits[:, : targets.shape[1]]
        text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), targets[:, : text_logits.shape[1]].flatten())
        image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), image.flatten())
        return text_loss / 8 + image_loss * 7 / 8

    def prefill(self, text: Tensor, cache: Cache) -> Tensor:
        """Fills the cache's prefix from captions [P, caption_len] and, where the model has a start cell, cell 0 of every
        candidate. Returns the logits of image token 0, [P * candidates, image_vocab]."""
        section, text_len = self.text_section(text), self.config.layout.text_len
        x = self.embed_section(section)[:, :text_len]
        x = self.run_blocks(x, PrefixPass(cache, self.rotary_at(slice(text_len), x.dtype)))
        group = cache.batch // cache.prompts
        cache.position.zero_()
        if self.config.start == "none":
            return self.image_logits(x[:, -1]).repeat_interleave(group, dim=0)
        return self.advance(self.embed_start(section).repeat_interleave(group, dim=0), cache)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Appends image tokens [B, n], n <= cache.chunk, and returns the logits of the next token, [B, image_vocab]."""
        return self.advance(self.embed_image(tokens, cache.next_cell - self.config.first_cell), cache)

    def advance(self, x: Tensor, cache: Cache) -> Tensor:
        """`step` from the embedded tokens [B, n, d]. Raises ValueError for cells that the cache can't take."""
        cache.check(x, self.config)
        text_len, n = self.config.layout.text_len, x.shape[1]
        run = StepPass(cache, n, None)
        if self.rotary is not None:
            run.rotary = self.rotary_at(text_len + run.cells, x.dtype)
        x = self.run_blocks(x, run)
        cache.position += n
        return self.image_logits(x[:, -1])

    # Files.

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, each complete or not at all."""
        weights.write_text(Path(folder) / "config.json", self.config.to_json())
        weights.save(Path(folder) / "model.safetensors", self.state_dict())

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DalleModel:
        """Reads what save wrote. Raises weights.WeightError, naming every key that is missing, unexpected or of another
        shape, and every tensor that is not finite; or that a file can't be read."""
        config = ModelConfig.from_json(weights.read_text(Path(folder) / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        # Angles keep their type: in half precision those of a caption's end are off by whole radians.
        path, expected = Path(folder) / "model.safetensors", model.state_dict()
        state = weights.load(path, expected, dtype=dtype, device=device, exact=("rotary",))
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)


def open_weights(folder: str | Path) -> tuple[ModelConfig, WeightFile]:
    """What DalleModel.save wrote, each parameter read when asked for. Raises as DalleModel.load does."""
    config = ModelConfig.from_json(weights.read_text(Path(folder) / "config.json"))
    with torch.device("meta"):
        expected = DalleModel(config).state_dict()
    return config, WeightFile(Path(folder) / "model.safetensors", expected)


def rotary_table(config: ModelConfig) -> Tensor:
    """DALLE-pytorch's angles [total, R], each repeated for the two channels it turns: a third of the head for the text
    position (image: 8192), a third each for row and column in "pixel" frequencies over -1 … 1 (text: -10)."""
    layout, pairs = config.layout, config.head_dim // 3 // 2
    language = 10000.0 ** (-torch.arange(pairs) * 2 / (config.head_dim // 3))
    pixel = torch.linspace(1.0, 5.0, pairs) * math.pi
    text = torch.cat([torch.arange(layout.text_len, dtype=torch.float32), torch.full((layout.cells,), 8192.0)])
    rows = torch.linspace(-1, 1, layout.height)[:, None].expand(-1, layout.width).reshape(-1)
    columns = torch.linspace(-1, 1, layout.width)[None].expand(layout.height, -1).reshape(-1)
    outside = torch.full((layout.text_len,), -10.0)
    angles = [
        text[:, None] * language,
        torch.cat([outside, rows])[:, None] * pixel,
        torch.cat([outside, columns])[:, None] * pixel,
    ]
    return torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
