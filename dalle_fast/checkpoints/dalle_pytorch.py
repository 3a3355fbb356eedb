"""DALLE-pytorch 1.0 to 1.6: the file its training script writes, {hparams, vae_params, version, weights, …}.

What the tensors show is taken from them (sizes, positions, norms, LayerScale, reversible, tied embeddings); the rest is
in hparams. The image begins at 257: a leading token 0 stands before 256 caption tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle_fast.config import ModelConfig
from dalle_fast.model import rotary_table

# Wrappers around a branch (norm, token shift, cache) differ between versions: any number of fn.
_BRANCH = re.compile(r"transformer\.layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.(.+)")
_NAMES = (
    (re.compile(r"scale"), "{branch}_scale"),
    (re.compile(r"fn\.norm\.(weight|bias)"), "{branch}_norm.{0}"),
    (re.compile(r"fn\.norm_out\.(weight|bias)"), "{branch}_norm_out.{0}"),
    (re.compile(r"(?:fn\.)+to_qkv\.(weight)"), "qkv.{0}"),
    (re.compile(r"(?:fn\.)+to_out\.0\.(weight|bias)"), "out.{0}"),
    (re.compile(r"(?:fn\.)+net\.0\.(weight|bias)"), "up.{0}"),
    (re.compile(r"(?:fn\.)+net\.3\.(weight|bias)"), "down.{0}"),
)
_PATTERNS = {
    "full": "full",
    "axial_row": "row(window=in_row)",
    "axial_col": "column",
    "conv_like": "conv(kernel=5,boundary=quadrant)",
}
# Before 1.5.0 the 5x5 window was centred, with a causal mask; the weights look the same.
_CENTRED = "conv(kernel=5,boundary=clip)"
_OUTSIDE = {
    "to_logits.0.weight": "final_norms.0.weight",
    "to_logits.0.bias": "final_norms.0.bias",
    "to_logits.1.weight": "head.weight",
    "to_logits.1.bias": "head.bias",
    "text_emb.weight": "text_embedding.weight",
    "image_emb.weight": "image_embedding.weight",
    "text_pos_emb.weight": "text_positions",
}
_AXIAL = re.compile(r"image_pos_emb\.(?:weights\.|weights_)([01])")
_REPEATED = re.compile(r"(text|image)_emb\.linear\.(weight|bias)")  # tied embeddings: the head once more


def our_name(key: str) -> str | None:
    """The parameter that a key of theirs becomes, if it is one of a layer."""
    if not (match := _BRANCH.fullmatch(key)):
        return None
    index, branch = match[1] or match[3], "attention" if (match[2] or match[4]) in "0f" else "mlp"
    for pattern, name in _NAMES:
        if found := pattern.fullmatch(match[5]):
            return f"blocks.{index}." + name.format(*found.groups(), branch=branch)
    return None


def config(state: Mapping[str, Tensor], hparams: Mapping[str, Any], version: str) -> ModelConfig:
    """Raises KeyError for a key that the sizes need, ValueError for what no config of ours can say."""
    names = {our_name(key) for key in state} - {None}
    layers = 1 + max((int(str(name).split(".")[1]) for name in names), default=-1)
    rows, dim = state["to_logits.1.weight"].shape
    caption_len = int(hparams["text_seq_len"])
    text_vocab = int(hparams["num_text_tokens"])
    rotary = "transformer.pos_emb" in state
    if rotary:
        angles = state["transformer.pos_emb"]
        angles = angles.reshape(-1, angles.shape[-1])
        side = math.isqrt(len(angles) - caption_len)  # 1.1.1 and later: caption_len + 1 + cells; earlier one fewer
        if len(angles) not in (caption_len + side**2, caption_len + side**2 + 1):
            raise ValueError(f"got {len(angles)} rotary positions for {caption_len} caption tokens and a square image")
    else:
        side = next((x.numel() // dim for key, x in state.items() if _AXIAL.fullmatch(key)), 0)
        if not side:
            raise KeyError("transformer.pos_emb or image_pos_emb")
    return ModelConfig(
        dim=dim,
        layers=layers,
        heads=int(hparams["heads"]),
        head_dim=int(hparams["dim_head"]),
        patterns=patterns(hparams.get("attn_types"), layers, version),
        caption_len=caption_len,
        height=side,
        width=side,
        text_vocab=text_vocab,
        image_vocab=rows - text_vocab - caption_len,
        lead_token=0,
        start="none",
        positions="rotary" if rotary else "learned",
        activation="geglu",
        qkv_bias=False,
        sandwich_norm=any(str(name).endswith("_norm_out.weight") for name in names),
        layer_scale=any(str(name).endswith("_scale") for name in names),
        token_shift=bool(hparams["shift_tokens"]),
        reversible=any(key.startswith("transformer.layers.blocks.") for key in state),
        divide_by_max=bool(hparams.get("stable")),
    )


def patterns(kinds: Any, layers: int, version: str) -> tuple[str, ...]:
    """Raises ValueError for an attention that can't be rebuilt from a checkpoint, or one whose version must be known."""
    kinds = tuple(kinds.split(",") if isinstance(kinds, str) else kinds or ("full",))
    if unknown := sorted({kind for kind in kinds if kind not in _PATTERNS}):
        why = "; its random blocks are drawn anew by every run and not saved" if "sparse" in unknown else ""
        raise ValueError(f"got attention {', '.join(unknown)}, expected {', '.join(_PATTERNS)}{why}")
    known = dict(_PATTERNS)
    if "conv_like" in kinds:
        numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
        if len(numbers) < 2:
            raise ValueError(
                "got conv_like layers and no version, expected the dalle-pytorch that trained it (1.5.0 …)"
            )
        if numbers < [1, 5]:
            known["conv_like"] = _CENTRED
    return tuple(known[kinds[i % len(kinds)]] for i in range(layers))


def tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names; unknown keys keep theirs and are found out later. The image tokenizer's keys, vae.*, are left out."""
    result: dict[str, Tensor] = {}
    for key, x in state.items():
        if key.startswith("vae.") or key.endswith(".static_mask") or _REPEATED.fullmatch(key):
            continue
        if name := our_name(key):
            result[name] = x.reshape(-1) if name.endswith("_scale") else x
        elif axial := _AXIAL.fullmatch(key):
            name = ("row", "column")[int(axial[1])] + "_positions"
            result[name] = x.reshape(-1, x.shape[-1])
        elif key == "transformer.pos_emb":
            result["rotary"] = _angles(x.reshape(-1, x.shape[-1]), config)
        else:
            result[_OUTSIDE.get(key, key)] = x
    if "text_embedding.weight" not in result and "head.weight" in result:  # tied
        head = result["head.weight"]
        result["text_embedding.weight"] = head[: config.text_logits]
        result["image_embedding.weight"] = head[config.text_logits :]
    return result


def _angles(stored: Tensor, config: ModelConfig) -> Tensor:
    """Their buffer, with the last cell's angles where it has none (before 1.1.1): drawing never feeds the last cell."""
    if len(stored) == config.layout.total - 1:
        own = rotary_table(config)
        if own.shape[1] == stored.shape[1]:
            return own.index_copy_(0, own.new_tensor(range(len(stored))).long(), stored.to(own.dtype))
    return stored


def read(
    content: Any,
    *,
    version: str | None = None,
    shift_tokens: bool | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """version: the dalle-pytorch that trained the model, shift_tokens: whether it shifts tokens, where the file doesn't say.

    Raises ValueError for options or content that don't fit; KeyError for a key that the sizes need.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("hparams"), Mapping):
        raise ValueError("got a file without hparams, expected one that DALLE-pytorch's training script wrote")
    state = content.get("weights")
    if isinstance(state, str):
        raise ValueError("got DeepSpeed's auxiliary file, expected a checkpoint joined by its zero_to_fp32.py")
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError("got a file whose weights are no dictionary of tensors")
    hparams = dict(content["hparams"])
    if shift_tokens is not None:
        hparams["shift_tokens"] = shift_tokens
    if "shift_tokens" not in hparams:
        raise ValueError("got hparams without shift_tokens, expected to be told whether the model shifts tokens")
    found = config(state, hparams, str(version or content.get("version") or ""))
    return found, tensors(state, found)
