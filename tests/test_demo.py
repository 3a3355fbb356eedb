"""The bundled model: complete, small, redraws a picture of the README token by token, ranks, and redraws regions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed

from dalle_fast.pipeline import DEMO, Pipeline
from dalle_fast.regions import Box
from dalle_fast.sampling import SamplingSettings
from examples.scenes import checker, evaluate, evaluate_dvae, grammar, pictures, render, steady_codes

PICTURES = json.loads(pictures.TOKENS.read_text())
FILES = ("config.json", "model.safetensors", "tokenizer.json", "dvae.json", "dvae.safetensors", "clip/config.json")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", dtype="float32")


def test_the_folder_is_complete_and_small() -> None:
    assert [name for name in FILES if not (DEMO / name).is_file()] == []
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 24 * 2**20


def test_it_has_the_shape_of_dalle(pipeline) -> None:
    config = pipeline.config
    assert (config.caption_len, config.height, config.width) == (256, 32, 32)
    assert {pattern.split("(")[0] for pattern in config.patterns} == {"row", "column", "conv"}


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture["caption"])
def test_a_picture_of_the_readme_is_redrawn(pipeline, picture) -> None:
    settings = SamplingSettings(**picture["settings"])
    (drawn,) = pipeline.sample(picture["caption"], 1, settings, first=picture["candidate"])
    assert drawn.tokens.tolist() == picture["tokens"]
    assert picture["command"] in pictures.README.read_text().splitlines()


def test_a_picture_of_the_readme_shows_its_caption(pipeline) -> None:
    """By the checker, from the tokens that the test above redraws."""
    rng = np.random.default_rng(0)
    said: dict[str, grammar.Scene] = {}
    for i in range(40_000):
        scene = grammar.sample_scene(rng, held_out=i % 2 == 1)
        said |= dict.fromkeys(grammar.captions(scene), scene)
    for picture in PICTURES:
        image = pipeline.decode(torch.tensor([picture["tokens"]]))[0]
        right = checker.check(np.asarray(image), said[picture["caption"]])
        assert all(right.values()), (picture["caption"], right)


def test_every_command_samples_with_the_settings_that_were_measured() -> None:
    root = pictures.ROOT
    assert f"\nSAMPLING ?= {pictures.OPTIONS}\n" in (root / "Makefile").read_text()
    assert f'dalle-fast sample "a red cube" {pictures.OPTIONS}\n' in pictures.README.read_text()
    for name in ("best-of-32", "one-bfloat16", "one-int4"):
        measured = json.loads((root / f"bench/results/scenes-{name}.json").read_text())["settings"]
        assert SamplingSettings(**measured) == pictures.SETTINGS


def test_the_codebook_is_the_one_that_the_weights_speak(pipeline) -> None:
    """Labels of the shipped codebook, decoded, are the scene; and the encoder gives nearly the same."""
    codebook = steady_codes.Codebook.load()
    rng = np.random.default_rng(6)
    for family in grammar.FAMILIES:
        background, placed = render.layout(grammar.sample_scene(rng, family), rng)
        pixels = torch.from_numpy(render.paint(background, placed)).permute(2, 0, 1)[None]
        codes = torch.from_numpy(codebook.label(background, placed)).view(1, 32, 32)
        assert -10 * float((pipeline.images.decode(codes) - pixels).square().mean().log10()) >= 30
        assert float((pipeline.images.encode(pixels).view(1, 32, 32) == codes).float().mean()) >= 0.95


def test_the_image_tokenizer_keeps_scenes(pipeline) -> None:
    """Also those whose edges have colours that no scene of its training had."""
    asked = evaluate.questions()
    never = {grammar.Block("green", "star"), grammar.Block("purple", "triangle")}  # the latter of clocks
    hard = [q for q in asked if q.held_out and never & set(q.scene.blocks)]
    *_, seen, held_out = evaluate_dvae.evaluate(pipeline.images, [*asked[:12], *hard[:8]])
    assert seen["scenes"] == 6 and held_out["scenes"] == 14
    for row in (seen, held_out):
        assert row["psnr"] >= 30 and row["exact"] >= 0.9 and row["exact_from_codes"] == 1, row


def test_clip_prefers_the_picture_of_the_caption(pipeline) -> None:
    """Against seven pictures that differ in one attribute, where chance is an eighth."""
    rng = np.random.default_rng(2)
    right = []
    for i in range(30):
        scene = grammar.sample_scene(rng, grammar.FAMILIES[i % 3])
        others = [
            s
            for s in grammar.one_attribute_changed(scene)
            if s.family != "clocks" or scene.hour or s.blocks != scene.blocks
        ]
        chosen = [scene, *(others[int(j)] for j in rng.permutation(len(others))[:7])]
        shown = [Image.fromarray(render.render(s, rng)) for s in chosen]
        right.append(int(pipeline.ranker.scores(shown, grammar.captions(scene)[0]).argmax()) == 0)
    assert np.mean(right) >= 0.75, np.mean(right)


def test_best_first(pipeline) -> None:
    drawn = list(pipeline.sample("a red circle", 4, SamplingSettings(seed=3)))
    ranked = pipeline.rank(drawn, keep=3)
    scores = [picture.score for picture in ranked]
    assert len(ranked) == 3 and scores == sorted(scores, reverse=True)


def test_a_region_is_redrawn_and_the_rest_stays(pipeline) -> None:
    """The README's penguin from its belt down, under a caption with other pants: they change, all else stays."""
    before = torch.tensor(next(p["tokens"] for p in PICTURES if "penguin" in p["caption"]))
    caption = pictures.REDRAWN.format("orange")
    after = list(pipeline.regenerate(before, caption, [Box(0, 20, 32, 32)], 4, pictures.SETTINGS))
    for picture in after:
        assert torch.equal(picture.tokens[: 20 * 32], before[: 20 * 32])
    worn = {"hat": "red", "gloves": "yellow", "shirt": "blue", "pants": "orange"}
    assert sum(checker.read(np.asarray(picture.image)).garments == worn for picture in after) >= 3


