"""Boxes of a picture: what stays known, what it costs, and that what is drawn follows the model's own conditionals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import write_tiny_model

from dalle_fast.cli import main
from dalle_fast.config import ModelConfig
from dalle_fast.engine import TorchEngine
from dalle_fast.model import DalleModel
from dalle_fast.pipeline import Pipeline
from dalle_fast.regions import Box, known_outside
from dalle_fast.sampling import SamplingSettings, draw, sample

CAPTION = "a red cube"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("1,2,3,4", Box(1, 2, 3, 4)),
        (" 0, 0 ,8,8 ", Box(0, 0, 8, 8)),
        ("0,0,8,8px", Box(0, 0, 1, 1)),
        ("7,8,9,17 px", Box(0, 1, 2, 3)),
        ("0,0,64,64px", Box(0, 0, 8, 8)),
    ],
)
def test_boxes(text: str, box: Box) -> None:
    assert Box.parse(text, 8, 8, (64, 64)) == box


def test_pixels_are_the_pictures_own() -> None:
    assert Box.parse("100,50,200,100px", 8, 8, (200, 100)) == Box(4, 4, 8, 8)
    assert Box.parse("0,0,1,1px", 8, 8, (3, 3)) == Box(0, 0, 3, 3)  # widened to the cells that the pixel touches


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3",
        "1,2,3,x",
        "a box",
        "2,2,2,4",
        "3,0,2,4",
        "0,0,9,8",
        "-1,0,3,3",
        "0,0,65,8px",
        "8,8,8,9px",
        "1e3,0,2,2",
    ],
)
def test_bad_boxes(text: str) -> None:
    with pytest.raises(ValueError, match="got box"):
        Box.parse(text, 8, 8, (64, 64))


def test_what_is_outside_stays() -> None:
    tokens = torch.arange(12)
    assert known_outside(tokens, [Box(1, 0, 3, 2), Box(0, 2, 1, 3)], 3, 4).tolist() == [
        *(0, -1, -1, 3),
        *(4, -1, -1, 7),
        *(-1, 9, 10, 11),
    ]
    assert tokens.tolist() == list(range(12))
    with pytest.raises(ValueError, match="got no box"):
        known_outside(tokens, [], 3, 4)


class Counting(TorchEngine):
    """Says how many cells each call is given."""

    calls: list[int]

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(tokens.shape[1])
        return super().feed(tokens)


def test_a_corner_costs_a_quarter_of_the_steps() -> None:
    """16 x 16 of 32 x 32: 528 leading cells in one go, then one call a drawn token; known runs ride along with the token
    before them, and nothing is computed after the last draw."""
    config = ModelConfig.preset("tiny", height=32, width=32, layers=2, patterns=("row", "column"))
    engine = Counting(DalleModel(config), chunk=32)
    engine.calls = []
    known = known_outside(torch.randint(32, (1024,)), [Box(16, 16, 32, 32)], 32, 32)
    text = torch.ones(1, 16, dtype=torch.int64)
    list(sample(engine, text, 1, SamplingSettings(), known=known))
    assert engine.calls[0] == 528 and len(engine.calls) == 256  # of 1024 for a whole picture
    assert sorted(engine.calls[1:]) == [1] * 240 + [17] * 15


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_draws_follow_the_full_pass(data: Any) -> None:
    """For any set of known cells, chunk and number of candidates: known tokens stay, and the log p of every drawn token is
    the full pass's at its place, float64. With score_known that of the known ones after the first draw too."""
    config = ModelConfig(
        dim=32, layers=3, heads=2, head_dim=16, caption_len=5, height=4, width=5, text_vocab=20, image_vocab=11,
        patterns=("row", "column", "conv(kernel=3)"), start=data.draw(st.sampled_from(["none", "learned", "text"])),
    )  # fmt: skip
    model = DalleModel(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cells = data.draw(st.lists(st.booleans(), min_size=20, max_size=20))
    known = torch.where(torch.tensor(cells), torch.randint(11, (20,)), -1)
    text, score_known = torch.randint(1, 20, (1, 5)), data.draw(st.booleans())
    engine = TorchEngine(model, chunk=data.draw(st.integers(1, 20)))
    n, guidance = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1.0, 2.0]))
    out = list(draw(engine, text, torch.arange(n), SamplingSettings(guidance_scale=guidance), known, score_known))
    assert [j for j, _, _ in out] == list(range(20))
    tokens = torch.stack([drawn for _, drawn, _ in out], dim=1)  # [n, 20]
    assert torch.equal(tokens[:, known >= 0], known[known >= 0].expand(n, -1))
    expected = model(text.expand(n, -1), tokens)[1].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    first = int((known < 0).int().argmax()) if bool((known < 0).any()) else 20
    counts = known < 0
    if score_known:
        counts = counts | (torch.arange(20) >= first)
    got = torch.stack([log_p for _, _, log_p in out], dim=1)
    assert torch.allclose(got, torch.where(counts, expected, 0.0), atol=1e-9)


