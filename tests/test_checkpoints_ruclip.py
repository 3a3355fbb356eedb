"""ruCLIP: its own model and ours give the same embeddings of the same captions and pictures."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import peer_packages
import pytest
import torch
from helpers import assert_close
from PIL import Image
from test_checkpoints_bpe import encode, train

from dalle_fast import cli
from dalle_fast.ranking import ClipRanker

CONFIG = {
    "embed_dim": 24, "image_resolution": 48, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 16,
    "context_length": 20, "vocab_size": 90, "transformer_width": 64, "transformer_heads": 4, "transformer_layers": 2,
}  # fmt: skip
CAPTIONS = ["Красный куб", "зелёный круг над красным квадратом", "a red cube, 你好", "круг <EOS> куб"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Any]:
    """A folder as ruclip loads it, and its model."""
    torch.manual_seed(0)
    with peer_packages.ruclip() as peer:
        model = peer.CLIP(**CONFIG).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path / "ruclip"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "bpe.model").write_text(train(12)[0])
    return folder, model


def doubled(model: Any) -> Any:
    """Their model in float64, its norms too, which they compute in float32."""
    oracle = copy.deepcopy(model).double()
    for module in oracle.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(torch.nn.LayerNorm.forward, module)
    return oracle


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def test_same_embeddings(source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = source
    assert cli.main(["convert", "ruclip", str(folder), str(tmp_path / "clip")]) == 0
    assert "24 features for pictures of 48 pixels" in capsys.readouterr().out
    ranker = ClipRanker(tmp_path / "clip")
    ids = torch.zeros(len(CAPTIONS), CONFIG["context_length"], dtype=torch.int64)
    _, chars, rules = train(12)
    for row, caption in zip(ids, CAPTIONS, strict=True):
        tokens = [2, *encode(caption.lower(), chars, rules)[: len(row) - 2], 3]
        row[: len(tokens)] = torch.tensor(tokens)
    assert bool((ids[1:2] != 0).all())  # one of them is cut
    oracle = doubled(model)
    assert_close(ranker.embed_texts(CAPTIONS), unit(model.encode_text(ids)), unit(oracle.encode_text(ids)))
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for size in (48, 96, 40)]
    small = [np.asarray(p.resize((48, 48), Image.Resampling.BILINEAR), np.float32) / 255 for p in pictures]
    pixels = torch.from_numpy(((np.stack(small) - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
    assert_close(ranker.embed_images(pictures), unit(model.encode_image(pixels)), unit(oracle.encode_image(pixels)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": "[]"}, "it is no JSON object"),
        ({"config.json": json.dumps(CONFIG | {"embed_dim": 0, "vision_width": 96})}, "embed_dim is 0"),
        ({"config.json": json.dumps(CONFIG | {"embed_dim": 0, "vision_width": 96})}, "vision_width is 96"),
        ({"config.json": json.dumps(CONFIG | {"mean": [1]})}, "mean is [1], expected three numbers"),
        ({"config.json": json.dumps(CONFIG | {"vision_layers": 3})}, "vision_model.encoder.layers.2"),
        ({"config.json": json.dumps(CONFIG | {"vocab_size": 30})}, "expected less than 30"),
        ({"bpe.model": train(12)[0].replace("1 0 2 3\n", "0 1 2 3\n")}, "<PAD> has id 1, expected 0"),
        ({"bpe.model": None}, "bpe.model"),
        ({"pytorch_model.bin": None}, "without weight files"),
    ],
)
def test_bad_input(source, tmp_path: Path, capsys, change: dict[str, str | None], message: str) -> None:
    folder, _ = source
    for name, text in change.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    assert cli.main(["convert", "ruclip", str(folder), str(tmp_path / "clip")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "clip").exists()
