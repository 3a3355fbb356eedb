"""bench.proof with steps that stand in for builds and tests: pages complete at every moment, time kept, no GPU refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import proof
from bench.proof import Proof, Step

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "proof.json").read_text())
    return found


def test_what_happens_to_each_step(tmp_path: Path) -> None:
    steps = [
        Step("fine", python("print('one'); print('3 passed')")),
        Step("bad", python("print('it broke | here'); raise SystemExit(3)")),
        Step("absent", ["no-such-program"], needs="no-such-program"),
        Step("slow", python("import time; print('begun', flush=True); time.sleep(60)"), share=0.01),
        Step("none", python("raise SystemExit(5)"), no_tests=True),
    ]
    start = time.monotonic()
    assert Proof(tmp_path, 1.5, "a GPU").run(steps) == 1
    assert time.monotonic() - start < 30
    items = {item["name"]: item for item in read(tmp_path)["items"]}
    statuses = {name: item["status"] for name, item in items.items()}
    assert statuses == {"fine": "passed", "bad": "failed", "absent": "skipped", "slow": "cut off", "none": "skipped"}
    assert items["fine"]["summary"] == "3 passed" and "begun" in items["slow"]["output"]
    page = (tmp_path / "proof.md").read_text()
    assert "# Proof on a GPU" in page and "| absent | skipped | 0.0 | no-such-program is not installed |" in page
    assert "it broke \\| here" in page and "## Output of bad: failed" in page and "## Output of fine" not in page


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    now = iter([0.0, *[1000.0] * 20])
    assert Proof(tmp_path, 1, "a GPU", clock=lambda: next(now)).run([Step("late", python("raise SystemExit(1)"))]) == 0
    (item,) = read(tmp_path)["items"]
    assert (item["status"], item["summary"]) == ("skipped", "no time left")


RECORD = {
    "case": "A case",
    "column": "batch 1",
    "contender": "dalle_fast",
    "dtype": "bfloat16",
    "seconds": 0.001,
    "commit": "c",
}
RESULTS = {
    "machine": {"device": "GPU", "threads": 1, "torch": "2", "date": "2026-01-01"},
    "limits": {"read": {"1000": 1.0}, "copy": 1.0, "matmul": {}},
    "cases": {"f.py::t": RECORD},
}  # fmt: skip


def test_killed_half_way_the_pages_hold_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "measured").write_text(json.dumps(RESULTS))
    measure = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "pid").write_text(str(os.getpid()))
os.replace(folder / "measured", folder / "results.json")
time.sleep(60)
"""
    code = """
import sys
from pathlib import Path
from bench.proof import Proof, Step
folder, measure = Path(sys.argv[1]), sys.argv[2]
Proof(folder, 5, "a GPU").run([
    Step("first", [sys.executable, "-c", "print('done')"]),
    Step("measurements", [sys.executable, "-c", measure, str(folder)], results=True),
    Step("never", [sys.executable, "-c", ""]),
])
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), measure], cwd=ROOT)
    deadline, row, page = time.monotonic() + 60, "| **dalle_fast** | bfloat16 | 1.00 ms |", tmp_path / "proof.md"
    while time.monotonic() < deadline:
        # Neither is ever half a file, whenever it is read; the page is written after the JSON.
        if (
            (tmp_path / "proof.json").exists()
            and read(tmp_path)["results"]
            and page.exists()
            and row in page.read_text()
        ):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    found = read(tmp_path)
    assert [item["status"] for item in found["items"]] == ["passed", "running", "waiting"]
    assert found["results"]["cases"]["f.py::t"]["seconds"] == 0.001
    assert row in page.read_text()


def test_the_real_steps(tmp_path: Path) -> None:
    steps = {step.name: step for step in proof.steps(tmp_path)}
    assert list(steps) == ["build", "machine", "tests", "memcheck", "racecheck", "measurements"]
    assert "--no-index" in steps["build"].command and "--no-deps" in steps["build"].command
    assert {"tests/test_graph_engine.py", "tests/test_cuda_kernels.py"} <= set(steps["tests"].command)
    assert "not emulated" in steps["tests"].command and steps["racecheck"].command[-2:] == ["-m", "gpu"]
    assert "{minutes}" in steps["measurements"].command and steps["measurements"].results
    # The last one as far as it goes without measuring: pytest knows its options, and has no test of that name.
    command = [part.replace("{minutes}", "0.5") for part in steps["measurements"].command]
    done = subprocess.run([*command, "-k", "nothing_of_that_name"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(proof, "gpu", lambda: None)
    assert proof.main(["--out", str(tmp_path / "new")]) == 2
    assert "no GPU here" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(proof, "gpu", lambda: "NVIDIA H100")
    monkeypatch.setattr(proof, "steps", lambda folder: [Step("only", python("print('ran')"))])
    assert proof.main(["--out", str(tmp_path / "new"), "--minutes", "1"]) == 0
    assert "| only | passed |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        proof.main(["--out", str(tmp_path), "--minutes", "0"])
