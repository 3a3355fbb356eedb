"""The training programs: killed and started again they end with the same weights as a run left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed

from dalle_fast.images import DVAE
from dalle_fast.model import DalleModel
from examples.scenes import export, steady_codes, train_clip, train_dvae, train_transformer


@pytest.fixture(scope="module")
def codebook() -> steady_codes.Codebook:
    return steady_codes.Codebook.build(160, scenes=80)


@pytest.fixture(autouse=True)
def small(monkeypatch, codebook) -> None:
    """Codes that are built once, and few steps for the pads."""
    monkeypatch.setattr(steady_codes.Codebook, "build", lambda vocab: codebook)
    monkeypatch.setattr(train_transformer, "PAD_STEPS", 2)


def killed_at(monkeypatch, owner, name: str, call: int) -> None:
    """The `call`-th call of owner.name raises KeyboardInterrupt."""
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def run(monkeypatch, program, out: Path, options: str, kill: tuple | None = None) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *options.split()])
    if kill is None:
        program.main()
        return
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, *kill)
        program.main()
    program.main()


def test_transformer(monkeypatch, tmp_path, capsys) -> None:
    options = "--dim 64 --layers 2 --batch 2 --steps 6 --decay 4 --long-text 3 --save-every 2 --device cpu"
    run(monkeypatch, train_transformer, tmp_path / "a", options)
    # Killed at step 4, in the steps with the whole text section, which started at step 3: goes on after step 4's save.
    run(monkeypatch, train_transformer, tmp_path / "b", options, (train_transformer.Training, "step", 6))
    a, b = (DalleModel.load(tmp_path / name) for name in "ab")
    assert a.config.caption_len == 256
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    model, step = export.transformer_of(tmp_path / "a" / "training.pt")
    assert step == 6 and model.config == a.config
    assert "12 sequences seen" in capsys.readouterr().out


def test_dvae(monkeypatch, tmp_path) -> None:
    options = "--steps 3 --batch 2 --scenes 6 --hidden 8 --vocab 160 --device cpu"
    monkeypatch.setattr(train_dvae, "quality", lambda *args: (0.0, 0.0))
    for name in "ab":
        run(monkeypatch, train_dvae, tmp_path / name, options)
    a, b = (DVAE.load(tmp_path / name).state_dict() for name in "ab")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_clip(monkeypatch, tmp_path) -> None:
    options = "--steps 4 --groups 3 --width 64 --layers 1 --text-layers 1 --patch 32"
    monkeypatch.setattr(train_clip, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_clip, "quality", lambda *args: {})
    run(monkeypatch, train_clip, tmp_path / "a", options)
    run(monkeypatch, train_clip, tmp_path / "b", options, (train_clip, "Batch", 4))
    a, b = (torch.load(tmp_path / name / "training.pt", weights_only=True)["model"] for name in "ab")
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
