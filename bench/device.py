"""The machine at hand: its name, its clock, the memory in use, and the limits that physics sets it, measured.

A limit is a rate that no program beats: reading memory once, copying it, multiplying matrices. Reading depends on how much
is read again and again, because caches are faster than memory: a 512-wide model in int8 fits the last cache of a server
CPU. So the read rate is measured at several sizes, and a case is held against the rate of its own size.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast import onednn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# The type that torch is fastest in. Where oneDNN has no products in bfloat16, torch makes them one element at a time, 100 times
# as slowly as in float32: whatever computes by torch is measured in float32 there.
BEST = "bfloat16" if ON_GPU or onednn.why_not(torch.empty(0, dtype=torch.bfloat16)) is None else "float32"
VECTORS = {  # the widest first
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt
READ_MB = (16, 32, 64, 128, 512) if not ON_GPU else (64, 256, 1024, 4096)


def name() -> str:
    """Of a GPU, or of a CPU with its widest vectors: hosts hide what model they are, and generations differ twofold."""
    from dalle_fast.env import cpu

    if ON_GPU:
        return torch.cuda.get_device_name()
    model, flags = cpu()
    widest = next((f" ({name})" for flag, name in VECTORS.items() if flag in flags), "")
    return f"{model}{widest}, {os.cpu_count()} cores"


def describe() -> dict[str, Any]:
    """What a results file says about where it was measured."""
    from dalle_fast.env import cpu

    return {
        "device": name(),
        "cpu_flags": cpu()[1],
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class Clock:
    """A pytest-benchmark timer in seconds. On a GPU it reads events, so that launching ahead costs nothing, and adds up
    short intervals, because an event's float32 milliseconds would be coarse after minutes."""

    def __init__(self) -> None:
        self.last: Any = None
        self.now = 0.0

    def __call__(self) -> float:
        if not ON_GPU:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.now += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.now


clock = Clock()


class Batch:
    """Calls `run` on each set of inputs in turn, on a GPU as one replayed CUDA graph: one round of a benchmark. Enough
    sets that together exceed the caches make every call read memory."""

    def __init__(self, run: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> None:
        self.run, self.inputs, self.calls = run, inputs, len(inputs)
        self.graph: Any = None
        if ON_GPU:
            for each in inputs[:3]:
                run(*each)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._all()

    def _all(self) -> None:
        for each in self.inputs:
            self.run(*each)

    def __call__(self) -> None:
        self.graph.replay() if self.graph else self._all()

    def seconds(self) -> list[float]:
        """Calls it for at least 5 ms; seconds a call of `run`, the only entry."""
        start, times = clock(), 0
        while times == 0 or clock() - start < 5e-3:
            self()
            times += self.calls
        return [(clock() - start) / times]


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Has malloc keep what is freed meanwhile, where it is glibc's, as torch's allocator does on a GPU. Else large results come
    in new pages each time, and what those cost changes by the minute. No longer: what is held would be no measure of use."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # the defaults
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def reset_peak() -> int:
    """Forgets the highest memory use so far; returns the bytes held now."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # else what a case finds free, and fills, would not count
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def peak() -> int:
    """The highest memory use since reset_peak, in bytes; 0 where the system does not tell."""
    return torch.cuda.max_memory_allocated() if ON_GPU else _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


# Limits.


def _best(run: Callable[[], Any], seconds: float) -> float:
    """The best of the medians of five groups of calls, in seconds a call: what is possible, neighbours aside."""
    run()
    start = clock()
    run()
    calls = max(1, int(seconds / 5 / max(clock() - start, 1e-6)))
    groups = []
    for _ in range(5):
        times = []
        for _ in range(calls):
            start = clock()
            run()
            times.append(clock() - start)
        groups.append(statistics.median(times))
    return min(groups)


def read_rates(sizes: Iterable[int], seconds: float) -> dict[str, float]:
    """{bytes: bytes/s} of reading once these many MiB, each measured for about `seconds`."""
    read = {}
    for size in sizes:
        # On a GPU beyond its caches, and many in one launch: a lone call is mostly launching.
        count = max(1, 2**10 // size) if ON_GPU else 1
        data = torch.randn(count, size * 2**18, device=DEVICE)
        row = torch.randn(2**14, device=DEVICE)
        split = [(x.view(2 * torch.get_num_threads(), -1),) for x in data]
        # Whatever reads fastest is the limit: a sum, or a product with a vector that stays in the cache.
        ways = [Batch(torch.sum, split), Batch(lambda x, row=row: x.view(-1, 2**14) @ row, split)]
        read[str(size * 2**20)] = data.nbytes / min(_best(way, seconds) for way in ways)
    return read


def read_rates_now(nbytes: float, seconds: float = 0.2) -> dict[str, float]:
    """read_rates of the sizes that `floor` looks at for so many bytes. Where others share the memory, what it can do changes by
    the minute: a case is compared with what was measured right after it."""
    above = next((i for i, size in enumerate(READ_MB) if nbytes <= size * 2**20), len(READ_MB) - 1)
    return read_rates(READ_MB[max(0, above - 1) : above + 1], seconds)


def last_cache() -> int:
    """Bytes of the largest cache of a CPU; 0 where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=0)


