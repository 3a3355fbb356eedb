"""ruDALL-E (rudalle 1.1.3): a flat state dict. The file doesn't say which of two mask readings it was trained with:
v3 (Malevich, Surrealist, Kandinsky) or v2 (Malevich_v2, Emojich: a leading token 2, toroidal convolution, the last
caption slot counted as image cell 0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle_fast.config import ModelConfig

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_norm_out": "before_first_addition_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_norm_out": "before_second_addition_layernorm",
}
_LINEARS = {
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def config(state: Mapping[str, Tensor], *, version: int, heads: int) -> ModelConfig:
    """Sizes from the tensors; heads can't be seen in them. Raises KeyError for a key that is missing."""
    dim = state["text_embeddings.weight"].shape[1]
    caption_len = state["text_pos_embeddings.weight"].shape[0] - 1
    layers = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("transformer.layers.")), default=-1)
    boundary = "clip" if version == 3 else "torus"
    patterns = ["column" if i % 4 == 1 else "row" for i in range(layers)]
    if layers and patterns[-1] == "row":  # their rule: column first, else convolution if last
        patterns[-1] = f"conv(kernel=11,boundary={boundary})"
    return ModelConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        head_dim=dim // heads,
        patterns=tuple(patterns),
        caption_len=caption_len,
        height=state["image_row_embeddings.weight"].shape[0],
        width=state["image_col_embeddings.weight"].shape[0],
        text_vocab=state["text_embeddings.weight"].shape[0] - caption_len,
        image_vocab=state["image_embeddings.weight"].shape[0],
        lead_token=None if version == 3 else 2,
        start="none" if version == 3 else "text",
        sandwich_norm=True,
        final_norms=2,
    )


def tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names; what is missing in the file is missing here. Unknown keys keep their names and are found out later."""
    names = {
        "text_embedding.weight": "text_embeddings.weight",
        "image_embedding.weight": "image_embeddings.weight",
        "row_positions": "image_row_embeddings.weight",
        "column_positions": "image_col_embeddings.weight",
    }
    pairs = {"final_norms.0": "transformer.final_layernorm", "final_norms.1": "to_logits.0", "head": "to_logits.1"}
    for i in range(config.layers):
        pairs |= {f"blocks.{i}.{a}": f"transformer.layers.{i}.{b}" for a, b in (_NORMS | _LINEARS).items()}
    names |= {f"{a}.{end}": f"{b}.{end}" for a, b in pairs.items() for end in ("weight", "bias")}
    ignored = {"text_pos_embeddings.weight", *(f"transformer.{m}_mask" for m in ("row", "col", "conv"))}
    result = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    result["text_positions"] = state["text_pos_embeddings.weight"][: config.section_len]
    return result | {key: state[key] for key in set(state) - set(names.values()) - ignored}


def read(
    content: Any, *, version: int | None = None, heads: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Raises ValueError for options or content that don't fit; KeyError for a key that the sizes need."""
    if version not in (2, 3):
        raise ValueError(
            f"got version={version!r}, expected 3 (Malevich, Surrealist, Kandinsky) or 2 (Malevich_v2, Emojich)"
        )
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError("got a file that is no flat dictionary of tensors, expected ruDALL-E's pytorch_model.bin")
    dim = content["text_embeddings.weight"].shape[1]
    heads = heads or {2048: 16, 3840: 60}.get(dim)
    if not heads or dim % heads:
        raise ValueError(f"got heads={heads} for dim={dim}, expected a divisor of it")
    found = config(content, version=version, heads=heads)
    return found, tensors(content, found)
