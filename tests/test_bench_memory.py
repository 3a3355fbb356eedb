"""bench.device.Memory: cases wait for a neighbour of the memory to rest, but not for ever."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import device, report
from bench.conftest import counted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only sleeping moves."""
    now = [1000.0]
    monkeypatch.setattr(device.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(device.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def rates(*parts: tuple[float, int]) -> Iterator[float]:
    """(rate, seconds) one after the other, the last for ever; three reads a second."""
    fixed = [rate for rate, seconds in parts[:-1] for _ in range(3 * seconds)]
    return itertools.chain(fixed, itertools.repeat(parts[-1][0]))


def test_what_is_best_is_watched_first(clock: list[float]) -> None:
    read = rates((48.0, 20), (76.0, 10), (48.0, 40), (75.0, 1))
    memory = device.Memory(lambda: next(read))
    assert memory.wait(120) == pytest.approx(75 / 76) and clock[0] == 1070
    assert memory.wait(120) == pytest.approx(75 / 76) and clock[0] == 1070  # at once


def test_what_an_earlier_session_saw_is_believed(clock: list[float]) -> None:
    read = rates((48.0, 7), (70.0, 1))
    memory = device.Memory(lambda: next(read), best=76.0)
    assert memory.wait(120) == pytest.approx(70 / 76) and clock[0] == 1007


def test_no_longer_than_asked(clock: list[float]) -> None:
    memory = device.Memory(lambda: 48.0, best=76.0)
    assert memory.wait(30) == pytest.approx(48 / 76) and clock[0] == 1030
    assert memory.wait(0) < device.RESTED and clock[0] == 1030


def test_runs_beside_a_busy_memory_count_only_where_there_are_no_others() -> None:
    slow, fast, old = {"ratio": 6.0, "memory": 0.6}, {"ratio": 10.0, "memory": 0.95}, {"ratio": 9.0}
    assert counted([slow, fast, old]) == [fast, old] and counted([slow]) == [slow]


def test_a_record_beside_a_busy_memory_is_marked() -> None:
    record = {"case": "c", "column": "x", "contender": "peer", "dtype": "float32", "seconds": 1e-3, "memory": 0.7}
    assert report.cell(record, None) == "1.00 ms †" and report.cell({**record, "memory": 0.95}, None) == "1.00 ms"
