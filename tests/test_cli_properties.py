"""Any command line: never a traceback, never a half-written file, and after bad input no new file at all."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import write_tiny_model

from dalle_fast.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and files that a command may be pointed at."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "half.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "prompts.txt").write_text("a red cube\na blue circle\n")
    record = {"pictures": [{"candidate": 0, "tokens": list(range(32)) * 2}]}
    (folder / "sample.json").write_text(json.dumps(record))
    return folder


NUMBERS = st.one_of(
    st.integers(-2, 40).map(str),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e-300", "1e308", "-1e9", "0.0", "0.5", "1.0000001", "99999999999999999999", "x", ""]
    ),
    st.floats(width=32).map(str),
)
WORDS = st.one_of(
    st.sampled_from(["a red cube", "a cube on a blue circle", "куб", "", "red " * 20, "\ud800", "-5", "{}"]),
    st.text(max_size=8),
)
PATHS = st.sampled_from(["red.png", "half.png", "sample.json", "prompts.txt", "model", "absent", "absent/deeper", "."])
BOXES = st.one_of(
    st.lists(st.integers(-1, 9), min_size=4, max_size=4).map(lambda box: ",".join(map(str, box))),
    st.lists(st.integers(-1, 70), min_size=4, max_size=4).map(lambda box: ",".join(map(str, box)) + "px"),
    st.text(max_size=6),
)
DRAWING: dict[str, st.SearchStrategy[Any] | None] = {
    **dict.fromkeys(["--seed", "--first", "--temperature", "--top-k", "--top-p", "--guidance", "--keep"], NUMBERS),
    "--wave": st.integers(-1, 4).map(str),
    "--rank": st.sampled_from(["clip", "likelihood", "likelihood", "both", "beauty"]),
    "--truncate": None,
    "--preview": None,
    "--dtype": st.sampled_from(["auto", "float32", "int8", "float7"]),
    "--backend": st.sampled_from(["auto", "torch", "cuda", "magic"]),
    "--device": st.sampled_from(["cpu", "cpu", "cuda:7", "abacus", "meta"]),
}
COMMANDS: dict[str, tuple[list[st.SearchStrategy[str]], dict[str, st.SearchStrategy[Any] | None]]] = {
    "sample": ([WORDS], {**DRAWING, "--prompts": PATHS}),
    "regenerate": ([PATHS, WORDS], {**DRAWING, "--box": BOXES, "--candidate": NUMBERS}),
    "score": ([PATHS, WORDS], {"--candidate": NUMBERS, "--truncate": None}),
    "rank": ([PATHS, WORDS], {"--rank": st.sampled_from(["likelihood", "clip"]), "--keep": NUMBERS}),
    "classify": ([PATHS, WORDS], {"--template": WORDS}),
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Mostly well-formed, so that they get far; "@" stands for the world."""
    name = draw(st.sampled_from(list(COMMANDS)))
    places, options = COMMANDS[name]
    line = [name]
    for place in places:
        if draw(st.integers(0, 9)):
            word = draw(place)
            line.append(f"@{word}" if place is PATHS else word)
    for option in draw(st.lists(st.sampled_from(list(options)), max_size=3, unique=True)):
        values = options[option]
        value = "" if values is None else draw(values)
        line += [option] if values is None else [option, f"@{value}" if values is PATHS else value]
    if name == "regenerate" and draw(st.integers(0, 4)):
        line += ["--box", "4,5,8,8"]
    if name in ("sample", "regenerate"):
        line += [
            "-n",
            draw(st.sampled_from(["1", "1", "2", "0", "x"])),
            "--out",
            draw(st.sampled_from(["%new", "%a/b", "@red.png"])),
        ]
    return [*line, "--model", draw(st.sampled_from(["@model"] * 8 + ["@absent", "@red.png"]))]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=command_lines())
def test_any_command_line(world: Path, line: list[str]) -> None:
    work = Path(tempfile.mkdtemp())
    try:
        before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}
        argv = [
            word.replace("@", f"{world}/", 1) if word[:1] == "@" else word.replace("%", f"{work}/") for word in line
        ]
        said, shown = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            try:
                code = main(argv)  # anything that it raises is a traceback
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
        assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file()} == before
        made = [p for p in work.rglob("*") if p.is_file()]
        if code == 2:
            lines = said.getvalue().strip().splitlines()
            assert len(lines) == 1 and ": error: " in lines[0], said.getvalue()
            assert not list(work.iterdir()) and not shown.getvalue()
        else:
            assert code == 0 and shown.getvalue()
        for path in made:
            assert path.suffix in (".png", ".json") and not path.name.startswith(".")
            if path.suffix == ".png":
                Image.open(path).load()
            else:
                json.loads(path.read_text())
    finally:
        shutil.rmtree(work)
