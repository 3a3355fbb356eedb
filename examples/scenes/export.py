"""Puts trained models together as one model folder, in float16: what Pipeline.load reads.

`python -m examples.scenes.export --model out/model --dvae out/dvae --clip out/clip --to FOLDER`. The transformer comes
from its checkpoint, so a run still going on can be tried out (with the text section that it has so far).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from dalle_fast.model import DalleModel

from .train_transformer import config_of

DVAE_FILES = ("dvae.json", "dvae.safetensors")
CLIP_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)


def transformer_of(checkpoint: Path) -> tuple[DalleModel, int]:
    """The model in a checkpoint of train_transformer, and the steps it has seen."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = state["model"]
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = DalleModel(config_of(weights["text_positions"].shape[1], layers, state["text"]))
    model.load_state_dict(weights)
    return model, state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "dvae", "clip", "to"):
        parser.add_argument(f"--{name}", type=Path, required=name != "clip", metavar="FOLDER")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    model, steps = transformer_of(args.model / "training.pt")
    model.half().save(args.to)
    shutil.copyfile(args.model / "tokenizer.json", args.to / "tokenizer.json")
    for name in DVAE_FILES:
        shutil.copyfile(args.dvae / name, args.to / name)
    if args.clip:
        (args.to / "clip").mkdir(exist_ok=True)
        for name in CLIP_FILES:
            shutil.copyfile(args.clip / name, args.to / "clip" / name)
    size = sum(path.stat().st_size for path in args.to.rglob("*") if path.is_file())
    print(f"{args.to}: step {steps}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
