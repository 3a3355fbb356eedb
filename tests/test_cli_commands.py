"""regenerate, rank, classify, score and previews: what they say and write, and that bad input costs one line and no file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_clip, write_tiny_model

from dalle_fast import records
from dalle_fast.cli import main

CAPTION = "a red cube on a blue circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn")
    assert main(["sample", CAPTION, "-n", "4", "--out", str(out), "--model", str(model), "--device", "cpu"]) == 0
    return out


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("by", ["clip", "likelihood", "both"])
def test_rank_a_folder(by: str, model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order of the scores that it prints; a sheet of pictures of several sizes; sheets of ours are no candidates."""
    folder = shutil.copytree(drawn, tmp_path / "pictures")
    Image.open(folder / "0001.png").resize((90, 70)).save(folder / "other.jpg")
    sheet = tmp_path / "best.png"
    command = ["rank", str(folder), CAPTION, "--rank", by, "--model", str(model), "--device", "cpu"]
    assert main(command) == 0
    rows = [line.split() for line in lines(capsys)]
    assert sorted(row[-1] for row in rows) == ["0000.png", "0001.png", "0002.png", "0003.png", "other.jpg"]
    columns = [[float(row[i]) for row in rows] for i in range(len(rows[0]) - 1)]
    if by == "both":
        places = [sorted(range(5), key=lambda i: -column[i]) for column in columns]
        total = [sum(place.index(i) for place in places) for i in range(5)]
        assert total == sorted(total)
    else:
        assert len(columns) == 1 and columns[0] == sorted(columns[0], reverse=True)
    assert main([*command, "--keep", "2", "--sheet", str(sheet)]) == 0
    assert [line.split() for line in lines(capsys)] == rows[:2] and Image.open(sheet).height in (64, 70)


def test_sample_ranked_writes_scores(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", CAPTION, "--n", "5", "--keep", "2", "--model", str(model), "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "clip")]) == 0
    record = json.loads((tmp_path / "clip/sample.json").read_text())
    scores = [picture["score"] for picture in record["pictures"]]
    assert scores == sorted(scores, reverse=True) and (record["ranked_by"], record["kept"]) == ("clip", 2)
    sheet = np.asarray(Image.open(tmp_path / "clip/sheet.png"))
    best = np.asarray(Image.open(tmp_path / "clip" / record["pictures"][0]["file"]))
    assert sheet.shape == (64, 132, 3) and np.array_equal(sheet[:, :64], best)
    assert main([*command, str(tmp_path / "likelihood"), "--rank", "likelihood"]) == 0
    pictures = json.loads((tmp_path / "likelihood/sample.json").read_text())["pictures"]
    found = [picture["log_likelihood"] for picture in pictures]
    assert found == sorted(found, reverse=True) and all(picture["score"] is None for picture in pictures)


