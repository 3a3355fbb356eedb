"""Converted ruDALL-E checkpoints against rudalle 1.1.3's own code: random weights, float64."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer_packages
import pytest
import torch

from dalle_fast import checkpoints
from dalle_fast.engine import TorchEngine
from dalle_fast.model import DalleModel
from dalle_fast.weights import WeightError


@pytest.fixture
def peer() -> Iterator[Any]:
    with peer_packages.rudalle() as module:
        yield module


def random_peer(peer: Any, version: int, *, text: int, side: int, layers: int = 6, dim: int = 32) -> torch.nn.Module:
    model = peer.DalleModel(
        "cpu",
        num_layers=layers,
        vocab_size=40 + text,
        hidden_size=dim,
        num_attention_heads=2,
        embedding_dropout_prob=0.1,
        attention_dropout_prob=0.1,
        output_dropout_prob=0.1,
        text_seq_length=text,
        image_tokens_per_dim=side,
        image_vocab_size=48,
        cogview_sandwich_layernorm=True,
        cogview_pb_relax=True,
        is_bool_mask=False,
        hf_version=f"v{version}",
    )
    for parameter in model.parameters():  # large enough that every quirk shows in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().double().requires_grad_(False)


def converted(model: torch.nn.Module, folder: Path, version: int) -> DalleModel:
    torch.save(model.state_dict(), folder / "source.bin")
    checkpoints.convert("rudalle", folder / "source.bin", folder / "out", version=version, heads=2)
    return DalleModel.load(folder / "out", dtype=torch.float64)


def caption(length: int) -> torch.Tensor:
    text = torch.zeros(2, length, dtype=torch.int64)
    text[0, :5], text[1, : length - 1] = torch.tensor([2, 7, 9, 11, 3]), torch.randint(4, 40, (length - 1,))
    return text


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.float64).tril()[None, None]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("text", "side"), [(8, 13), (128, 32)])
def test_rudalle_logits(peer: Any, tmp_path: Path, version: int, text: int, side: int) -> None:
    theirs = random_peer(peer, version, text=text, side=side)
    ours = converted(theirs, tmp_path, version)
    ids, image = caption(text), torch.randint(48, (2, side * side))
    expected, _ = theirs(torch.cat([ids, image], 1), causal(text + side * side))
    text_logits, image_logits = ours(ids, image)
    vocab, first = ours.config.text_logits, text - (version == 3)  # the position that predicts image token 0
    torch.testing.assert_close(image_logits, expected[:, first : first + side * side, vocab:], rtol=0, atol=1e-10)
    torch.testing.assert_close(text_logits, expected[:, : text_logits.shape[1], :vocab], rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", [2, 3])
def test_rudalle_greedy_1024_tokens(peer: Any, tmp_path: Path, version: int) -> None:
    theirs = random_peer(peer, version, text=128, side=32, layers=4)
    for name in ("transformer.final_layernorm", "to_logits.0", "to_logits.1"):  # or the biases settle what is drawn
        theirs.get_submodule(name).bias.zero_()
    ours = converted(theirs, tmp_path, version)
    ids, vocab = caption(128)[:1], ours.config.text_logits
    engine = TorchEngine(ours)
    tokens = [engine.prefill(ids, 1).argmax(-1)]
    while len(tokens) < 1024:
        tokens.append(engine.step(tokens[-1]).argmax(-1))
    drawn = torch.stack(tokens, 1)
    # One pass of theirs over our tokens: if each is their first choice after the ones before it, then by induction their
    # own greedy loop draws the same (run as a loop it takes a minute).
    expected, _ = theirs(torch.cat([ids, drawn], 1), causal(128 + 1024))
    first = 128 - (version == 3)
    assert expected[:, first : first + 1024, vocab:].argmax(-1).equal(drawn)
    assert len(drawn.unique()) > 5  # not one token for ever


def state(tmp_path: Path, peer: Any) -> dict[str, torch.Tensor]:
    return dict(random_peer(peer, 3, text=8, side=4, layers=2).state_dict())


def test_every_problem_is_listed_and_nothing_written(peer: Any, tmp_path: Path) -> None:
    broken = state(tmp_path, peer)
    del broken["transformer.final_layernorm.bias"]
    broken["stranger"] = torch.zeros(1)
    broken["to_logits.1.bias"] = torch.zeros(3)
    broken["image_col_embeddings.weight"] = torch.full_like(broken["image_col_embeddings.weight"], float("nan"))
    torch.save(broken, tmp_path / "source.bin")
    with pytest.raises(WeightError) as error:
        checkpoints.convert("rudalle", tmp_path / "source.bin", tmp_path / "out", version=3, heads=2)
    for part in (
        "final_norms.0.bias is missing",
        "stranger is unexpected",
        "head.bias is [3]",
        "column_positions has values",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_notes(peer: Any, tmp_path: Path) -> None:
    converted(random_peer(peer, 3, text=8, side=4, layers=2), tmp_path, 3)
    notes = json.loads((tmp_path / "out/notes.json").read_text())
    assert notes["sources"] == {"source.bin": hashlib.sha256((tmp_path / "source.bin").read_bytes()).hexdigest()}
    assert (notes["family"], notes["options"]) == ("rudalle", {"version": 3, "heads": 2})


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.target,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    """Not even those that the user vouches for: what they would make stays inert."""
    source, trace = tmp_path / "source.bin", tmp_path / "ran"
    torch.save({"weights": Bomb(trace)}, source)
    for options, message in (
        ({}, "holds objects of builtins.getattr, pathlib.Path"),
        ({"trust_pickle": True}, "without a SHA-256"),
        ({"trust_pickle": True, "sha256": "0" * 64}, "expected 0000"),
        ({"sha256": "0" * 64}, "expected 0000"),
        (
            {"trust_pickle": True, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
            "cannot read|no flat dictionary",
        ),
    ):
        with pytest.raises(WeightError, match=message):
            checkpoints.convert("rudalle", source, tmp_path / "out", version=3, **options)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, "got version=None"),
        ({}, {"version": 3}, "text_embeddings.weight is missing"),
        ([1], {"version": 3}, "no flat dictionary"),
        ({"text_embeddings.weight": torch.zeros(9, 6)}, {"version": 2, "heads": 4}, "got heads=4 for dim=6"),
    ],
)
def test_wrong_content(tmp_path: Path, content: Any, options: dict[str, int], message: str) -> None:
    torch.save(content, tmp_path / "source.bin")
    with pytest.raises(WeightError, match=message):
        checkpoints.convert("rudalle", tmp_path / "source.bin", tmp_path / "out", **options)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="cannot read"):
        checkpoints.convert("rudalle", tmp_path / "absent.bin", tmp_path / "out", version=3)
    (tmp_path / "noise.bin").write_bytes(b"no checkpoint" * 9)
    with pytest.raises(WeightError, match="cannot read"):
        checkpoints.convert("rudalle", tmp_path / "noise.bin", tmp_path / "out", version=3)
    with pytest.raises(WeightError, match="got family"):
        checkpoints.convert("stranger", tmp_path / "noise.bin", tmp_path / "out")
