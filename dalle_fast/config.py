"""What a model of this shape can be: one dataclass, and the presets by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dalle_fast.layout import SequenceLayout
from dalle_fast.masks import Mask, Pattern

STARTS = ("none", "learned", "text")
POSITIONS = ("learned", "rotary")
ACTIVATIONS = ("gelu_tanh", "gelu", "geglu")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer over text and image tokens.

    Text ids: 0 is padding; the pad at caption position j becomes id text_vocab + j, a learned token of its own.

    caption_len    caption tokens, padding included
    text_vocab     text ids without the pads; image_vocab: image codes
    patterns       one a layer, as str(Pattern)
    lead_token     a text id put before the caption (DALLE-pytorch: 0, ruDALL-E v2: 2), or None
    start          what fills image cell 0: "none": the first image token, which the last text position predicts;
                   "learned": a start-of-image embedding, and cell p predicts token p (the paper, as we read its figure 10);
                   "text": the last caption token (ruDALL-E v2, whose mask counts it as a cell)
    positions      "learned": a vector a text position, and row + column vectors; "rotary": DALLE-pytorch's table,
                   applied to queries, keys and values
    activation     "gelu_tanh", "gelu" (erf) or "geglu" (erf; first half value, second half gate)
    sandwich_norm  a second LayerNorm after attention and after the MLP, before each residual add
    final_norms    1, or 2 in a row (ruDALL-E)
    layer_scale    a learned vector on each branch; token_shift, reversible: as in DALLE-pytorch
    divide_by_max  each position's channels are divided by their maximum before the last norm (DALLE-pytorch's `stable`)

    Raises ValueError for a value out of range, naming it.
    """

    dim: int
    layers: int
    heads: int
    patterns: tuple[str, ...]
    head_dim: int = 64
    caption_len: int = 256
    height: int = 32
    width: int = 32
    text_vocab: int = 16384
    image_vocab: int = 8192
    lead_token: int | None = None
    start: str = "learned"
    positions: str = "learned"
    activation: str = "gelu_tanh"
    qkv_bias: bool = True
    sandwich_norm: bool = False
    final_norms: int = 1
    layer_scale: bool = False
    token_shift: bool = False
    reversible: bool = False
    divide_by_max: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "head_dim", "caption_len", "text_vocab", "image_vocab"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"got {name}={getattr(self, name)!r}, expected a whole number from 1")
        for name, known in (("start", STARTS), ("positions", POSITIONS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"got {name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        object.__setattr__(self, "patterns", tuple(str(Pattern.parse(p)) for p in self.patterns))
        if len(self.patterns) != self.layers:
            raise ValueError(f"got {len(self.patterns)} patterns for {self.layers} layers, expected one a layer")
        if self.lead_token is not None and not 0 <= self.lead_token < self.text_vocab:
            raise ValueError(f"got lead_token={self.lead_token}, expected 0 to {self.text_vocab - 1} or null")
        if self.final_norms not in (1, 2):
            raise ValueError(f"got final_norms={self.final_norms}, expected 1 or 2")
        if self.token_shift and self.dim % 4:
            raise ValueError(f"got dim={self.dim} with token_shift, expected a multiple of 4")
        if self.section_len < 1 or self.section_len - (self.start == "text") < 1:
            raise ValueError(f"got caption_len={self.caption_len} with start={self.start!r}, expected at least 2")
        self.layout  # noqa: B018  (its own checks)

    @property
    def section_len(self) -> int:
        """Tokens of the text section: the lead token, if any, and the caption."""
        return self.caption_len + (self.lead_token is not None)

    @property
    def layout(self) -> SequenceLayout:
        """Text positions before the image cells; with start="text" the last caption token is a cell."""
        return SequenceLayout(self.section_len - (self.start == "text"), self.height, self.width)

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def first_cell(self) -> int:
        """The cell of image token 0: 1 if a start cell precedes it."""
        return int(self.start != "none")

    @property
    def text_logits(self) -> int:
        """Rows of the joint head that stand for text: ids and pads."""
        return self.text_vocab + self.caption_len

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return 4 * self.dim

    def masks(self) -> list[Mask]:
        """One a layer."""
        return [Mask(Pattern.parse(p), self.layout) for p in self.patterns]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Raises ValueError for anything but a JSON object of this class's fields."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"got a model config that is no JSON: {error}") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            raise ValueError(
                f"got model config entries {unknown if isinstance(values, dict) else values!r}, expected {sorted(known)}"
            )
        if missing := sorted({"dim", "layers", "heads", "patterns"} - set(values)):
            raise ValueError(f"got a model config without {', '.join(missing)}")
        return cls(**{**values, "patterns": tuple(values["patterns"])})

    def replace(self, **changes: Any) -> ModelConfig:
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """One of PRESETS by name. Raises ValueError for an unknown one."""
        if name not in PRESETS:
            raise ValueError(f"got preset {name!r}, expected one of {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)


def _interleaved(layers: int, last: str) -> tuple[str, ...]:
    """row, column, row, row, row, column, …, and `last` at the end: the order of the paper and of ruDALL-E."""
    return (*("column" if i % 4 == 1 else "row" for i in range(layers - 1)), last)


_RUDALLE: dict[str, Any] = {"caption_len": 128, "start": "none", "sandwich_norm": True, "final_norms": 2}
_FLAT, _CLIP = "conv(kernel=11,boundary=flat)", "conv(kernel=11,boundary=clip)"

PRESETS: dict[str, ModelConfig] = {
    "openai-12b": ModelConfig(dim=3968, layers=64, heads=62, patterns=_interleaved(64, _FLAT)),
    "rudalle-malevich": ModelConfig(
        dim=2048,
        layers=24,
        heads=16,
        head_dim=128,
        patterns=_interleaved(24, _CLIP),
        **_RUDALLE,
    ),
    "rudalle-kandinsky": ModelConfig(dim=3840, layers=64, heads=60, patterns=_interleaved(64, _CLIP), **_RUDALLE),
    "demo": ModelConfig(
        dim=256,
        layers=12,
        heads=4,
        patterns=_interleaved(12, "conv(kernel=5,boundary=flat)"),
        text_vocab=512,
        image_vocab=512,
    ),
    "tiny": ModelConfig(
        dim=64,
        layers=4,
        heads=2,
        head_dim=32,
        patterns=_interleaved(4, "conv(kernel=3,boundary=flat)"),
        caption_len=16,
        height=8,
        width=8,
        text_vocab=64,
        image_vocab=32,
    ),
}