class Reader:
    """Reads memory far beyond any cache, on a CPU: the rate that it has at this moment, in bytes/s, the better of two."""

    nbytes = max(256 << 20, 2 * last_cache())

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # as the packed weights of the cpu backend have them
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(self.memory, dtype=torch.float32).fill_(1.0)
        rows = self.data.view(-1, 2**10)
        row = torch.ones(rows.shape[1])
        self.ways = (self.data.max, lambda: rows @ row)  # torch's fastest on AMD's and on Intel's

    def __call__(self) -> float:
        best = math.inf
        for read in self.ways:
            start = clock()
            read()
            best = min(best, clock() - start)
        return self.data.nbytes / best


def measure_limits(seconds: float = 0.4) -> dict[str, Any]:
    """{"read": {bytes: bytes/s}, "copy": bytes/s, "matmul": {dtype: FLOP/s}}, each measured for about `seconds`."""
    read = read_rates(READ_MB, seconds)
    source = torch.randn(READ_MB[-1] * 2**18, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds)
    matmul: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        rate, product = 0.0, torch._int_mm if dtype == torch.int8 else torch.matmul
        for side in (8192,) if ON_GPU else (256, 1024, 4096):  # a middle one fits a cache, a large one feeds AMX better
            if rate and 2 * side**3 / rate > 4 * seconds:
                break  # without instructions for the type a large product takes minutes
            a, b = (torch.randn(side, side, device=DEVICE).mul_(40).to(dtype) for _ in "ab")
            rate = max(rate, 2 * side**3 / _best(partial(product, a, b), seconds))
        matmul[str(dtype).removeprefix("torch.")] = max(rate, *matmul.values(), 0.0)  # a wider type computes it too
    return {"read": read, "copy": copy, "matmul": matmul}


def floor(limits: dict[str, Any], nbytes: float, flops: float, dtype: str) -> float:
    """The seconds that reading `nbytes` or computing `flops` takes at the least, whichever is longer."""
    sizes = sorted((int(size), rate) for size, rate in limits["read"].items())
    rate = sizes[-1][1]
    for (low, fast), (high, slow) in itertools.pairwise(sizes):
        if nbytes <= low:
            rate = fast
            break
        if nbytes < high:
            share = math.log(nbytes / low) / math.log(high / low)
            rate = fast * (slow / fast) ** share
            break
    kind = dtype if dtype in limits["matmul"] else "bfloat16"  # int4 and float16 are computed in 16 bits
    return max(nbytes / rate, flops / limits["matmul"][kind])


def poke(x: Tensor) -> Tensor:
    """The tensor, with NaN in every element: an output that nobody writes is noticed."""
    return x.fill_(math.nan)
