"""ruCLIP (ruclip 0.0.2): a folder of config.json, pytorch_model.bin and bpe.model, turned into one of transformers' CLIPModel.

Both towers are OpenAI CLIP's. Captions are lowered, stand between the ids 2 and 3, are padded with 0 and read at the 3;
pictures are scaled bilinearly. These ids are fixed in ruclip's code, whatever bpe.model says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast import weights
from dalle_fast.checkpoints import bpe
from dalle_fast.checkpoints.writing import Part
from dalle_fast.ranking import MEAN, STD
from dalle_fast.weights import WeightError

SIZES = (
    *("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length"),
    *("vocab_size", "transformer_width", "transformer_heads", "transformer_layers"),
)
SPECIAL = {"pad": ("<PAD>", 0), "unk": ("<UNK>", 1), "bos": ("<BOS>", 2), "eos": ("<EOS>", 3)}
VISION_HEAD = 64  # channels
BILINEAR = 2  # Pillow's number, which preprocessor_config.json holds
_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers spells it so
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = (
    ("transformer", "text_model", "transformer_layers"),
    ("visual.transformer", "vision_model", "vision_layers"),
)


def read_config(path: Path) -> dict[str, Any]:
    """ruCLIP's config.json. Raises WeightError that names every value which is missing or out of range."""
    try:
        config = json.loads(weights.read_text(path))
    except json.JSONDecodeError as error:
        raise WeightError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise WeightError(f"cannot read {path}: it is no JSON object")
    wrong = [name for name in SIZES if type(config.get(name)) is not int or config[name] < 1]
    problems = [f"{name} is {config.get(name)!r}, expected a whole number from 1" for name in wrong]
    heads = ("transformer_width", "transformer_heads")
    if not set(heads) & set(wrong) and config[heads[0]] % config[heads[1]]:
        problems.append(f"transformer_width is {config[heads[0]]}, expected a multiple of {config[heads[1]]} heads")
    if "vision_width" not in wrong and config["vision_width"] % VISION_HEAD:
        problems.append(f"vision_width is {config['vision_width']}, expected a multiple of {VISION_HEAD}")
    for name in ("mean", "std"):
        values = config.get(name) or [1, 1, 1]  # ruclip takes CLIP's where the file has none
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(x, int | float) for x in values)):
            problems.append(f"{name} is {values!r}, expected three numbers")
    if problems:
        raise WeightError(f"{path} does not fit ruclip: {'; '.join(problems)}")
    return config


def read(content: Any, config: Mapping[str, Any], tokenizer: str) -> Part:
    """The files of the CLIP folder. Raises ValueError for content that is no state dict."""
    if not isinstance(content, Mapping) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError("got a file that is no flat dictionary of tensors, expected ruCLIP's pytorch_model.bin")
    texts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config["context_length"],
                "split_special_tokens": True,  # youtokentome takes a written <EOS> letter by letter
                **{f"{kind}_token": name for kind, (name, _) in SPECIAL.items()},
            }
        ),
        "preprocessor_config.json": _json(_preprocessor(config)),
        "config.json": _json(clip_config(config)),
    }
    return Part(texts, "model.safetensors", tensors(content, config), _expected(config))


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' CLIPConfig as JSON."""
    same = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": config["embed_dim"]}
    text = {
        "hidden_size": config["transformer_width"],
        "intermediate_size": 4 * config["transformer_width"],
        "num_hidden_layers": config["transformer_layers"],
        "num_attention_heads": config["transformer_heads"],
        "max_position_embeddings": config["context_length"],
        "vocab_size": config["vocab_size"],
        **{f"{kind}_token_id": i for kind, (_, i) in SPECIAL.items() if kind != "unk"},
    }
    vision = {
        "hidden_size": config["vision_width"],
        "intermediate_size": 4 * config["vision_width"],
        "num_hidden_layers": config["vision_layers"],
        "num_attention_heads": config["vision_width"] // VISION_HEAD,
        "image_size": config["image_resolution"],
        "patch_size": config["vision_patch_size"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": {"model_type": "clip_text_model", **same, **text},
        "vision_config": {"model_type": "clip_vision_model", **same, **vision},
    }


def tensors(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """transformers' names; unknown keys keep their own and are found out later."""
    names, pairs = dict(_NAMES), dict(_NORMS)
    result: dict[str, Tensor] = {}
    taken = set(_TURNED)
    for theirs, ours, layers in _TOWERS:
        for i in range(config[layers]):
            block, layer = f"{theirs}.resblocks.{i}", f"{ours}.encoder.layers.{i}"
            pairs |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _BLOCK.items()}
            for end in ("weight", "bias"):
                name = f"{block}.attn.in_proj_{end}"
                if name in state and state[name].ndim:
                    taken.add(name)
                    parts = dict(zip("qkv", torch.tensor_split(state[name], 3), strict=True))
                    result |= {f"{layer}.self_attn.{kind}_proj.{end}": x for kind, x in parts.items()}
    names |= {f"{a}.{end}": f"{b}.{end}" for a, b in pairs.items() for end in ("weight", "bias")}
    result |= {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
    result |= {ours: state[theirs].transpose(0, -1) for theirs, ours in _TURNED.items() if theirs in state}
    return result | {key: state[key] for key in set(state) - set(names) - taken}


def _expected(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name and shape of every tensor, without memory."""
    text, vision, embed = config["transformer_width"], config["vision_width"], config["embed_dim"]
    patch, side = config["vision_patch_size"], config["image_resolution"] // config["vision_patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        _NAMES["token_embedding.weight"]: (config["vocab_size"], text),
        _NAMES["positional_embedding"]: (config["context_length"], text),
        _NAMES["visual.class_embedding"]: (vision,),
        _NAMES["visual.conv1.weight"]: (vision, 3, patch, patch),
        _NAMES["visual.positional_embedding"]: (side**2 + 1, vision),
        "logit_scale": (),
        "text_projection.weight": (embed, text),
        "visual_projection.weight": (embed, vision),
    }
    linears: dict[str, tuple[int, ...]] = {
        _NORMS["ln_final"]: (text,),
        _NORMS["visual.ln_pre"]: (vision,),
        _NORMS["visual.ln_post"]: (vision,),
    }
    for (_, tower, layers), width in zip(_TOWERS, (text, vision), strict=True):
        for i in range(config[layers]):
            layer = f"{tower}.encoder.layers.{i}"
            linears |= {f"{layer}.{norm}": (width,) for norm in ("layer_norm1", "layer_norm2")}
            linears |= {f"{layer}.self_attn.{kind}_proj": (width, width) for kind in ("q", "k", "v", "out")}
            linears |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_tokenizer(path: Path, vocab_size: int) -> str:
    """bpe.model as tokenizer.json. Raises WeightError if it can't be read or its ids aren't those of the model."""
    tokenizer = bpe.read(path, "rudalle")  # lowered, between <BOS> and <EOS>, as ruDALL-E has it
    problems = [
        f"{name} has id {tokenizer.token_to_id(name)}, expected {i}"
        for name, i in SPECIAL.values()
        if tokenizer.token_to_id(name) != i
    ]
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        problems.append(f"ids go up to {highest}, expected less than {vocab_size}")
    if problems:
        raise WeightError(f"{path} does not fit ruclip: {'; '.join(problems)}")
    return str(tokenizer.to_str(pretty=False))


def _preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its RandomResizedCrop(scale=1, ratio=1) is not random: the largest central square, scaled bilinearly. transformers can
    only scale first, which is the same for square pictures."""
    size = config["image_resolution"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": config.get("mean") or list(MEAN),
        "image_std": config.get("std") or list(STD),
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