def test_score(model: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a record: the likelihood that sampling collected (int8 there, bfloat16 here); from the PNG: of its re-encoding."""
    collected = json.loads((drawn / "sample.json").read_text())["pictures"][2]["log_likelihood"]
    command = ["score", str(drawn / "sample.json"), CAPTION, "--candidate", "2", "--model", str(model)]
    assert main([*command, "--device", "cpu"]) == 0
    first, second = lines(capsys)
    value = float(first.split("= ")[1].split()[0])
    assert abs(value - collected) < 0.03 * abs(collected)
    assert float(second.split("= ")[1].split()[0]) < 0 and "log p(caption)" in second
    bits = float(first.split(", ")[1].split()[0])
    assert bits == pytest.approx(-value / 64 / np.log(2), abs=1e-3)
    assert main(["score", str(drawn / "0002.png"), CAPTION, "--model", str(model), "--device", "cpu"]) == 0
    assert float(lines(capsys)[0].split("= ")[1].split()[0]) < 0


def test_classify(model: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(drawn / "0000.png")
    captions = ["red cube", "blue circle", "cube on a circle"]
    command = ["classify", picture, *captions, "--model", str(model)]
    assert main(command) == 0
    rows = [line.split("%  ") for line in lines(capsys)]
    shares = [float(share) for share, _ in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.05)
    assert sorted(caption for _, caption in rows) == sorted(captions)
    assert main([*command, "--template", "a {}", "--template", "a red {}"]) == 0
    assert [float(line.split("%")[0]) for line in lines(capsys)] != shares
    assert main(["classify", picture, "a cube", "--clip", str(model / "clip")]) == 0
    assert lines(capsys) == ["100.00%  a cube"]


def test_previews_grow_row_by_row(model: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """preview.png after each row of each wave: finished rows as they will be, the rest grey; gone at the end."""
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    write = records.write_png

    def watching(path: Path, image: Image.Image) -> None:
        write(path, image)
        if path.name == "preview.png":
            seen.append(np.asarray(Image.open(path)))

    monkeypatch.setattr(records, "write_png", watching)
    command = ["sample", CAPTION, "-n", "3", "--wave", "2", "--preview", "--out", str(tmp_path), "--model", str(model)]
    assert main([*command, "--device", "cpu"]) == 0
    assert len(seen) == 2 * 8 and seen[0].shape == (64, 132, 3) and seen[8].shape == (64, 64, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0000.png",
        "0001.png",
        "0002.png",
        "sample.json",
        "sheet.png",
    ]
    for row in range(8):
        assert (seen[row][8 * (row + 1) :, :64] == (236, 238, 241)).all()
    for last, name in ((seen[7], "0000.png"), (seen[15], "0002.png")):
        assert np.array_equal(last[:, :64], np.asarray(Image.open(tmp_path / name)))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0000.png")), np.asarray(Image.open(drawn / "0000.png")))


def complaint(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> str:
    """What it says on stderr; it must be one line, with exit code 2."""
    try:
        code = run()
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    said = captured.err.strip().splitlines()
    assert len(said) == 1 and ": error: " in said[0] and captured.out == "", captured.err
    return said[0]


def bad_files(folder: Path, drawn: Path) -> None:
    whole = (drawn / "0000.png").read_bytes()
    record = json.loads((drawn / "sample.json").read_text())
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.png").write_bytes(whole[:60] + b"\0\0\0\0" + whole[64:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "other.json").write_text('{"pictures": 3}')
    (folder / "none.json").write_text('{"pictures": []}')
    record["pictures"][0]["tokens"] = record["pictures"][0]["tokens"][:-1]
    (folder / "short.json").write_text(json.dumps(record))
    record["pictures"][0]["tokens"] = [32] * 64
    (folder / "large.json").write_text(json.dumps(record))
    (folder / "mixed").mkdir()
    shutil.copy(drawn / "0000.png", folder / "mixed/0000.png")
    shutil.copy(folder / "half.png", folder / "mixed/0001.png")
    (folder / "nothing").mkdir()


BOX = ["--box", "0,0,4,4"]
PICTURES = {
    "half.png": "cannot read picture",
    "flipped.png": "cannot read picture",
    "empty.png": "cannot read picture",
    "text.png": "cannot read picture",
    "absent.png": "No such file",
    "nothing": "Is a directory",
    "absent.json": "cannot read",
    "other.json": "expected what `dalle-fast sample` writes",
    "none.json": "holds none",
    "short.json": "got known tokens [63]",
    "large.json": "expected -1 to 31",
}
BAD: dict[str, tuple[list[str], str]] = {
    **{f"regenerate {name}": (["regenerate", f"@{name}", CAPTION, *BOX], why) for name, why in PICTURES.items()},
    **{f"score {name}": (["score", f"@{name}", CAPTION], why) for name, why in PICTURES.items()},
    "no box": (["regenerate", "%0000.png", CAPTION], "the following arguments are required: --box"),
    "box outside": (["regenerate", "%0000.png", CAPTION, "--box", "4,4,9,8"], "expected a rectangle within 0,0,8,8"),
    "box empty": (["regenerate", "%0000.png", CAPTION, "--box", "4,4,4,8"], "expected a rectangle within 0,0,8,8"),
    "box in pixels outside": (["regenerate", "%0000.png", CAPTION, "--box", "0,0,65,8px"], "within 0,0,64,64px"),
    "box no box": (["regenerate", "%0000.png", CAPTION, "--box", "left"], "expected x0,y0,x1,y1 in cells"),
    "candidate of a picture": (["regenerate", "%0000.png", CAPTION, *BOX, "--candidate", "1"], "expected a sample.json"),
    "no such candidate": (["regenerate", "%sample.json", CAPTION, *BOX, "--candidate", "9"], "holds 0, 1, 2, 3"),
    "n zero": (["regenerate", "%0000.png", CAPTION, *BOX, "-n", "0"], "got n=0"),
    "top-k": (["regenerate", "%0000.png", CAPTION, *BOX, "--top-k", "99"], "got top_k=99, expected 1 to 32"),
    "another script": (["regenerate", "%0000.png", "куб", *BOX], "knows no word"),
    "empty caption": (["regenerate", "%0000.png", " ", *BOX], "got an empty caption"),
    "score: another script": (["score", "%0000.png", "куб"], "knows no word"),
    "score: empty caption": (["score", "%0000.png", ""], "got an empty caption"),
    "score: too long": (["score", "%0000.png", "red " * 17], "got a caption of 17 tokens"),
    "rank: no folder": (["rank", "@absent", CAPTION], "cannot read"),
    "rank: no picture": (["rank", "@nothing", CAPTION], "got no picture in"),
    "rank: half a picture": (["rank", "@mixed", CAPTION], "cannot read picture"),
    "rank: empty caption": (["rank", "%", ""], "got an empty caption"),
    "rank: keep": (["rank", "%", CAPTION, "--keep", "5"], "got keep=5, expected 1 to 4"),
    "rank: by": (["rank", "%", CAPTION, "--rank", "beauty"], "invalid choice: 'beauty'"),
    "rank: sheet": (["rank", "%", CAPTION, "--sheet", "@half.png/sheet.png"], "cannot write"),
    "classify: half a picture": (["classify", "@half.png", "a", "b"], "cannot read picture"),
    "classify: no caption": (["classify", "%0000.png"], "required: caption"),
    "classify: empty caption": (["classify", "%0000.png", "a", ""], "got an empty caption"),
    "classify: template": (["classify", "%0000.png", "a", "--template", "a photo"], "expected {} where the caption goes"),
    "classify: clip": (["classify", "%0000.png", "a", "--clip", "@nothing"], "it holds no config.json"),
    "sample: no caption": (["sample"], "got no caption"),
    "sample: two kinds": (["sample", "a cube", "--prompts", "@absent"], "got a caption and --prompts"),
    "sample: no prompts": (["sample", "--prompts", "@absent"], "cannot read prompts"),
    "sample: too many": (["sample", "a cube", "-n", "99999999"], "expected at most 10000000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """@: a bad file; %: a good one."""
    bad = tmp_path / "bad"
    bad.mkdir()
    bad_files(bad, drawn)
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD[case]
    command = [
        word.replace("@", f"{bad}/") if word[:1] == "@" else word.replace("%", f"{drawn}/") for word in arguments
    ]
    command += ["--model", str(model)] + (["--device", "cpu"] if command[0] != "classify" else [])
    if command[0] in ("regenerate", "sample"):
        command += ["--out", str(tmp_path / "new/out")]
    assert message in complaint(lambda: main(command), capsys)
    assert sorted(tmp_path.rglob("*")) == before


def _drop(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["logit_scale"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


CLIP_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "half the weights": (_truncate, "cannot load a CLIP model from"),
    "a weight missing": (_drop, "logit_scale missing or of another shape"),
}


@pytest.mark.parametrize("case", CLIP_DAMAGE)
def test_damaged_clips(case: str, model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = CLIP_DAMAGE[case]
    copy = shutil.copytree(model / "clip", tmp_path / "clip")
    damage(copy)
    command = ["rank", str(drawn), CAPTION, "--model", str(model), "--device", "cpu", "--clip", str(copy)]
    assert message in complaint(lambda: main(command), capsys)
    command = ["sample", CAPTION, "--rank", "clip", "--out", str(tmp_path / "out"), *command[3:]]
    assert message in complaint(lambda: main(command), capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["clip"]


def test_pictures_of_all_kinds_are_read(model: Path, tmp_path: Path) -> None:
    """Transparent on white, upright by its EXIF tag, grey, with a palette."""
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.save(tmp_path / "a.png")
    assert records.read_image(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert records.read_image(tmp_path / "b.jpg").size == (4, 8)
    for mode in ("L", "P", "1", "I;16", "CMYK"):
        path = tmp_path / ("c.tif" if mode == "CMYK" else "c.png")
        Image.new(mode, (8, 8)).save(path)
        assert records.read_image(path).mode == "RGB"
    assert torch.equal(records.read_tokens(_record(tmp_path)), torch.tensor([1, 2, 3]))


def _record(folder: Path) -> Path:
    (folder / "sample.json").write_text('{"pictures": [{"candidate": 7, "tokens": [1, 2, 3]}]}')
    return folder / "sample.json"
