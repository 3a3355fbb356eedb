"""The benchmark suite: it runs, it notices a kernel that is slow and one that is wrong, and its report counts right."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import device, report, work
from bench.device import describe, floor
from dalle_fast import cpu_backend
from dalle_fast.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


def bench(*arguments: str, folder: Path | None = None, what: str = "bench") -> subprocess.CompletedProcess[str]:
    """`pytest what …` on one thread, outside this process; modules in `folder` can be named as plugins."""
    path = f"{folder or ROOT}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", "pytest", what, "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


def test_every_case_runs_at_a_toy_size_and_is_right() -> None:
    done = bench("--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 100, done.stdout[-1000:]


CASE = "bench/test_decode_attention.py::test_decode_attention[512 wide-row-1-dalle_fast, torch backend]"
SLOW = """
import time
from dalle_fast import torch_backend
kept = torch_backend.decode_attention
def decode_attention(*args):
    start = time.perf_counter()
    out = kept(*args)
    time.sleep(19 * (time.perf_counter() - start))
    return out
torch_backend.decode_attention = decode_attention
"""
WRONG = """
from dalle_fast import torch_backend
kept = torch_backend.decode_attention
def decode_attention(q, k, v, prefix_k, prefix_v, *others):
    return kept(q, k, v, prefix_k[:, :, :-8].contiguous(), prefix_v[:, :, :-8].contiguous(), *others)
