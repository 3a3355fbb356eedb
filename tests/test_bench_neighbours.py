"""bench.neighbours: cases wait for who shares memory and cores to rest, but not for ever."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import neighbours, report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only sleeping moves."""
    now = [1000.0]
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(neighbours.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def rates(*parts: tuple[float, int]) -> Iterator[float]:
    """(rate, seconds) one after the other, the last for ever; three reads a second."""
    fixed = [rate for rate, seconds in parts[:-1] for _ in range(3 * seconds)]
    return itertools.chain(fixed, itertools.repeat(parts[-1][0]))


def test_what_is_best_is_watched_first(clock: list[float]) -> None:
    read = rates((48.0, 20), (76.0, 10), (48.0, 40), (75.0, 1))
    memory = neighbours.Pace(lambda: next(read))
    assert memory.wait(120) == pytest.approx(75 / 76) and clock[0] == 1070
    assert memory.wait(120) == pytest.approx(75 / 76) and clock[0] == 1070  # at once


def test_what_an_earlier_session_saw_is_believed(clock: list[float]) -> None:
    read = rates((48.0, 7), (70.0, 1))
    memory = neighbours.Pace(lambda: next(read), best=76.0)
    assert memory.wait(120) == pytest.approx(70 / 76) and clock[0] == 1007


def test_no_longer_than_asked(clock: list[float]) -> None:
    memory = neighbours.Pace(lambda: 48.0, best=76.0)
    assert memory.wait(30) == pytest.approx(48 / 76) and clock[0] == 1030
    assert memory.wait(0) < report.RESTED and clock[0] == 1030


def test_a_record_beside_a_busy_memory_is_marked() -> None:
    record = {"case": "c", "column": "x", "contender": "peer", "dtype": "float32", "seconds": 1e-3, "memory": 0.6}
    assert report.cell(record, None) == "1.00 ms †" and report.cell({**record, "memory": 0.95}, None) == "1.00 ms"


def test_a_record_beside_busy_cores_or_of_few_passes_is_marked() -> None:
    record = {"case": "c", "column": "x", "contender": "peer", "dtype": "float32", "seconds": 1e-3, "passes": 20}
    for facts, marked in (
        ({"in_vain": 0.2}, True),
        ({"in_vain": 0.05}, False),
        ({"counted": 6}, True),
        ({"counted": 7}, False),
    ):
        assert report.cell({**record, **facts}, None) == "1.00 ms" + " †" * marked


@pytest.fixture
def waiting(clock: list[float]) -> tuple[neighbours.Neighbours, list[float]]:
    """Neighbours to wait for, 10 seconds in all, and the pace of the cores, which a test may change."""
    pace = [100.0]
    found = neighbours.Neighbours()
    found.wait_for(
        neighbours.Pace(lambda: 1.0, best=1.0), neighbours.Pace(lambda: pace[0], best=100.0, every=0.5), 10.0
    )
    return found, pace


def test_the_parts_of_a_measurement_wait_for_the_cores(clock: list[float], waiting: Any) -> None:
    found, pace = waiting
    found.before()
    start = clock[0]
    clock[0] += 1
    found.rest()
    assert clock[0] == start + 1 and found.after() == {}  # at rest
    pace[0] = 50.0
    found.rest()
    assert clock[0] == start + 1  # asked again at once
    clock[0] += 1
    found.rest()
    assert clock[0] == start + 12 and found.after() == {"in_vain": 0.333}  # all that it may wait
    clock[0] += 1
    found.rest()
    assert clock[0] == start + 13 and found.after() == {"in_vain": 0.5}
    found.before()  # of the next measurement
    assert found.left < 10 and found.after() == {"in_vain": 1.0}


def test_a_moment_is_played_again_until_it_is_at_its_pace(clock: list[float], waiting: Any) -> None:
    found, _ = waiting
    found.before()
    times = itertools.chain([1.0, 1.02, 1.5, 1.4, 1.01], itertools.repeat(2.0))

    def play() -> list[float]:
        clock[0] += 1
        return [next(times)]

    assert [found.moment(play, "x") for _ in range(3)] == [[1.0], [1.02], [1.01]]
    assert found.usual("x") == 1.0
    assert found.moment(play, "x") == [2.0] and found.left == 0.0  # no longer than it may
    start = clock[0]
    assert found.moment(play, "y") == [2.0] and clock[0] == start + 1  # another


def test_freed_memory_is_kept_while_measuring_and_no_longer() -> None:
    """After some, 50 results of 64 MB in a row take no new pages; afterwards all is as it was."""
    program = """
import resource, sys
sys.path.append(sys.argv[1])
import torch
from bench import device
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with device.freed_memory_kept():
    for _ in range(20):
        torch.ones(2**24)
    before = faults()
    for _ in range(50):
        torch.ones(2**24)
    assert faults() - before < 2**14, faults() - before
    held = device._status("VmRSS")
assert held - device._status("VmRSS") > 2**25
before = faults()
torch.ones(2**24)
assert faults() - before >= 2**14
pieces = [torch.ones(2**12) for _ in range(2**12)]  # 64 MB
last = torch.ones(2**12)
del pieces
held = device.reset_peak()  # what is free but not given back is no use of memory
pieces = [torch.ones(2**12) for _ in range(2**12)]
assert device.peak() - held > 2**25
"""
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_nobody_waits_unasked(clock: list[float]) -> None:
    found = neighbours.Neighbours()
    found.before()
    found.rest()
    times = iter([[1.0], [5.0]])
    assert [found.moment(lambda: next(times), "x") for _ in range(2)] == [[1.0], [5.0]]
    assert clock[0] == 1000.0 and found.after() == {}
