"""One command that proves the package on a GPU: build, tests, sanitizer, limits, and the cases in order of importance.

python -m bench.proof --out DIR --minutes 9

leaves DIR/proof.json and DIR/proof.md, rewritten whenever something was finished or measured, each complete or not at all:
killed half-way, they hold what was done until then. Needs nothing from the network. Exit status 0: all that there was time
for passed; 1: something failed; 2: no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 40  # lines of output that are kept of an item


@dataclass(frozen=True)
class Step:
    """A command, and the share of the time left when it starts that it may take ("{minutes}" in it becomes nine tenths of
    that). Without `needs` on PATH it is skipped. results: whether it writes the benchmark's results file."""

    name: str
    command: Sequence[str]
    share: float = 1.0
    needs: str | None = None
    results: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    no_tests: bool = False  # whether pytest's "no tests collected" (5) means skipped


@dataclass
class Item:
    """What became of a step."""

    name: str
    command: str
    status: str = "waiting"  # waiting, running, passed, failed, cut off, skipped
    seconds: float = 0.0
    summary: str = ""
    output: str = ""


def steps(folder: Path) -> list[Step]:
    """In order; what is left of the time after build, tests and sanitizer belongs to the measurements."""
    python, quiet = sys.executable, ["-q", "-p", "no:cacheprovider"]
    install = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    pytest = [python, "-m", "pytest", *parallel, *quiet]
    on_gpu = [*pytest, *gpu_test_files(), "-m", "gpu"]
    one_allocation_each = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an access beyond one hits the next
    results = str(folder / "results.json")
    return [
        Step("build", [python, *install], 0.5),
        Step("machine", [python, "-m", "dalle_fast.env"], 0.1),
        Step("tests", [*pytest, *gpu_test_files(), "-m", "not emulated", "--maxfail", "20"], 0.3, no_tests=True),
        *(
            Step(
                tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *on_gpu], 0.12,
                "compute-sanitizer", environment=one_allocation_each, no_tests=True,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Step(
            "measurements",
            [python, "-m", "pytest", "bench", "--all", "--minutes", "{minutes}", "--results", results, *quiet], 1.0,
            results=True,
        ),
    ]  # fmt: skip


def gpu_test_files() -> list[str]:
    """The tests that compute on a GPU where there is one."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    words = ("helpers import", "DEVICE"), ("mark.gpu", ""), ("@machines", "")
    return [str(f.relative_to(ROOT)) for f in files if any(all(w in f.read_text() for w in pair) for pair in words)]


class Proof:
    """Runs steps within a time and keeps the two pages up to date."""

    def __init__(self, folder: Path, minutes: float, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.device, self.clock = folder, device, clock
        self.minutes, self.started = minutes, datetime.now(UTC).isoformat(timespec="seconds")
        self.end = clock() + 60 * minutes
        self.items: list[Item] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, planned: Sequence[Step]) -> int:
        """The exit status."""
        self.items = [Item(step.name, " ".join(step.command)) for step in planned]
        self.write()
        for step, item in zip(planned, self.items, strict=True):
            left = self.end - self.clock()
            if step.needs and shutil.which(step.needs) is None:
                item.status, item.summary = "skipped", f"{step.needs} is not installed"
            elif left < 1:
                item.status, item.summary = "skipped", "no time left"
            else:
                item.status = "running"
                self.write()
                self.execute(step, item, left * step.share)
            self.write()
        return int(any(item.status == "failed" for item in self.items))

    def execute(self, step: Step, item: Item, limit: float) -> None:
        log, start = self.folder / f"{step.name}.log", self.clock()
        changed = 0.0
        command = [part.replace("{minutes}", f"{0.9 * limit / 60:.2f}") for part in step.command]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **step.environment},
            )  # fmt: skip
            while process.poll() is None and self.clock() - start < limit:
                time.sleep(0.05)
                results = self.folder / "results.json"
                if step.results and results.exists() and results.stat().st_mtime != changed:
                    changed = results.stat().st_mtime
                    self.write()
            cut = process.poll() is None
            if cut:
                stop(process)
        lines = log.read_text(errors="replace").splitlines()
        item.seconds, item.output = round(self.clock() - start, 1), "\n".join(lines[-TAIL:])
        item.summary = next((line for line in reversed(lines) if line.strip()), "")[:200]
        if cut:
            item.status, item.summary = "cut off", f"after {item.seconds:.0f} s: {item.summary}"
        elif step.no_tests and process.returncode == 5:
            item.status, item.summary = "skipped", "no such tests"
        else:
            item.status = "passed" if process.returncode == 0 else "failed"

    def results(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        except (OSError, ValueError):
            return None
        return found

    def write(self) -> None:
        data = {
            "device": self.device, "started": self.started, "minutes": self.minutes,
            "items": [asdict(item) for item in self.items], "results": self.results(),
        }  # fmt: skip
        replace(self.folder / "proof.json", json.dumps(data, indent=1) + "\n")
        replace(self.folder / "proof.md", page(data))


def page(data: dict[str, Any]) -> str:
    """The Markdown page of a proof.json."""
    from bench.report import tables

    lines = [f"# Proof on {data['device']}", "", f"Started {data['started']}, {data['minutes']:g} minutes.", ""]
    lines += ["| step | result | seconds | |", "|---|---|---:|---|"]
    for item in data["items"]:
        summary = item["summary"].replace("|", "\\|")
        lines.append(f"| {item['name']} | {item['status']} | {item['seconds']:.1f} | {summary} |")
    if data["results"]:
        lines += ["", "## Measurements", "", tables([data["results"]])]
    for item in data["items"]:
        if item["output"] and item["status"] != "passed":
            lines += ["", f"## Output of {item['name']}: {item['status']}", "", "```", item["output"], "```"]
    return "\n".join(lines).rstrip() + "\n"


def replace(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    scratch = path.with_suffix(path.suffix + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and its children: first kindly, so that it can write what it has."""
    for how in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue


def gpu() -> str | None:
    """Name of the GPU, None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof", description="Builds, tests and measures on a GPU, within a time."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where proof.json and proof.md go")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: 9)")
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error(f"got --minutes {args.minutes:g}, expected more than 0")
    device = gpu()
    if device is None:
        sys.stderr.write("bench.proof: no GPU here: torch finds no CUDA device. `pytest bench` measures the CPU.\n")
        return 2
    folder = args.out.resolve()
    status = Proof(folder, args.minutes, device).run(steps(folder))
    sys.stdout.write((folder / "proof.md").read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
