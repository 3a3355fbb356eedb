"""`dalle-fast convert`: a checkpoint of another project becomes a folder that every command reads (docs/checkpoints.md)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make a checkpoint of another project a model folder"
FAMILIES = ("rudalle", "dalle-pytorch", "images", "ruclip")
ALONE = {"images": "an image tokenizer", "ruclip": "a CLIP model"}


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "family",
        choices=FAMILIES,
        help="whose file it is; images: an image tokenizer alone; ruclip: a CLIP to rank with",
    )
    option("source", type=Path, help="a file, or a folder of its shards")
    option("folder", type=Path, help="what is written; made if it isn't there")
    option(
        "--tokenizer", type=Path, metavar="FILE", help="captions: youtokentome's model, CLIP's merges, tokenizers' JSON"
    )
    option("--images", type=Path, metavar="FILE", help="image tokenizer: VQGAN, DiscreteVAE, OpenAI's dVAE")
    option("--model-version", metavar="V", help="rudalle: 2 or 3; dalle-pytorch: 1.4.2 …, if the file doesn't say")
    option("--heads", type=int, help="rudalle of another width than the released models: attention heads")
    option("--shift-tokens", choices=("yes", "no"), help="dalle-pytorch, if the file doesn't say")
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written; as they are by default")
    option(
        "--trust-pickle",
        action="store_true",
        help="also read files that hold other objects than tensors; needs --sha256",
    )
    option(
        "--sha256", action="append", default=[], metavar="HEX", help="only read files with this digest; may be repeated"
    )
    option("--overwrite", action="store_true", help="replace files of the folder")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from dalle_fast import checkpoints

    how: dict[str, Any] = {
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "trust_pickle": arguments.trust_pickle,
        "sha256": arguments.sha256,
        "overwrite": arguments.overwrite,
    }
    if arguments.family in ALONE:
        for name in ("tokenizer", "images", "model_version", "heads", "shift_tokens"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"got --{name.replace('_', '-')} for {ALONE[arguments.family]}, which has none")
    if arguments.family == "ruclip":
        clip = checkpoints.convert_clip(arguments.source, arguments.folder, **how)
        size, width = clip["vision_config"]["image_size"], clip["projection_dim"]
        print(f"CLIP of {width} features for pictures of {size} pixels: rank with --clip {arguments.folder}")
        return 0
    if arguments.family == "images":
        codec = checkpoints.convert_images(arguments.source, arguments.folder, **how)
        print(f"{codec.name} of {codec.vocab_size} codes: {arguments.folder}")
        return 0
    config = checkpoints.convert(
        arguments.family,
        arguments.source,
        arguments.folder,
        tokenizer=arguments.tokenizer,
        images=arguments.images,
        **how,
        **_of_family(arguments),
    )
    print(f"{config.layers} layers of width {config.dim}: {arguments.folder}")
    if missing := checkpoints.missing(arguments.folder):
        print(f"the folder still needs {' and '.join(missing)} to draw pictures of captions")
    return 0


def _of_family(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises ValueError for an option that the family doesn't have."""
    version, heads, shift = arguments.model_version, arguments.heads, arguments.shift_tokens
    if arguments.family == "rudalle":
        if shift is not None:
            raise ValueError("got --shift-tokens for rudalle, which never shifts")
        if version not in ("2", "3"):
            raise ValueError(
                f"got --model-version {version}, expected 3 (Malevich, Surrealist, Kandinsky) or 2 (Malevich_v2, Emojich)"
            )
        return {"version": int(version), "heads": heads}
    if heads is not None:
        raise ValueError("got --heads for dalle-pytorch, whose file says how many")
    return {"version": version, "shift_tokens": None if shift is None else shift == "yes"}
