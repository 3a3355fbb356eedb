"""Runs the cases in order of importance, within a time, and writes each one down as soon as it is measured.

pytest bench                               the most important cases, and the table
pytest bench --all --minutes 12 --results bench/results     all of them, into bench/results/DATE-DEVICE.json; what
                                           stands in that file already is not measured again, unless other processes
                                           kept more than BUSY of the machine busy meanwhile
pytest bench --again --wait 120 --results FILE             on a machine whose memory others share: when it is fast
pytest bench --all --again --results FILE  all of them once more, then those that are not settled: of a case's runs the
                                           median ratio counts, and others must agree with it, but for RUNS runs
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
from bench.report import BUSY, SLOWER, disturbed
from bench.work import Work

ROOT = Path(__file__).resolve().parent.parent
RUNS = 5  # of a case that does not settle


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
        help="seconds to wait, before each case, for others to rest and for memory to be as fast as it has been",
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


def counted(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that nobody disturbed, if there are any."""
    return [run for run in runs if not disturbed(run)] or runs


def noise(run: dict[str, Any]) -> tuple[bool, float]:
    """Smaller, quieter: whether a neighbour kept the memory busy, then the share of the machine that others used."""
    return run.get("memory", 1.0) < device.RESTED, run.get("others", 0.0)


def middle_run(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Of all runs of a case that count the one of median ratio (of median time, where that is the same), and `runs`, all of
    them: on a machine that is shared with others a median over hours says more than one over seconds. Of evenly many runs the
    ratio is the mean of the middle two, all else is of the lower of them."""
    plain = {name: value for name, value in before.items() if name not in ("runs", "by_position")}
    runs = [*before.get("runs", [plain]), {name: value for name, value in record.items() if name != "by_position"}]
    order = sorted(counted(runs), key=lambda run: (run.get("ratio", 0.0), run["seconds"]))
    middle = {**record, **order[(len(order) - 1) // 2], "runs": runs}
    if "ratios" in middle:
        middle["ratio"] = statistics.median(run["ratio"] for run in order)
    return middle


def turns(passes: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """How many times as long each of P passes [P, positions] took as the moments [P + 1, calls] of something else around it."""
    return passes.mean(1) / ((moments[:-1] + moments[1:]).mean(1) / 2)


def ratio(passes: torch.Tensor, moments: torch.Tensor) -> float:
    """The ratio that counts: of passes of one call the median of turns().

    A pass of many short steps would carry every pause of a shared machine into its mean. But others only ever slow down, and
    seldom the same step in all passes: each step counts at its fastest, of P passes and of P moments (without the last, and
    without the first). Of single calls the fastest agrees less from run to run than the median: it tells when a neighbour left
    the cache alone.
    """
    if passes.shape[1] == 1:
        return float(turns(passes, moments).median())
    best = torch.stack([moments[:-1].min(0).values, moments[1:].min(0).values])
    return float(passes.min(0).values.mean() / best.mean())


def settled(record: dict[str, Any]) -> bool:
    """Whether the runs next to the middle one agree with it. One run never tells, however well its passes agree: on a shared
    machine they are of one moment."""
    runs = record.get("runs", [record])
    order = sorted(run.get("ratio", 0.0) if "ratios" in record else run["seconds"] for run in counted(runs))
    middle = (len(order) - 1) // 2
    near = order[max(0, middle - 1) : middle + 2]
    return len(runs) >= RUNS or (len(order) > 1 and near[-1] <= SLOWER * near[0])


class Store:
    """The results file: {"machine": …, "limits": …, "cases": {test: record}}, complete after every case."""

    def __init__(self, config: pytest.Config) -> None:
        self.start, self.minutes = time.monotonic(), config.getoption("minutes")
        self.wait, self.again = config.getoption("wait"), config.getoption("again")
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

    @cached_property
    def reader(self) -> device.Reader:
        return device.Reader()

    @cached_property
    def memory(self) -> device.Memory:
        return device.Memory(self.reader, self.data.get("best_read", 0.0))

    def rest(self) -> float:
        """Waits for others, as long as --wait allows; how fast memory is then."""
        device.wait_for_quiet(BUSY, self.wait)
        return self.memory_share(self.wait)

    def memory_share(self, seconds: float = 0.0) -> float:
        """How fast memory is, of the best that it has been on this machine: as soon as it is rested, or after `seconds`. Only
        asked where --wait is."""
        if device.ON_GPU or not self.wait:
            return 1.0
        share = self.memory.wait(seconds)
        self.data["best_read"] = self.memory.best
        return share

    def has(self, test: str) -> bool:
        record = self.data["cases"].get(test, {})
        if self.again:
            return "seconds" in record and settled(record)
        return bool({"seconds", "held_bytes"} & record.keys()) and not disturbed(record)

    def limits(self) -> dict[str, Any]:
        for _ in range(3):
            if self.data["limits"] is not None and self.data["limits"].get("others", 0.0) <= BUSY:
                break
            self.rest()
            others = device.Others()
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
        time, and returns their seconds, before each pass and after the last, for the ratio; and where the caches hold next to
        nothing of what must be read, memory is read before every round, for the share."""
        a_pass = len(positions or [0])
        rounds = passes * a_pass
        rates: list[float] = []
        beside: list[list[float]] = []
        reader = self.reader if self.reader and work and work.bytes >= self.reader.nbytes else None
        count = itertools.count(-warmup)

        def prepare() -> None:
            at = next(count)
            if against and at >= 0 and at % a_pass == 0:
                beside.append(against())
            if setup:
                setup()
            if reader:
                rates.append(reader())

        before, others = 1.0 if self.small else self.store.rest(), device.Others()
        self.benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=warmup)
        if against:
            beside.append(against())
        if self.small:
            return
        if (share := min(before, self.store.memory_share())) < device.RESTED:
            self.facts["memory"] = round(share, 3)
        times = torch.tensor(self.benchmark.stats.stats.data, dtype=torch.float64).view(passes, -1) / calls
        means = times.mean(1).sort().values
        if not device.ON_GPU:
            self.facts["others"] = round(others.share(), 3)
        seconds, rate = float(means.median()), None
        if work and rates:
            reading = work.bytes / torch.tensor(rates[-rounds:], dtype=torch.float64).view(passes, -1).mean(1)
            share = float((reading / times.mean(1)).median())
            rate = work.bytes / (share * seconds)
        if beside:
            moments = torch.tensor(beside, dtype=torch.float64)
            each = turns(times, moments)
            self.facts |= {"ratio": ratio(times, moments), "ratios": [float(each.min()), float(each.max())]}
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
