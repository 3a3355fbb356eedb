"""OpenAI's dVAE: encoder.pkl and decoder.pkl are whole modules, read without running any code of theirs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import peer_packages
import pytest
import torch
from helpers import assert_close

from dalle_fast import cli
from dalle_fast.images import load_codec, map_pixels, unmap_pixels


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder of two pickles of OpenAI's own classes with random weights, and the modules."""
    torch.manual_seed(0)
    with peer_packages.dall_e() as (encoders, decoders):
        encoder = encoders.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512, use_mixed_precision=False)
        decoder = decoders.Decoder(n_hid=64, n_blk_per_group=1, n_init=32, vocab_size=512, use_mixed_precision=False)
        (tmp_path / "openai").mkdir()
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.02)
            torch.save(module, tmp_path / "openai" / f"{name}.pkl")
    return tmp_path / "openai", encoder, decoder


def digests(folder: Path) -> list[str]:
    files = sorted(folder.iterdir())
    return [part for file in files for part in ("--sha256", hashlib.sha256(file.read_bytes()).hexdigest())]


def conv(module: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv2d(x, module.w, module.b, padding=(module.kw - 1) // 2)


@torch.no_grad()
def test_same_tokens_and_pictures(source, tmp_path: Path) -> None:
    folder, encoder, decoder = source
    command = ["convert", "images", str(folder), str(tmp_path / "out"), "--trust-pickle", *digests(folder)]
    assert cli.main(command) == 0
    codec = load_codec(tmp_path / "out")
    x = torch.rand(2, 3, 32, 40)
    tokens = codec.encode(x)
    logits = encoder(map_pixels(x))
    assert tokens.shape == (2, 4, 5) and torch.equal(tokens, logits.argmax(1)) and len(tokens.unique()) > 5
    z = torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
    plain = unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
    for module in decoder.double().modules():  # their convolutions are float32's, whatever the weights are
        if hasattr(module, "kw"):
            module.forward = functools.partial(conv, module)
    oracle = unmap_pixels(torch.sigmoid(decoder.blocks(z.double())[:, :3]))
    assert_close(codec.decode(tokens), plain, oracle)
    assert plain.std() > 0.01


def test_not_without_trust(source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, *_ = source
    command = ["convert", "images", str(folder), str(tmp_path / "out")]
    right = digests(folder)
    for more, message in (
        ([], "it holds objects of dall_e."),
        (right, "it holds objects of dall_e."),
        (["--trust-pickle"], "expected the one of each file that you trust"),
        (["--trust-pickle", *right[:2]], "encoder.pkl with SHA-256"),  # the decoder's alone
        (["--trust-pickle", "--sha256", "0" * 64], "expected " + "0" * 64),
    ):
        assert cli.main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
