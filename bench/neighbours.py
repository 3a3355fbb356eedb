"""Who else is on the machine: other processes, and other machines on the same processor, and waiting for them to rest.

A virtual machine's cores may be threads of cores whose other threads belong to somebody else. While those work, what fills a
core's units slows down more than what waits for memory (bench/results/2026-11-30-neighbours.json), and a ratio of the two tells
little. They come and go within seconds to minutes, and the system does not say so: only the pace of something known does.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.device import BEST, clock
from bench.report import BUSY, RESTED
from bench.turns import HASTE

WATCH = 30.0  # seconds until it is known how fast the machine can be
LOOK = 0.1  # seconds between two looks at the cores


class Others:
    """How busy other processes keep the CPU: measurements among busy neighbours are worth little."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of all work on all cores, of our own work."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return time.perf_counter(), 0.0, 0.0
        idle = int(fields[3]) + int(fields[4])
        busy = (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system

    def share(self) -> float:
        """Of all cores, since this was made; 0 where the system does not tell."""
        clock_now, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return min(1.0, max(0.0, (busy - own) / (clock_now * (os.cpu_count() or 1))))


def wait_for_quiet(most: float, seconds: float) -> None:
    """Until others keep the CPU busy for less than this share, but no longer than `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        others = Others()
        time.sleep(0.5)
        if others.share() < most:
            return


class Pace:
    """How fast the machine is at something, against the best that it has been."""

    def __init__(self, rate: Callable[[], float], best: float = 0.0, every: float = 1.0) -> None:
        """rate: of this moment, in whatever per second. best: as far as is known. every: seconds between two looks."""
        self.rate, self.best, self.every = rate, best, every
        self.known_from = -math.inf if best else math.inf  # the moment from which on `best` can be believed

    def wait(self, seconds: float) -> float:
        """Until it is RESTED, but no longer than `seconds`; the share of the best that it is at then. In the first WATCH
        seconds nobody knows what is best."""
        start = time.monotonic()
        self.known_from = min(self.known_from, start + WATCH)
        while True:
            rate = max(self.rate() for _ in range(3))
            self.best = max(self.best, rate)
            now = time.monotonic()
            if now - start >= seconds or (now >= self.known_from and rate >= RESTED * self.best):
                return rate / self.best
            time.sleep(self.every)


class Product:
    """A product of matrices that stay in the caches: how many a second at this moment, on all threads."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(2, 512, 512).to(getattr(torch, BEST))

    def __call__(self) -> float:
        start = clock()
        self.a @ self.b
        return 1 / (clock() - start)


class Neighbours:
    """What a measurement asks for rest: before it, and, often, between its parts. Nothing waits unless told to."""

    def __init__(self) -> None:
        self.seconds = self.left = 0.0
        self.looks = self.in_vain = 0
        self.last = -math.inf
        self.moments: dict[str, list[float]] = {}

    def wait_for(self, memory: Pace, cores: Pace, seconds: float) -> None:
        """From now on, at most so long in a measurement, and so long before it."""
        self.memory, self.cores, self.seconds = memory, cores, seconds

    def before(self) -> None:
        """A measurement begins: waits for other processes, for the memory, for the cores."""
        self.left, self.looks, self.in_vain, self.share = self.seconds, 0, 0, 1.0
        wait_for_quiet(BUSY, self.seconds)
        if self.seconds:
            self.share = self.memory.wait(self.seconds)
            self.rest()

    def rest(self) -> None:
        """Between two parts of it: until the cores are at their pace. Asked again within LOOK seconds, returns at once."""
        now = time.monotonic()
        if not self.seconds or now - self.last < LOOK:
            return
        share = self.cores.wait(self.left)
        self.last = time.monotonic()
        self.left = max(0.0, self.left - (self.last - now))
        self.looks += 1
        self.in_vain += share < RESTED

    def moment(self, play: Callable[[], list[float]], name: str) -> list[float]:
        """Plays what others are held against, which is known by name, and again while it is not at its usual pace: to what
        slows it in ways that the cores do not show nothing is as sensitive. Returns what it does: seconds of its calls."""
        while True:
            self.rest()
            start, times = time.monotonic(), play()
            mean = sum(times) / len(times)
            self.moments.setdefault(name, []).append(mean)
            if mean <= HASTE * self.usual(name) or not self.left:
                return times
            time.sleep(0.01)
            self.left = max(0.0, self.left - (time.monotonic() - start))

    def usual(self, name: str) -> float:
        """The mean seconds of a call of what is known by this name undisturbed: a tenth of its moments were faster."""
        order = sorted(self.moments[name])
        return order[len(order) // 10]

    def after(self) -> dict[str, float]:
        """What disturbed the measurement that ends, where something did: the pace of memory, and the share of looks at which
        the cores were not at rest."""
        found = {}
        if self.seconds and (share := min(self.share, self.memory.wait(0))) < RESTED:
            found["memory"] = round(share, 3)
        if self.in_vain:
            found["in_vain"] = round(self.in_vain / self.looks, 3)
        return found


neighbours = Neighbours()
