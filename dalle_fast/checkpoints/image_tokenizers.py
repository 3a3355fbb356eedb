"""Image tokenizers: VQGANs of taming-transformers (also ruDALL-E's), DALLE-pytorch's DiscreteVAE, OpenAI's dVAE.

Which of them a file holds, and its sizes, are read off the names and shapes of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_fast.checkpoints.untrusted import Inert, module_tensors
from dalle_fast.checkpoints.writing import Part
from dalle_fast.codec import Codec
from dalle_fast.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dalle_fast.images import DVAE, DVAEConfig
from dalle_fast.vqgan import VQGAN, VQGANConfig

State = dict[str, Tensor]


def read(content: Any) -> tuple[Codec, Part]:
    """The image tokenizer (without memory, on the meta device) and its files.

    Raises ValueError if the content holds none that is known, KeyError for a key that the sizes need.
    """
    if isinstance(content, Inert):
        content = dict(module_tensors(content))
    if not isinstance(content, Mapping):
        raise ValueError("got a file that is no dictionary, expected an image tokenizer")
    hparams = content.get("vae_params") or content.get("hparams")
    for key in ("state_dict", "weights"):  # Lightning's, as taming writes it; DALLE-pytorch's
        if isinstance(content.get(key), Mapping):
            content = content[key]
    state = {str(key): x for key, x in content.items() if isinstance(x, Tensor)}
    for prefix in ("vae.", "model."):  # inside a DALLE; inside DALLE-pytorch's VQGanVAE
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    if "codebook.weight" in state:
        return _discrete_vae(state, hparams if isinstance(hparams, Mapping) else {})
    if any(key.startswith("quantize.") for key in state):
        return _vqgan(state)
    if any(re.match(r"(enc|dec)(oder)?\.blocks\.", key) for key in state):
        return _dvae(state)
    raise ValueError("got a file without a VQGAN, a DiscreteVAE or OpenAI's dVAE")


def _count(state: State, pattern: str) -> int:
    """How many numbers the pattern's group takes."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _part(kind: type[Codec], config: Any, state: State) -> tuple[Codec, Part]:
    with torch.device("meta"):
        codec = kind(config)
    texts = {f"{codec.name}.json": codec.config_json()}
    return codec, Part(texts, f"{codec.name}.safetensors", state, codec.state_dict())


def _vqgan(state: State) -> tuple[Codec, Part]:
    state = {key: x for key, x in state.items() if not key.startswith("loss.")}  # the critics that trained it
    if "quantize.used" in state:
        raise ValueError("got a VQGAN whose codes are remapped, expected one without")
    gumbel = "quantize.embed.weight" in state
    codebook = state["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    channels, levels = state["encoder.conv_in.weight"].shape[0], _count(state, r"encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    config = VQGANConfig(
        vocab_size=codebook.shape[0],
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state),
        code_channels=state["encoder.conv_out.weight"].shape[0],
        embed_dim=codebook.shape[1],
        gumbel=gumbel,
    )
    return _part(VQGAN, config, state)


def _discrete_vae(state: State, hparams: Mapping[str, Any]) -> tuple[Codec, Part]:
    vocab_size, embed_dim = state["codebook.weight"].shape
    mean, deviation = hparams.get("normalization") or ((0.5,) * 3, (0.5,) * 3)
    config = DiscreteVAEConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        layers=_count(state, r"encoder\.(\d+)\.0\.weight"),
        blocks=_count(state, r"encoder\.(\d+)\.net\."),
        hidden=state["encoder.0.0.weight"].shape[0],
        mean=tuple(mean[:3]),  # 1.6.6 writes a fourth number for pictures with transparency
        deviation=tuple(deviation[:3]),
    )
    return _part(DiscreteVAE, config, state)


def _dvae(state: State) -> tuple[Codec, Part]:
    state = {re.sub(r"^(enc|dec)\.", r"\1oder.", key): x for key, x in state.items()}
    config = DVAEConfig(
        vocab_size=state["decoder.blocks.input.w"].shape[1],
        hidden=state["encoder.blocks.input.w"].shape[0],
        blocks_per_group=_count(state, r"encoder\.blocks\.group_1\.block_(\d+)\."),
        decoder_init=state["decoder.blocks.input.w"].shape[0],
    )
    return _part(DVAE, config, state)
