"""Runs the cases in order of importance, within a time, and writes each one down as soon as it is measured.

pytest bench                               the most important cases, and the table
pytest bench --all --minutes 12 --results bench/results     all of them, into bench/results/DATE-DEVICE.json; what
                                           stands in that file already is not measured again, unless it was disturbed
pytest bench --all --wait 180 --results FILE               on a machine that others share: while it is as fast as it can be
pytest bench --all --again --results FILE  all of them once more, then those that are not settled: of a case's runs the
                                           median ratio counts, and others must agree with it, but for five runs
pytest bench --benchmark-disable           every case once, at a toy size: does it run, is its result right?
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device
from bench.neighbours import Others, Pace, Product, neighbours
from bench.report import BUSY, disturbed
from bench.turns import Turns, middle_run, noise, settled
from bench.work import Work

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--all", action="store_true", help="measure all cases, not only the most important ones")
    group.addoption("--minutes", type=float, default=math.inf, help="start no case after this time")
    group.addoption(
        "--again",
        action="store_true",
        help="measure also what stands in the file, unless its runs agree; of all runs the median ratio counts",
    )
    group.addoption(
        "--wait",
        type=float,
        default=0.0,
        help="seconds to wait, before each case and in it, for others to rest, for memory and cores to be as fast as they can",
    )
    group.addoption("--results", metavar="PATH", help="JSON file to write and to resume, or the folder for a new one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "importance(n): 1 is measured first and always, 2 and more with --all, in order")
    config.addinivalue_line("markers", "compiles: takes long to compile whatever the size; left out of the smoke test")


def importance(item: pytest.Item) -> int:
    """The largest of the marks on the test and its parameters."""
    return max((mark.args[0] for mark in item.iter_markers("importance")), default=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = config.getoption("benchmark_disable")
    if smoke:
        torch.set_num_threads(1)  # toy sizes gain nothing from threads, and wait for each other where cores are busy
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device.clock, group=item.originalname, warmup=False))  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.timeout(600))
    items.sort(key=importance)  # stable
    store = config.stash[STORE] = Store(config)
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("compiles") if smoke else importance(item) > 1 and not config.getoption("all"))
        or store.has(item.nodeid)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def commit() -> str:
    """The commit at hand, marked "+" if the code that is measured differs from it."""
    code = ["dalle_fast", "kernels", "csrc", "bench", "setup.py", ":!bench/results", ":!dalle_fast/assets"]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *code], cwd=ROOT, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DALLE_FAST_COMMIT", "unknown")
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


class Store:
    """The results file: {"machine": …, "limits": …, "cases": {test: record}}, complete after every case."""

    def __init__(self, config: pytest.Config) -> None:
        self.start, self.minutes = time.monotonic(), config.getoption("minutes")
        self.again = config.getoption("again")
        self.machine = device.describe()
        self.commit = commit()
        self.path: Path | None = None
        self.earlier: dict[str, dict[str, Any]] = {}  # what stood there before this session
        self.data: dict[str, Any] = {"machine": self.machine, "limits": None, "cases": {}}
        if (place := config.getoption("results")) and not config.getoption("benchmark_disable"):
            self.path = Path(place)
            if self.path.suffix != ".json":
                slug = re.sub(r"[^a-z0-9]+", "-", self.machine["device"].lower()).strip("-")
                self.path = self.path / f"{self.machine['date']}-{slug}.json"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.data = json.loads(self.path.read_text())
                if self.data["machine"]["device"] != self.machine["device"]:
                    raise pytest.UsageError(
                        f"{self.path} is of {self.data['machine']['device']}, this is {device.name()}"
                    )

        if (wait := config.getoption("wait")) and not device.ON_GPU and not config.getoption("benchmark_disable"):
            best = self.data.get("best", {})
            memory = Pace(self.reader, best.get("memory", 0.0))
            neighbours.wait_for(memory, Pace(Product(), best.get("cores", 0.0), every=0.05), wait)

    @cached_property
    def reader(self) -> device.Reader:
        return device.Reader()

    def has(self, test: str) -> bool:
        record = self.data["cases"].get(test, {})
        if self.again:
            return "seconds" in record and settled(record)
        return bool({"seconds", "held_bytes"} & record.keys()) and not disturbed(record)

    def limits(self) -> dict[str, Any]:
        for _ in range(3):
            if self.data["limits"] is not None and self.data["limits"].get("others", 0.0) <= BUSY:
                break
            neighbours.before()
            others = Others()
            self.data["limits"] = device.measure_limits()
            self.data["limits"]["others"] = 0.0 if device.ON_GPU else round(others.share(), 3)
        return dict(self.data["limits"])

    def add(self, test: str, record: dict[str, Any]) -> None:
        # What stood there before this session: a case may be added once more, with more facts.
        before = self.earlier.setdefault(test, self.data["cases"].get(test, {}))
        record = {**record, "commit": self.commit}
        quieter = "seconds" in before and noise(before) < noise(record)
        if self.again and "seconds" in before and "seconds" in record:
            self.data["cases"][test] = middle_run(before, record)
        elif not quieter or "failed" in record:
            self.data["cases"][test] = record
        if neighbours.seconds:
            self.data["best"] = {"memory": neighbours.memory.best, "cores": neighbours.cores.best}
        if self.path:  # complete at every moment
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(self.data, indent=1) + "\n")
            os.replace(scratch, self.path)

    def late(self) -> bool:
        return time.monotonic() - self.start > 60 * self.minutes


STORE: pytest.StashKey[Store] = pytest.StashKey()


class Measure:
    """Times one case and records it. `facts` is the record that is written down."""

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any) -> None:
        self.benchmark, self.node = benchmark, request.node
        self.store = request.config.stash[STORE]
        self.small: bool = benchmark.disabled
        self.reader = None if self.small or device.ON_GPU else self.store.reader
        self.held = device.reset_peak()
        self.facts: dict[str, Any] = {}

    def describe(self, case: str, column: str, contender: str, dtype: str, **facts: Any) -> None:
        """Where the record stands: the title of its table, its column, and its row: contender and dtype."""
        self.facts = {"case": case, "column": column, "contender": contender, "dtype": dtype, **facts}

    def check(self, out: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
        """The relative error of a result, which must stay below the bound (NaN does not); the largest is recorded."""
        out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
        assert out.shape == expected.shape, f"got {list(out.shape)}, expected {list(expected.shape)}"
        error = float((out - expected).norm() / expected.norm())
        assert error <= bound, f"wrong result: got a relative error of {error:.2g}, expected at most {bound:.2g}"
        self.facts["error"] = max(error, self.facts.get("error", 0.0))

    def __call__(
        self, run: Callable[[], Any], *, work: Work | None = None, positions: list[int] | None = None, passes: int = 5,
        setup: Callable[[], None] | None = None, calls: int = 1, warmup: int = 1,
        against: Callable[[], list[float]] | None = None,
    ) -> None:  # fmt: skip
        """Times `passes` passes over `positions` (default: one), each a round after `setup`, and records the median of the
        passes' means, with their 10 % and 90 % quantiles. calls: how often a round does what is measured.

        A CPU's memory and cores may be shared with others, and what they leave changes within seconds. So what a case is
        compared with is measured beside it: `against` plays what its column is held against for a moment, the same calls each
        time, and returns their seconds, before each pass and after the last, for the ratio; passes between two moments at its
        pace count, if there are any. And where the caches hold next to nothing of what must be read, memory is read before
        every round, for the share."""
        a_pass = len(positions or [0])
        rounds = passes * a_pass
        rates: list[float] = []
        beside: list[list[float]] = []
        column = f"{self.facts['case']}, {self.facts['column']}"
        reader = self.reader if self.reader and work and work.bytes >= self.reader.nbytes else None
        count = itertools.count(-warmup)

        def prepare() -> None:
            at = next(count)
            if against and at >= 0 and at % a_pass == 0:
                beside.append(neighbours.moment(against, column))
            if setup:
                setup()
            if reader:
                rates.append(reader())
            neighbours.rest()

        neighbours.before()
        others = Others()
        with device.freed_memory_kept():
            self.benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=warmup)
            if against:
                beside.append(neighbours.moment(against, column))
        if self.small:
            return
        self.facts |= neighbours.after()
        times = torch.tensor(self.benchmark.stats.stats.data, dtype=torch.float64).view(passes, -1) / calls
        reads = torch.tensor(rates[-rounds:] or [math.nan] * rounds, dtype=torch.float64).view(passes, -1)
        if beside:
            turns = Turns(times, torch.tensor(beside, dtype=torch.float64), neighbours.usual(column))
            times, reads = times[turns.kept], reads[turns.kept]
            self.facts |= {"ratio": turns.ratio(), "ratios": turns.extremes(), "counted": turns.counted}
            self.facts["beside"] = turns.beside()
        means = times.mean(1).sort().values
        if not device.ON_GPU:
            self.facts["others"] = round(others.share(), 3)
        seconds, rate = float(means.median()), None
        if work and rates:
            share = float((work.bytes / reads.mean(1) / times.mean(1)).median())
            rate = work.bytes / (share * seconds)
        self.record(seconds, means.quantile(0.1).item(), means.quantile(0.9).item(), passes, work, rate)
        if positions and len(positions) > 1:
            parts = list(zip(positions, times.median(0).values.tolist(), strict=True))
            bins = [parts[i * len(parts) // 32 : (i + 1) * len(parts) // 32] for i in range(32)]
            self.facts["by_position"] = [[statistics.mean(x) for x in zip(*part, strict=True)] for part in bins if part]
            self.save()

    def hold(self, nbytes: int) -> None:
        """Records an amount of memory, where there is nothing to time."""
        self.benchmark.pedantic(lambda: None)
        self.facts["held_bytes"] = nbytes
        self.save()

    def record(
        self, seconds: float, low: float, high: float, passes: int, work: Work | None, rate: float | None
    ) -> None:
        """rate: bytes/s of reading while the case ran, if that was measured."""
        self.facts |= {"seconds": seconds, "low": low, "high": high, "passes": passes}
        self.facts["peak_bytes"] = max(0, device.peak() - self.held)
        if work:
            limits = self.store.limits()
            if rate:
                self.facts["read"] = limits["read"] = {str(int(work.bytes)): rate}
            elif not device.ON_GPU:
                self.facts["read"] = limits["read"] = device.read_rates_now(work.bytes)
            least = device.floor(limits, work.bytes, work.flops, self.facts["dtype"])
            self.facts |= {"bytes": work.bytes, "flops": work.flops, "limit_seconds": least, "share": least / seconds}
        self.save()

    def save(self) -> None:
        if self.small:
            return
        self.benchmark.extra_info.update(self.facts)
        self.store.add(self.node.nodeid, self.facts)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Measure:
    made = request.node.measure = Measure(request, benchmark)
    if not made.small and made.store.late():
        benchmark.skipped = True
        pytest.skip("no time left")
    if not made.small:
        made.store.limits()
        made.held = device.reset_peak()
    return made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A case that fails or cannot run here stays in the table, with its reason."""
    yield
    made: Measure | None = getattr(item, "measure", None)
    if made and call.excinfo and not made.small and made.facts and not made.store.late():
        how = "skipped" if call.excinfo.errisinstance(pytest.skip.Exception) else "failed"
        lines = str(call.excinfo.value).strip().splitlines() or [call.excinfo.typename]
        made.store.add(item.nodeid, {**made.facts, how: lines[0][:200]})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    store = config.stash.get(STORE, None)
    if store and store.data["cases"] and not config.getoption("benchmark_disable"):
        from bench.report import tables

        terminalreporter.write_line("")
        terminalreporter.write(tables([store.data]))
        if store.path:
            terminalreporter.write_line(f"\nwritten: {store.path}")