torch_backend.decode_attention = decode_attention
"""


def test_a_slowed_kernel_and_a_wrong_one_are_caught(tmp_path: Path) -> None:
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e11}}
    (tmp_path / "slow_kernel.py").write_text(SLOW)
    (tmp_path / "wrong_kernel.py").write_text(WRONG)
    found = {}
    for name in ("good", "slow", "wrong"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {}}))
        plugin = [] if name == "good" else ["-p", f"{name}_kernel"]
        done = bench(*plugin, "--all", "--results", str(path), folder=tmp_path, what=CASE)
        assert (done.returncode == 0) == (name != "wrong"), done.stdout[-3000:] + done.stderr[-1000:]
        found[name] = json.loads(path.read_text())
        assert list(found[name]["cases"]) == [CASE]
    assert report.worse(found["good"], found["good"]) == []
    (slower,) = report.worse(found["slow"], found["good"])
    assert re.search(r"[\d.]+ times as long as before", slower)
    (wrong,) = report.worse(found["wrong"], found["good"])
    assert "wrong result: got a relative error of" in wrong and "seconds" not in found["wrong"]["cases"][CASE]
    assert report.main([str(tmp_path / "slow.json"), "--against", str(tmp_path / "good.json")]) == 1
    assert report.main([str(tmp_path / "good.json"), "--against", str(tmp_path / "good.json")]) == 0


def test_large_cases_are_compared_with_what_memory_gave_meanwhile(tmp_path: Path) -> None:
    """Any case is large here, and memory gives 1 MB/s."""
    (tmp_path / "slow_memory.py").write_text(
        "from bench import device\ndevice.Reader.nbytes = 4096\ndevice.Reader.__call__ = lambda self: 1e6\n"
    )
    path = tmp_path / "large.json"
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e30}}
    path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {}}))
    done = bench("-p", "slow_memory", "--all", "--results", str(path), folder=tmp_path, what=CASE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    (record,) = json.loads(path.read_text())["cases"].values()
    assert list(record["read"]) == [str(int(record["bytes"]))]
    middle = record["bytes"] / 1e6 / record["seconds"]  # of evenly many passes not quite the middle share
    assert record["share"] == pytest.approx(middle, rel=0.2)
    assert record["limit_seconds"] == pytest.approx(record["share"] * record["seconds"])


def test_a_ratio_is_measured_in_turns(tmp_path: Path) -> None:
    """Where everything takes ten times as long for a while, a ratio does not change, nor does that of the case itself."""
    (tmp_path / "slow_machine.py").write_text(
        "import time\nfrom bench import device\ndevice.Clock.__call__ = lambda self: 10 * time.perf_counter()\n"
    )
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e11}}
    found = {}
    for name in ("usual", "slow"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {}}))
        plugin = [] if name == "usual" else ["-p", "slow_machine"]
        done = bench(*plugin, "--all", "--results", str(path), folder=tmp_path, what=CASE)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        (found[name],) = json.loads(path.read_text())["cases"].values()
    usual, slow = found["usual"], found["slow"]
    assert slow["seconds"] > 4 * usual["seconds"]
    if cpu_backend.kernels_why_not():  # then the torch backend is what others are measured with
        assert usual["ratio"] == slow["ratio"] == 1.0
    else:
        assert 0.4 < slow["ratio"] / usual["ratio"] < 2.5 and usual["ratio"] != 1.0
        assert usual["ratios"][0] <= usual["ratio"] <= usual["ratios"][1]
        assert 0 <= usual["counted"] <= usual["passes"] and usual["beside"] > 0


def test_runs_of_a_case_are_joined_by_their_median(tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e11}}
    path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {}}))
    (tmp_path / "never_settled.py").write_text(
        "from bench import conftest, turns\nconftest.settled = lambda record: False\n"
        "turns.disturbed = lambda record: False\nturns.HASTE = 1e9\n"  # of disturbed runs fewer would count
    )
    for runs in range(1, 4):
        done = bench("-p", "never_settled", "--all", "--again", "--results", str(path), folder=tmp_path, what=CASE)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        (record,) = json.loads(path.read_text())["cases"].values()
        assert len(record.get("runs", [record])) == runs
    order = sorted((run.get("ratio", 0.0), run["seconds"]) for run in record["runs"])
    assert len({seconds for _, seconds in order}) == 3
    assert (record.get("ratio", 0.0), record["seconds"]) == order[1]
    assert record["share"] == next(run["share"] for run in record["runs"] if run["seconds"] == record["seconds"])
    assert all("runs" not in run and run["commit"] for run in record["runs"])


def test_again_leaves_out_what_is_settled(tmp_path: Path) -> None:
    path = tmp_path / "settled.json"
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e11}}
    for second, runs in ((1.01, 2), (2.0, 3)):
        both = [{"seconds": 1e-3 * x, "ratio": 3.0 * x, "ratios": [3.0, 6.0], "commit": "abc"} for x in (1.0, second)]
        record = {"case": "x", "column": "y", "contender": "z", "dtype": "float32", **both[0], "runs": both}
        path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {CASE: record}}))
        done = bench("--all", "--again", "--results", str(path), what=CASE)
        assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-1000:]  # 5: nothing to run
        assert len(json.loads(path.read_text())["cases"][CASE]["runs"]) == runs


def data() -> dict[str, Any]:
    def record(contender: str, dtype: str, seconds: float, **more: Any) -> dict[str, Any]:
        base = {"case": "A step of x: y", "column": "batch 1", "contender": contender, "dtype": dtype, "batch": 1}
        timed = {"seconds": seconds, "bytes": 1e6, "flops": 2e6, "limit_seconds": 1e-4, "share": 1e-4 / seconds}
        return base | timed | {"by_position": [[1, seconds], [2, seconds]], "commit": "abc"} | more

    memory = {
        "case": "Memory of a candidate",
        "column": "12B",
        "dtype": "bfloat16",
        "preset": "openai-12b",
        "commit": "abc",
    }
    return {
        "machine": {"device": "Test", "threads": 2, "torch": "2", "date": "2026-01-01"},
        "limits": {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"float32": 1e11}},
        "cases": {
            "f.py::a[1]": record("dalle_fast, cpu", "bfloat16", 2e-4),
            "f.py::a[2]": record("dalle_fast, cpu", "bfloat16", 4e-4, column="batch 8", batch=8),
            "f.py::b": record("dalle_fast, cpu", "int8", 1e-4),
            "f.py::c": record("peer", "float32", 1e-3, others=0.02),
            "f.py::e": record("hurried", "float32", 2e-3, others=0.4),
            "f.py::d": {**record("other", "float32", 1), "skipped": "not here"} | {"seconds": None},
            "f.py::m": {**memory, "contender": "dalle_fast", "held_bytes": 287_000_000},
            "f.py::n": {**memory, "contender": "dense", "held_bytes": 1_300_000_000},
        },
    }  # fmt: skip


def test_files_of_a_device_are_one_table() -> None:
    """What was measured last counts; what was merely skipped later does not."""
    old, new = data(), data()
    names = [name for name, record in old["cases"].items() if "seconds" in record]
    new["cases"] = {names[0]: {**old["cases"][names[0]], "seconds": 77.0}, names[1]: {"skipped": "no time left"}}
    (both,) = report.joined([old, new])
    assert list(both["cases"]) == list(old["cases"]) and both["cases"][names[0]]["seconds"] == 77.0
    assert both["cases"][names[1]] == old["cases"][names[1]]
    other = {**data(), "machine": {**old["machine"], "device": "another"}}
    assert len(report.joined([old, other, new])) == 2


def test_tables() -> None:
    found = data()
    del found["cases"]["f.py::d"]["seconds"]
    text = report.tables([found])
    assert "| **dalle_fast, cpu** | bfloat16 | 200 µs (50 %) | 400 µs (25 %) |" in text
    assert "| **dalle_fast, cpu** | int8 | 100 µs (0.50×, 100 %) |  |" in text
    assert "| peer | float32 | 1.00 ms (5.00×, 10 %) |  |" in text
    assert (
        "| hurried | float32 | 2.00 ms (10.0×, 5 %) † |  |" in text
        and "- †: others used more than 10 % of the machine" in text
    )
    assert "| other |" not in text and "- other: not here" in text
    assert "| **dalle_fast** | bfloat16 | 287 MB |" in text and "| dense | bfloat16 | 1.30 GB (4.53×) |" in text


def test_documents_are_filled_and_numbers_without_a_result_refused() -> None:
    found = data()
    text = "x <!-- figure: c / a[1] -->?<!-- /figure --> and <!-- figure: a[1] share -->?<!-- /figure --> of it"
    assert report.filled(text, [found]).split("-->")[1::2] == ["5.00×<!-- /figure ", "50 %<!-- /figure "]
    assert "1.30 GB" in report.filled("<!-- figure: n --><!-- /figure -->", [found])
    block = "<!-- bench: Memory -->\nold\n<!-- /bench -->"
    assert "287 MB" in report.filled(block, [found]) and "old" not in report.filled(block, [found])
    for unknown in ("<!-- figure: zzz --><!-- /figure -->", "<!-- bench: Unknown -->\n<!-- /bench -->"):
        with pytest.raises(ValueError, match="got "):
            report.filled(unknown, [found])


def test_two_runs_disagree_beyond_15_percent() -> None:
    one, two = data(), copy.deepcopy(data())
    assert report.disagree(one, two) == []
    two["cases"]["f.py::c"]["seconds"] *= 1.1
    assert report.disagree(one, two) == []
    two["cases"]["f.py::c"]["seconds"] *= 1.1
    assert report.disagree(one, two) == [
        "A step of x: y, batch 1: peer float32: 5.00 and 6.05, beside ours of 200 µs and 200 µs"
    ]


def test_ratios_measured_in_turns_count_before_those_of_times() -> None:
    found = data()
    found["cases"]["f.py::c"]["ratio"] = 7.5
    assert report.ratios(found)["A step of x: y, batch 1: peer float32"] == pytest.approx(
        5.0
    )  # ours was not measured in turns
    found["cases"]["f.py::a[1]"]["ratio"] = 1.0
    assert report.ratios(found)["A step of x: y, batch 1: peer float32"] == 7.5
    assert "| peer | float32 | 1.00 ms (7.50×, 10 %) |" in report.tables([{**found, "cases": {
        name: record for name, record in found["cases"].items() if not name.endswith("::d")
    }}])  # fmt: skip
    found["cases"]["f.py::b"]["ratio"] = 0.5
    assert report.filled("<!-- figure: c / b --><!-- /figure -->", [found]).count("15.0×") == 1
    found["cases"]["f.py::a[2]"]["ratio"] = 1.0  # of another column, which other turns were measured with
    assert report.filled("<!-- figure: a[2] / a[1] --><!-- /figure -->", [found]).count("2.00×") == 1
    # Ours in another type, faster by the clock, slower in turns: not what others are held against.
    ours = found["cases"]["f.py::a[1]"]
    other = {**ours, "dtype": "float16", "seconds": ours["seconds"] / 2, "ratio": 1.3}
    assert report.baseline([other, ours]) is ours
    assert report.baseline([{name: x for name, x in other.items() if name != "ratio"}, ours]) is not ours


def test_report_with_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = data()
    del found["cases"]["f.py::d"]
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = ("roofline", "step_by_batch", "memory", "step_by_position")
    assert names == {"report.md", *(f"{p}.{end}" for p in plots for end in ("png", "svg"))}
    assert all(path.stat().st_size > 2000 for path in (tmp_path / "out").glob("*.svg"))
    assert "![roofline](roofline.png)" in (tmp_path / "out/report.md").read_text()


def test_least_work() -> None:
    """The counts of the issue that they answer: 12.1 B weights, tails 4.5 times smaller than dense caches, a limit."""
    config = ModelConfig.preset("openai-12b")
    assert abs(work.weights(config) / 12.125e9 - 1) < 0.01
    ours, dense = work.tail_bytes(config)
    assert dense / ours > 4.4
    limits = {"read": {"1000": 100.0, "100000": 10.0}, "matmul": {"bfloat16": 1000.0}}
    assert floor(limits, 1000, 0, "bfloat16") == 10 and floor(limits, 1e6, 0, "bfloat16") == 1e5
    assert floor(limits, 10_000, 0, "int4") == pytest.approx(10_000 / 10**1.5)
    assert floor(limits, 1, 5e6, "bfloat16") == 5000


def test_reading_is_measured_again_for_the_sizes_that_matter(monkeypatch):
    """The two between which a case lies, the largest for one beyond them all, the smallest for one below."""
    monkeypatch.setattr(device, "READ_MB", (1, 2, 4))
    for nbytes, sizes in ((10, [1]), (1.5e6, [1, 2]), (3e6, [2, 4]), (9e9, [2, 4])):
        rates = device.read_rates_now(nbytes, seconds=0.001)
        assert [int(size) >> 20 for size in rates] == sizes and min(rates.values()) > 1e6
        limits = {"read": rates, "matmul": {"bfloat16": 1e30}}
        assert nbytes / max(rates.values()) <= floor(limits, nbytes, 0, "bfloat16") <= nbytes / min(rates.values())


@pytest.mark.skipif(device.ON_GPU, reason="the memory of a GPU is its own")
def test_what_ran_beside_a_busy_memory_says_so_and_runs_again(tmp_path: Path) -> None:
    path = tmp_path / "busy.json"
    limits = {"read": {"1000000": 1e10}, "copy": 1e10, "matmul": {"bfloat16": 1e11, "float32": 1e11}}
    path.write_text(json.dumps({"machine": describe(), "limits": limits, "cases": {}}))
    for wait, others, expected in (("1", 0.0, 0.5), ("0", 0.05, None)):  # only who waits asks for it
        (tmp_path / "busy.py").write_text(
            "from bench import neighbours, turns\nneighbours.Pace.wait = lambda self, seconds: 0.5\n"
            "turns.HASTE = 1e9\n"  # else, on a busy machine, too few passes might count, which is marked too
            f"neighbours.Others.share = lambda self: {others}\n"
        )
        done = bench("-p", "busy", "--all", "--wait", wait, "--results", str(path), folder=tmp_path, what=CASE)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
        (record,) = json.loads(path.read_text())["cases"].values()
        assert record.get("memory") == expected and ("†" in done.stdout) == (expected is not None)
        assert record.get("in_vain") == (None if expected is None else 1.0)  # nor were the cores ever at their pace


@pytest.mark.skipif(device.ON_GPU, reason="a GPU has instructions for every type")
def test_limits_of_a_type_without_instructions_take_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, multiply = [], torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.bfloat16:
            sides.append(len(a))
            time.sleep(2 * len(a) ** 3 / 1e9)
            return a
        return multiply(a, b)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(device, "READ_MB", (1,))
    found = device.measure_limits(0.02)["matmul"]
    assert set(sides) == {256}
    assert found["bfloat16"] >= found["float32"] > 0  # whoever lacks the former computes with the latter


@pytest.mark.skipif(device.ON_GPU, reason="on a GPU bfloat16 is always best")
@pytest.mark.parametrize("best", ["bfloat16", "float32"])
def test_every_model_steps_in_its_best_type_at_every_batch(best: str, tmp_path: Path) -> None:
    (tmp_path / "best_type.py").write_text(f"from bench import device\ndevice.BEST = {best!r}\n")
    done = bench("-p", "best_type", "--all", "--collect-only", folder=tmp_path, what="bench/test_step.py")
    ids = set(re.findall(r"test_step\[(.*?)\]", done.stdout))
    for batch in (1, 8, 32):
        for name in (f"dalle-pytorch-{batch}-dalle_pytorch_forward", f"rudalle-{batch}-rudalle_forward"):
            assert f"{name}-{best}" in ids
            assert (f"{name}-bfloat16" in ids) == (best == "bfloat16")
        assert {f"paper-{batch}-ours_torch-{best}", f"paper-{batch}-ours_cpu-bfloat16"} <= ids
