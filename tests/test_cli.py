"""The command line: what it writes, and that each kind of bad input costs one line, exit code 2 and no file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from dalle_fast.cli import main
from dalle_fast.engine import TorchEngine
from dalle_fast.pipeline import Pipeline

CAPTION = "a red cube on a blue circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small to gain from a second thread, and a shared machine makes two of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(model: Path, out: Path, *options: str) -> int:
    return main(["sample", CAPTION, "--model", str(model), "--out", str(out), "-n", "2", *options])


def entries(out: Path) -> dict[int, list[int]]:
    """candidate -> tokens"""
    return {p["candidate"]: p["tokens"] for p in json.loads((out / "sample.json").read_text())["pictures"]}


def test_sample_writes_pictures_a_sheet_and_a_record(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert sample(model, out, "-n", "3", "--seed", "5", "--temperature", "0.9", "--top-k", "20", "--wave", "2") == 0
    captured = capsys.readouterr()
    assert "3 of 3 pictures" in captured.out and "192/192" in captured.err  # 3 pictures of 64 tokens
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "0002.png", "sample.json", "sheet.png"]
    pictures = [Image.open(out / f"000{i}.png") for i in range(3)]
    assert {picture.size for picture in pictures} == {(64, 64)} and Image.open(out / "sheet.png").size == (132, 132)
    sheet = np.asarray(Image.open(out / "sheet.png"))
    assert np.array_equal(sheet[68:, :64], np.asarray(pictures[2]))
    record = json.loads((out / "sample.json").read_text())
    assert (record["prompt"], record["seed"], record["settings"]["top_k"]) == (CAPTION, 5, 20)
    assert [p["file"] for p in record["pictures"]] == ["0000.png", "0001.png", "0002.png"]
    tokens = np.array([p["tokens"] for p in record["pictures"]])
    assert tokens.shape == (3, 64) and len(np.unique(tokens, axis=0)) == 3 and tokens.min() >= 0 and tokens.max() < 32
    assert all(np.isfinite(p["log_likelihood"]) and p["log_likelihood"] < 0 for p in record["pictures"])


def test_the_record_draws_the_same_pictures_again(model: Path, tmp_path: Path) -> None:
    """The command in sample.json, run in another folder; and any candidate alone."""
    assert sample(model, tmp_path / "one", "-n", "3", "--seed", "7") == 0
    main_in = shlex.split(json.loads((tmp_path / "one/sample.json").read_text())["command"])
    assert main_in[0] == "dalle-fast"
    assert main([*main_in[1:], "--out", str(tmp_path / "two")]) == 0
    assert entries(tmp_path / "one") == entries(tmp_path / "two")
    assert (tmp_path / "one/0001.png").read_bytes() == (tmp_path / "two/0001.png").read_bytes()
    assert sample(model, tmp_path / "three", "-n", "1", "--first", "2", "--seed", "7") == 0
    assert entries(tmp_path / "three")[2] == entries(tmp_path / "one")[2]
    assert sample(model, tmp_path / "four", "-n", "3", "--seed", "8") == 0
    assert entries(tmp_path / "four")[0] != entries(tmp_path / "one")[0]


def test_truncate(model: Path, tmp_path: Path) -> None:
    long = " ".join(["red"] * 20)
    assert main(["sample", long, "--truncate", "--model", str(model), "--out", str(tmp_path), "-n", "1"]) == 0


BAD_OPTIONS = {
    "n zero": (["-n", "0"], "got n=0, expected at least 1"),
    "n negative": (["-n", "-3"], "got n=-3, expected at least 1"),
    "n no number": (["-n", "many"], "invalid int value: 'many'"),
    "temperature zero": (["--temperature", "0"], "got temperature=0.0, expected a finite number above 0"),
    "temperature negative": (["--temperature", "-1"], "got temperature=-1.0"),
    "temperature infinite": (["--temperature", "inf"], "got temperature=inf"),
    "temperature nan": (["--temperature", "nan"], "got temperature=nan"),
    "top-k negative": (["--top-k", "-1"], "got top_k=-1"),
    "top-k above the vocabulary": (["--top-k", "33"], "got top_k=33, expected 1 to 32"),
    "top-p zero": (["--top-p", "0"], "got top_p=0.0"),
    "top-p above 1": (["--top-p", "1.5"], "got top_p=1.5"),
    "top-p nan": (["--top-p", "nan"], "got top_p=nan"),
    "guidance nan": (["--guidance", "nan"], "got guidance_scale=nan"),
    "seed negative": (["--seed", "-1"], "got seed=-1"),
    "wave zero": (["--wave", "0"], "got wave=0, expected at least 1"),
    "first negative": (["--first", "-1"], "got first=-1"),
    "keep more than n": (["--keep", "3"], "got keep=3, expected at most n=2"),
    "no such device": (["--device", "abacus"], "got device 'abacus', expected auto, cpu, cuda"),
    "no such GPU": (["--device", "cuda:99"], "got device 'cuda:99'"),
    "no such dtype": (["--dtype", "float7"], "got dtype 'float7', expected one of auto, float32"),
    "no such backend": (["--backend", "magic"], "got backend 'magic', expected one of auto, cuda"),
    "no such option": (["--colour", "red"], "unrecognized arguments: --colour red"),
    "nothing to rank with": (["--rank", "clip"], "got a model without a CLIP folder"),
    "model folder missing": (["--model", "nowhere"], "cannot read nowhere"),
    "clip folder missing": (["--rank", "clip", "--clip", "nowhere"], "nowhere"),
}


def complaint(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> str:
    """What it says on stderr; it must be one line, with exit code 2."""
    try:
        code = run()
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and ": error: " in lines[0] and captured.out == "", captured.err
    return lines[0]


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD_OPTIONS[case]
    assert message in complaint(lambda: sample(model, tmp_path / "a" / "b", *options), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "got an empty caption"),
        (" \t ", "got an empty caption"),
        (" ".join(["red"] * 17), "got a caption of 17 tokens, expected at most 16"),
        ("куб", "knows no word"),
    ],
)
def test_bad_captions(
    caption: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["sample", caption, "--model", str(model), "--out", str(tmp_path / "a" / "b")]
    assert message in complaint(lambda: main(run), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the cuda backend may run")
def test_a_backend_that_cannot_run_here_says_why(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(lambda: sample(model, tmp_path / "out", "--backend", "cuda"), capsys)
    assert "backend 'cuda' cannot run here: " in line and not list(tmp_path.iterdir())


def _truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _reshape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["image_embedding.weight"] = state["image_embedding.weight"][1:].contiguous()
    save_file(state, folder / "model.safetensors")


def _not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.bias"][3] = float("inf")
    save_file(state, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights truncated": (_truncate, "cannot read"),
    "weights of another shape": (_reshape, "image_embedding.weight is [31, 64], expected [32, 64]"),
    "weights not finite": (_not_finite, "head.bias has values that are not finite"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "no JSON"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "dVAE missing": (lambda f: (f / "dvae.safetensors").unlink(), "dvae.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[case]
    copy = shutil.copytree(model, tmp_path / "copy")
    damage(copy)
    assert message in complaint(lambda: sample(copy, tmp_path / "out"), capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_output_folders_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cannot write {out}" in complaint(lambda out=out: sample(model, out), capsys)  # type: ignore[misc]
        masks = ["masks", "--layout", "4+2x2", "--out", str(out / "masks.png")]
        assert "cannot write" in complaint(lambda masks=masks: main(masks), capsys)  # type: ignore[misc]
    assert (tmp_path / "file").read_text() == "in the way" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in complaint(lambda: sample(model, tmp_path / "out"), capsys)


def test_pictures_that_are_there_stay_when_input_is_bad(model: Path, tmp_path: Path) -> None:
    (tmp_path / "0000.png").write_text("mine")
    assert sample(model, tmp_path, "--top-k", "99") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["0000.png"] and (tmp_path / "0000.png").read_text() == "mine"


def test_ctrl_c_keeps_the_finished_pictures(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dalle_fast.cli", "sample", CAPTION, "--model", str(model), "--out", str(out)]
    run = subprocess.Popen(
        [*command, "-n", "5000", "--wave", "1"], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "0001.png").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in stderr, stderr
    names = sorted(p.name for p in out.glob("0*.png"))
    assert 2 <= len(names) < 5000 and f"{len(names)} of 5000 pictures" in stdout
    assert [f"{candidate:04d}.png" for candidate in entries(out)] == names
    assert all(Image.open(out / name).convert("RGB").size == (64, 64) for name in names)
    assert Image.open(out / "sheet.png").convert("RGB").width >= 132
    assert sorted(p.name for p in out.iterdir()) == [*names, "sample.json", "sheet.png"]


def test_ctrl_c_before_the_first_picture_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_fast.sampling.ops.sample", interrupt)
    assert sample(model, tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


def test_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", "--out", str(tmp_path / "masks.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert len(table) == 8  # neighbours, mean, reach, ring, slots, tiles, share; the counts of the paper's layout
    assert table["full"] == ["1024", "512.5", "1023", "1024", "1024", "210", "100%"]
    assert table["row(window=raster)"][:4] == ["33", "32.5", "32", "33"]
    assert table["column"][:4] == ["32", "16.5", "992", "993"]
    assert table["conv(kernel=11,boundary=flat)"][:1] == ["61"]
    picture = Image.open(tmp_path / "masks.png")
    assert picture.width > 1000 and len(picture.getcolors(2**16) or []) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "diagonal"], "got pattern kind 'diagonal', expected one of full, row, column, conv"),
        (["--pattern", "conv(kernel=4)"], "got kernel=4, expected an odd number"),
        (["--layout", "16x16"], "got layout '16x16', expected TEXT+HEIGHTxWIDTH"),
        (["--draw", "6+99x4"], "got height=99, expected 1 to 64"),
    ],
)
def test_bad_masks(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(lambda: main(["masks", "--out", str(tmp_path / "m.png"), *options]), capsys)
    assert not list(tmp_path.iterdir())


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    report = capsys.readouterr().out
    for wanted in (
        f"torch {torch.__version__.split('+')[0]}",
        "Python 3.",
        "CPU: ",
        "GPU",
        "C++ kernels: ",
        "CUDA kernels: ",
    ):
        assert wanted in report
    for backend in ("cuda", "triton", "cpu", "torch", "reference"):
        assert f"\n  {backend} " in report
    assert "\n  torch     usable\n" in report


def test_info_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "openai-12b"]) == 0
    assert "parameters: 12,293,853,056" in capsys.readouterr().out
    line = complaint(lambda: main(["info", "--preset", "dalle-9"]), capsys)
    assert "got preset 'dalle-9', expected one of openai-12b" in line


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in complaint(lambda: main([]), capsys)
    assert "invalid choice: 'paint'" in complaint(lambda: main(["paint"]), capsys)


def test_fp8_tails(model: Path, tmp_path: Path) -> None:
    """What the option says reaches the cache, the record and a job's manifest."""
    pipeline = Pipeline.load(model, device="cpu", fp8_tails=True)
    list(pipeline.sample("a b", 1))
    assert isinstance(pipeline.engine, TorchEngine) and pipeline.engine.cache is not None
    assert torch.float8_e4m3fn in {tail.dtype for tail in pipeline.engine.cache.tail_k}
    options = ["-n", "1", "--model", str(model), "--device", "cpu", "--fp8-tails"]
    assert main(["sample", "a b", "--out", str(tmp_path / "one"), *options]) == 0
    assert json.loads((tmp_path / "one/sample.json").read_text())["fp8_tails"] is True
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n")
    job = ["sample", "--prompts", str(prompts), "--out", str(tmp_path / "job")]
    assert main([*job, *options]) == 0
    assert json.loads((tmp_path / "job/manifest.json").read_text())["settings"]["tails"] == "fp8"
    assert main([*job, *options[:-1]]) == 2  # another engine, other tokens
