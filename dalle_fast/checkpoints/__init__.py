"""Checkpoints of other projects, converted into a folder that every command reads: a module a family."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from dalle_fast.checkpoints import bpe, dalle_pytorch, image_tokenizers, ruclip, rudalle, untrusted, writing
from dalle_fast.checkpoints.writing import Part
from dalle_fast.codec import Codec
from dalle_fast.config import ModelConfig
from dalle_fast.images import CODECS
from dalle_fast.model import DalleModel
from dalle_fast.weights import WeightError

Reader = Callable[..., tuple[ModelConfig, dict[str, torch.Tensor]]]
FAMILIES: dict[str, Reader] = {"rudalle": rudalle.read, "dalle-pytorch": dalle_pytorch.read}


def convert(
    family: str,
    src: str | Path,
    dst: str | Path,
    *,
    tokenizer: str | Path | None = None,
    images: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    sha256: str | Collection[str] = (),
    overwrite: bool = False,
    **options: Any,
) -> ModelConfig:
    """Reads a model and writes config.json, model.safetensors and notes.json into the folder dst, all or nothing.

    src        a file, or a folder of shards
    tokenizer  a caption tokenizer (bpe.read says which), written as tokenizer.json
    images     an image tokenizer (image_tokenizers.read), written too; a DALLE-pytorch file holds its own
    dtype      of the weights written; None: as they are
    sha256     the files read must be among these, if any; with trust_pickle, files may hold objects beside tensors
    options    of rudalle: version (2 or 3), heads (known for the released sizes); of dalle-pytorch: version and
               shift_tokens, where the file doesn't say

    Raises WeightError, listing every problem at once, and then leaves dst as it was.
    """
    src, dst = Path(src), Path(dst)
    trusted = (sha256,) if isinstance(sha256, str) else tuple(sha256)
    if family not in FAMILIES:
        raise WeightError(f"got family {family!r}, expected one of {', '.join(FAMILIES)}")
    content, digests = untrusted.read(src, trust_pickle=trust_pickle, trusted=trusted)
    config: ModelConfig
    config, state = _fitting(src, family, FAMILIES[family], content, **options)
    with torch.device("meta"):
        parts = [Part({}, "model.safetensors", state, DalleModel(config).state_dict())]
    codec = None
    if images is not None:
        content, more = untrusted.read(Path(images), trust_pickle=trust_pickle, trusted=trusted)
        digests |= more
    if images is not None or (family == "dalle-pytorch" and any(key.startswith("vae.") for key in content["weights"])):
        codec, part = _fitting(Path(images or src), "an image tokenizer", image_tokenizers.read, content)
        parts.append(part)
        _check_codec(codec, config)
    del content, state  # what is written is dropped: see writing.stream
    texts = {}
    if tokenizer is not None:
        texts["tokenizer.json"] = _caption_tokenizer(Path(tokenizer), family, config)
        digests[Path(tokenizer).name] = untrusted.sha256(Path(tokenizer))
    texts["notes.json"] = _notes(family, digests, options)
    texts["config.json"] = config.to_json()
    parts.append(Part(texts))
    _write(src, family, dst, parts, dtype, overwrite)
    return config


def convert_images(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    sha256: str | Collection[str] = (),
    overwrite: bool = False,
) -> Codec:
    """Reads an image tokenizer alone and writes its two files into the folder dst. Arguments and errors as of convert."""
    src, trusted = Path(src), (sha256,) if isinstance(sha256, str) else tuple(sha256)
    content, _ = untrusted.read(src, trust_pickle=trust_pickle, trusted=trusted)
    codec: Codec
    codec, part = _fitting(src, "an image tokenizer", image_tokenizers.read, content)
    del content
    _write(src, "an image tokenizer", Path(dst), [part], dtype, overwrite)
    return codec


def convert_clip(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    sha256: str | Collection[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Reads a ruCLIP folder (config.json, pytorch_model.bin, bpe.model) and writes one that ranking.ClipRanker loads.

    Returns transformers' configuration. Arguments and errors as of convert.
    """
    src, trusted = Path(src), (sha256,) if isinstance(sha256, str) else tuple(sha256)
    config = ruclip.read_config(src / "config.json")
    content, digests = untrusted.read(src, trust_pickle=trust_pickle, trusted=trusted)
    tokenizer = ruclip.read_tokenizer(src / "bpe.model", config["vocab_size"])
    part: Part = _fitting(src, "ruclip", ruclip.read, content, config=config, tokenizer=tokenizer)
    del content
    digests |= {name: untrusted.sha256(src / name) for name in ("config.json", "bpe.model")}
    part.texts["notes.json"] = _notes("ruclip", digests, {})
    _write(src, "ruclip", Path(dst), [part], dtype, overwrite)
    return ruclip.clip_config(config)


def missing(folder: Path) -> list[str]:
    """What a model folder lacks before captions become pictures."""
    parts = {
        "a caption tokenizer": ["tokenizer.json"],
        "an image tokenizer": [f"{codec.name}.json" for codec in CODECS],
    }
    return [what for what, names in parts.items() if not any((folder / name).exists() for name in names)]


def _fitting(src: Path, what: str, reader: Callable[..., Any], content: Any, **options: Any) -> Any:
    try:
        return reader(content, **options)
    except KeyError as error:
        raise WeightError(f"{src} does not fit {what}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, IndexError) as error:
        raise WeightError(f"{src} does not fit {what}: {error}") from None


def _write(src: Path, what: str, dst: Path, parts: list[Part], dtype: torch.dtype | None, overwrite: bool) -> None:
    try:
        writing.check_all(parts)
    except WeightError as error:
        raise WeightError(f"{src} does not fit {what}: {error}") from None
    with writing.staged(dst, overwrite=overwrite) as folder:
        try:
            writing.write_parts(folder, parts, dtype)
        except WeightError as error:
            raise WeightError(f"{src} does not fit {what}: {error}") from None


def _check_codec(codec: Codec, config: ModelConfig) -> None:
    if codec.vocab_size != config.image_vocab:
        raise WeightError(
            f"got an image tokenizer of {codec.vocab_size} codes, expected the model's {config.image_vocab}"
        )


def _caption_tokenizer(path: Path, family: str, config: ModelConfig) -> str:
    tokenizer = bpe.read(path, family)
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.text_vocab:
        raise WeightError(f"got tokenizer {path} with ids up to {highest}, expected less than {config.text_vocab}")
    return str(tokenizer.to_str(pretty=False))


def _notes(family: str, digests: dict[str, str], options: dict[str, Any]) -> str:
    """Where a model came from."""
    notes = {
        "family": family,
        "sources": digests,
        "options": {name: value for name, value in options.items() if value is not None},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
    return json.dumps(notes, indent=2) + "\n"
