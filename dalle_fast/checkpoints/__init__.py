"""Checkpoints of other projects, converted into a folder that DalleModel.load reads: a module a family."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dalle_fast import weights
from dalle_fast.checkpoints import rudalle, untrusted
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel
from dalle_fast.weights import WeightError

Reader = Callable[..., tuple[ModelConfig, dict[str, torch.Tensor]]]
FAMILIES: dict[str, Reader] = {"rudalle": rudalle.read}


def check(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Every problem: missing and unexpected names, other shapes, types that aren't floating, values that aren't finite."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in sorted(set(state) - set(expected))]
    for name in (name for name in expected if name in state):
        tensor, shape = state[name], expected[name].shape
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected floating point")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name} has values that are not finite")
    return problems


def convert(
    family: str,
    src: str | Path,
    dst: str | Path,
    *,
    trust_pickle: bool = False,
    sha256: str | None = None,
    **options: Any,
) -> ModelConfig:
    """Reads src and writes config.json, model.safetensors and notes.json into the folder dst, each whole or not at all.

    Options of rudalle: version (2 or 3), heads (known for the released sizes). Raises WeightError, listing every problem
    at once, and then leaves dst as it was.
    """
    src, dst = Path(src), Path(dst)
    if family not in FAMILIES:
        raise WeightError(f"got family {family!r}, expected one of {', '.join(FAMILIES)}")
    content, digest = untrusted.read(src, trust_pickle=trust_pickle, expected_sha256=sha256)
    try:
        config, state = FAMILIES[family](content, **options)
    except KeyError as error:
        raise WeightError(f"{src} does not fit {family}: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        raise WeightError(f"{src} does not fit {family}: {error}") from None
    with torch.device("meta"):
        expected = DalleModel(config).state_dict()
    if problems := check(state, expected):
        raise WeightError(f"{src} does not fit {family}: {'; '.join(problems)}")
    notes = {
        "source": src.name,
        "sha256": digest,
        "family": family,
        "options": options,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
    weights.save(dst / "model.safetensors", state)
    weights.write_text(dst / "notes.json", json.dumps(notes, indent=2) + "\n")
    weights.write_text(dst / "config.json", config.to_json())  # last: a folder with a config is complete
    return config