def test_the_questions_of_the_evaluation_are_fixed_and_balanced() -> None:
    asked = evaluate.questions()
    assert len(asked) == 600 and len({question.caption for question in asked}) == 600
    assert evaluate.questions(60) == asked[:60]
    for family in grammar.FAMILIES:
        mine = [question for question in asked if question.scene.family == family]
        assert len(mine) == 200 and sum(question.held_out for question in mine) == 100
    assert all(grammar.is_held_out(question.scene) == question.held_out for question in asked)


def test_the_evaluation_resumes(monkeypatch, tmp_path, capsys) -> None:
    """Interrupted in the middle of a line, it goes on after the last whole one and gives the same."""

    def run(captions: int) -> list[str]:
        line = ["evaluate", "--captions", str(captions), "--n", "2", "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", [*line, "--log", str(tmp_path / "log"), "--json", str(tmp_path / "json")])
        evaluate.main()
        return (tmp_path / "log").read_text().splitlines()

    whole = run(3)
    cut = "\n".join(whole[:3]) + "\n" + whole[3][:40]
    (tmp_path / "log").write_text(cut)
    assert run(3) == whole
    summary = json.loads((tmp_path / "json").read_text())
    assert summary["n"] == 2 and sum(row["captions"] for row in summary["rows"] if row["family"] == "all") == 3
    found = [json.loads(line) for line in whole[1:]]
    wrong = [line["caption"] for line in found if not line["exact"][line["best"]]]
    assert [entry["caption"] for entry in summary["wrong"]] == wrong
    assert "seen in training" in capsys.readouterr().out
    (tmp_path / "log").write_text(json.dumps({"n": 3}) + "\n")
    with pytest.raises(ValueError, match="of other settings"):
        run(3)
