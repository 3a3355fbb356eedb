"""Pipeline: the worked example of docs/usage.md, and what it promises beyond the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_model import write_tiny_clip, write_tiny_model

from dalle_fast import Pipeline, SamplingSettings, backends, cpu_backend
from dalle_fast.model import DalleModel
from dalle_fast.pipeline import DEMO, order

ROOT = Path(__file__).resolve().parent.parent
CAPTION = "a red cube"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, device="cpu")


def test_the_worked_example_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, with the tiny model in the place of the bundled one, which takes longer."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/usage.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dalle_fast.pipeline.DEMO", model)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/usage.md", "exec"), namespace)
    assert {"first.png", "growing.png", "run"} == {p.name for p in tmp_path.iterdir()}
    assert namespace["rows"] == 8 and sum(namespace["shares"]) == pytest.approx(1)  # type: ignore[call-overload]
    assert (tmp_path / "run/0001/sheet.png").exists()


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the bundled model's weights are not here")
def test_the_bundled_model_draws() -> None:
    picture = next(Pipeline.load(device="cpu").sample("a red circle above a blue square", 1))
    assert picture.image.size == (256, 256) and len(set(picture.tokens.tolist())) > 8


@pytest.mark.parametrize("lead", [0, 20])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_captions_side_by_side(pipeline: Pipeline, lead: int, guidance_scale: float) -> None:
    """What each draws alone, where tokens are known at the beginning and in the middle, too."""
    if not pipeline.engine.batch_invariant:
        pytest.skip("the engine's rounding depends on the batch")
    captions, settings = [CAPTION, "a blue circle", "a circle"], SamplingSettings(seed=2, guidance_scale=guidance_scale)
    known = torch.full((64,), -1)
    known[:lead] = torch.randint(32, (lead,))
    known[40:45] = 7
    options = {"n": 5, "settings": settings, "known": known, "score_known": bool(lead), "first": 3}
    together = list(pipeline.sample(captions, wave=2, **options))
    assert [p.caption for p in together[:6]] == [caption for caption in captions for _ in range(2)]
    for caption in captions:
        mine, alone = [p for p in together if p.caption == caption], list(pipeline.sample(caption, wave=1, **options))
        assert [(p.candidate, p.tokens.tolist(), p.log_likelihood, p.known_log_p) for p in mine] == [
            (p.candidate, p.tokens.tolist(), p.log_likelihood, p.known_log_p) for p in alone
        ]
        assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(mine, alone, strict=True))
    assert len({p.log_likelihood for p in together}) == 15  # which captions a tiny model hardly minds, but to the bit
    with pytest.raises(ValueError, match="got no caption"):
        pipeline.sample([])


def test_a_stream_ends_with_the_pictures_of_sample(pipeline: Pipeline) -> None:
    settings = SamplingSettings(seed=4)
    expected = list(pipeline.sample(CAPTION, 3, settings, first=2))
    grown = list(pipeline.stream(CAPTION, 3, settings, first=2))
    assert [len(pictures) for pictures in grown] == [3] * 8
    for last, picture in zip(grown[-1], expected, strict=True):
        assert torch.equal(last.tokens, picture.tokens) and last.candidate == picture.candidate
        assert last.image.tobytes() == picture.image.tobytes()
        assert last.log_likelihood == pytest.approx(picture.log_likelihood)
    for row, pictures in enumerate(grown):
        assert torch.equal(pictures[1].tokens, expected[1].tokens[: 8 * (row + 1)])
        assert row == 7 or pictures[1].image.getpixel((5, 63)) == (236, 238, 241)


def test_a_stream_of_an_engine_whose_rounding_depends_on_the_batch(model: Path) -> None:
    plain = Pipeline.load(model, device="cpu", backend="torch")
    assert not plain.engine.batch_invariant
    expected = list(plain.sample(CAPTION, 2))
    *_, last = plain.stream(CAPTION, 2)
    assert [p.tokens.tolist() for p in last] == [p.tokens.tolist() for p in expected]


@pytest.mark.parametrize(
    ("options", "dtype", "copies"),
    [
        ({"backend": "torch", "dtype": "float32"}, torch.float32, 0),
        ({"backend": "torch", "dtype": "bfloat16"}, torch.bfloat16, 0),
        ({"backend": "cpu", "dtype": "float32"}, torch.float32, 1),
        ({"backend": "cpu", "dtype": "int8"}, torch.bfloat16, 1),
    ],
)
def test_a_score_is_of_the_type_that_draws_and_holds_no_second_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], dtype: torch.dtype, copies: int
) -> None:
    if reason := cpu_backend.kernels_why_not():
        pytest.skip(reason)
    tokens = torch.randint(32, (8, 64))
    exact, plain = (DalleModel.load(model, dtype=kind) for kind in (torch.float64, dtype))
    pipeline = Pipeline.load(model, device="cpu", **options)
    loaded = []
    original = DalleModel.load
    monkeypatch.setattr(DalleModel, "load", lambda *a, **k: loaded.append(original(*a, **k)) or loaded[-1])
    got = torch.tensor([pipeline.score(row, CAPTION)[0] for row in tokens], dtype=torch.float64)
    assert [m.head.weight.dtype for m in loaded] == [dtype] * copies
    text = pipeline.tokenizer.encode(CAPTION).expand(8, -1)

    def scores(model: DalleModel) -> torch.Tensor:
        with backends.use("torch"):
            logits = model(text, tokens)[1].double().log_softmax(-1)
        return logits.gather(2, tokens[..., None]).sum((1, 2))

    assert_close(got, scores(plain), scores(exact), what="log p")


def test_order() -> None:
    scores, likelihoods = [1.0, 3.0, 2.0, 0.0], [-1.0, -4.0, -3.0, -2.0]
    assert order(scores, likelihoods, "clip") == [1, 2, 0, 3]
    assert order(scores, likelihoods, "likelihood") == [0, 3, 2, 1]
    assert order(scores, likelihoods, "both") == [0, 1, 2, 3]  # ranks 2+0, 0+3, 1+2, 3+1
    assert order([None, None], [-2.0, -1.0], "likelihood") == [1, 0]
    with pytest.raises(ValueError, match="got by='beauty'"):
        order(scores, likelihoods, "beauty")


def test_errors_of_use(pipeline: Pipeline) -> None:
    pictures = list(pipeline.sample(CAPTION, 2))
    with pytest.raises(ValueError, match="got keep=3, expected 1 to 2"):
        pipeline.rank(pictures, by="likelihood", keep=3)
    with pytest.raises(ValueError, match="got n=0"):
        pipeline.stream(CAPTION, 0)
    with pytest.raises(ValueError, match=r"expected {} where"):
        pipeline.classify(pictures[0].image, ["a cube"], ["a photo"])
    assert pipeline.rank([], by="clip") == []
    assert torch.equal(pipeline.encode(pictures[0].image), pipeline.encode(pictures[0].image.convert("RGBA")))