def test_regenerate_keeps_the_rest_and_draws_with_any_chunk(model: Path, pipeline: Pipeline) -> None:
    whole = next(pipeline.sample(CAPTION, 1, SamplingSettings(seed=1)))
    box = [Box(2, 3, 8, 8)]
    one_by_one = Pipeline.load(model, device="cpu", dtype="float32")
    one_by_one._reload = None
    slow = list(one_by_one.regenerate(whole.tokens, CAPTION, box, 3))
    fast = list(pipeline.regenerate(whole.tokens, CAPTION, box, 3))
    assert (one_by_one.engine.chunk, pipeline.engine.chunk) == (1, 8)
    grid = whole.tokens.view(8, 8)
    for a, b in zip(slow, fast, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        new = a.tokens.view(8, 8)
        assert torch.equal(new[:3], grid[:3]) and torch.equal(new[:, :2], grid[:, :2])
        assert not torch.equal(new[3:, 2:], grid[3:, 2:])
    again = next(pipeline.sample(CAPTION, 1, SamplingSettings(seed=1)))  # longer rings change no picture
    assert torch.equal(again.tokens, whole.tokens)


def test_a_suffix_is_the_exact_conditional(pipeline: Pipeline) -> None:
    """The last rows anew, under the picture's own random numbers, are the picture."""
    whole = next(pipeline.sample(CAPTION, 1, SamplingSettings(seed=6)))
    again = next(pipeline.regenerate(whole.tokens, CAPTION, [Box(0, 5, 8, 8)], 1, SamplingSettings(seed=6)))
    assert torch.equal(again.tokens, whole.tokens)


def test_the_known_remainder_is_scored(pipeline: Pipeline) -> None:
    """known_log_p + log_likelihood + log p(leading rows) is log p of the whole picture, by the full pass."""
    tokens = torch.randint(32, (64,))
    for picture in pipeline.regenerate(tokens, CAPTION, [Box(1, 2, 4, 5)], 2, score_known=True):
        assert picture.known_log_p is not None and picture.known_log_p < 0 and picture.log_likelihood < 0
        lead = 2 * 8 + 1
        model = DalleModel.load(pipeline.folder)
        logits = model(pipeline.tokenizer.encode(CAPTION), picture.tokens[None])[1][0].double()
        log_p = logits.log_softmax(-1).gather(1, picture.tokens[:, None])[lead:].sum()
        assert abs(float(log_p) - picture.known_log_p - picture.log_likelihood) < 1e-2
        assert abs(pipeline.score(picture.tokens, CAPTION)[0] - float(logits.log_softmax(-1).gather(
            1, picture.tokens[:, None]).sum())) < 1e-2  # fmt: skip


def test_from_a_record_and_from_a_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(model), "--device", "cpu"]
    assert main(["sample", CAPTION, "-n", "3", "--out", str(tmp_path / "one"), *common]) == 0
    record = json.loads((tmp_path / "one/sample.json").read_text())
    source = str(tmp_path / "one/sample.json")
    draw_again = ["regenerate", source, CAPTION, "--box", "4,4,8,8", "--box", "0,0,8,8px", "-n", "2", *common]
    assert main([*draw_again, "--candidate", "2", "--out", str(tmp_path / "two")]) == 0
    made = json.loads((tmp_path / "two/sample.json").read_text())
    assert made["boxes"] == [[4, 4, 8, 8], [0, 0, 1, 1]] and made["source"] == source
    before = torch.tensor(record["pictures"][2]["tokens"]).view(8, 8)
    for picture in made["pictures"]:
        after = torch.tensor(picture["tokens"]).view(8, 8)
        assert torch.equal(after[:4, 1:], before[:4, 1:]) and torch.equal(after[4:, :4], before[4:, :4])
        assert not torch.equal(after[4:, 4:], before[4:, 4:]) and picture["known_log_p"] is None
    # A picture of another size; ranked by the known remainder, best first.
    Image.open(tmp_path / "one/0001.png").resize((200, 100)).save(tmp_path / "wide.jpg")
    arguments = ["regenerate", str(tmp_path / "wide.jpg"), CAPTION, "--box", "0,0,100,50px", "-n", "4"]
    assert main([*arguments, "--rank", "likelihood", "--keep", "2", "--out", str(tmp_path / "three"), *common]) == 0
    made = json.loads((tmp_path / "three/sample.json").read_text())
    assert made["boxes"] == [[0, 0, 4, 4]]
    fits = [picture["known_log_p"] for picture in made["pictures"]]
    assert fits == sorted(fits, reverse=True) and len(set(fits)) == 4
    assert Image.open(tmp_path / "three/sheet.png").size == (132, 64)
    with pytest.raises(ValueError, match="picture with tokens of -1"):
        Pipeline.load(model, device="cpu").regenerate(torch.full((64,), -1), CAPTION, [Box(0, 0, 1, 1)])
