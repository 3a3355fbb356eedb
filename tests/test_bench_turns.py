"""bench.turns: which passes and which runs count on a machine that others share, and what ratio they make."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench.turns import Turns, counted, middle_run, settled


def test_neighbours_that_come_and_go_do_not_change_a_ratio() -> None:
    """Two in three steps take up to ten times as long; the later a cell, the longer its step."""
    g = torch.Generator().manual_seed(0)

    def slowed(quiet: torch.Tensor) -> torch.Tensor:
        draw = torch.rand(quiet.shape, generator=g, dtype=torch.float64)
        return quiet * torch.where(draw < 2 / 3, 1 + 9 * draw, 1.0)

    case = torch.linspace(3.0, 6.0, 100, dtype=torch.float64).expand(5, -1)
    other = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64).expand(6, -1)
    assert Turns(case, other, math.inf).ratio() == pytest.approx(3.0)
    assert Turns(slowed(case), slowed(other), math.inf).ratio() == pytest.approx(3.0, rel=0.1)
    # Both sides are looked at equally often: of one pass, no moment is picked.
    assert Turns(case[:1], other[:2] * torch.tensor([[1.0], [3.0]]), math.inf).ratio() == pytest.approx(1.5)


def test_passes_count_between_moments_at_their_pace() -> None:
    """A neighbour slows the case, and what plays beside it less: the passes beside it tell nothing, however fast they are."""
    times = torch.tensor([[6.0], [9.0], [3.0], [6.1]], dtype=torch.float64)
    moments = torch.tensor([[2.0], [2.0], [2.4], [2.0], [2.02]], dtype=torch.float64)
    turns = Turns(times, moments, usual=2.0)
    assert turns.counted == 2 and turns.passes[:, 0].tolist() == [6.0, 6.1]
    assert turns.ratio() == pytest.approx(3.0, rel=0.02) and turns.extremes()[1] < 3.1
    none = Turns(times, moments, usual=1.0)  # rather all than none
    assert none.counted == 0 and len(none.passes) == 4 and none.extremes()[1] == pytest.approx(4.5, rel=0.1)


def test_runs_beside_a_busy_memory_count_only_where_there_are_no_others() -> None:
    slow, fast, old = {"ratio": 6.0, "memory": 0.6}, {"ratio": 10.0, "memory": 0.95}, {"ratio": 9.0}
    assert counted([slow, fast, old]) == [fast, old] and counted([slow]) == [slow]


def test_runs_count_beside_which_the_other_side_was_fastest() -> None:
    """Whatever their own ratio: a neighbour that stays for a whole run is seen by the next."""
    runs = [{"ratio": 15.0, "beside": 4.0e-4}, {"ratio": 11.9, "beside": 3.0e-4}, {"ratio": 12.1, "beside": 3.1e-4}]
    assert counted(runs) == runs[1:] and counted(runs[:1]) == runs[:1]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([5.0], False),
        ([5.0, 5.5], True),
        ([5.0, 6.0], False),
        ([5.0, 6.0, 5.6], False),
        ([5.2, 9.0, 5.0, 5.4], True),
        ([1.0, 2.0, 4.0, 8.0], False),
        ([1.0, 2.0, 4.0, 8.0, 16.0], True),  # it never will
    ],
)
def test_what_is_settled(ratios: list[float], expected: bool) -> None:
    records: list[dict[str, Any]] = [{"seconds": 1e-3, "ratio": ratio, "ratios": [ratio, ratio]} for ratio in ratios]
    assert settled({**records[0], "runs": records} if len(records) > 1 else records[0]) == expected
    # As of what others are compared with, which has no ratio of its own.
    times: list[dict[str, Any]] = [{"seconds": ratio, "ratio": 1.0} for ratio in ratios]
    assert settled({**times[0], "runs": times} if len(times) > 1 else times[0]) == expected


def test_a_run_beside_busy_neighbours_counts_only_where_there_is_no_other() -> None:
    def run(x: float, others: float) -> dict[str, Any]:
        return {"seconds": 1e-3, "ratio": x, "ratios": [x, x], "others": others}

    joined = middle_run(run(9.0, 0.5), run(5.0, 0.0))
    assert joined["ratio"] == 5.0 and joined["runs"] == [run(9.0, 0.5), run(5.0, 0.0)] and not settled(joined)
    joined = middle_run(joined, run(5.1, 0.0))
    assert joined["ratio"] == pytest.approx(5.05) and settled(joined)
    assert middle_run(run(9.0, 0.5), run(8.0, 0.5))["ratio"] == 8.5
    assert middle_run(middle_run(run(9.0, 0.0), run(5.0, 0.0)), run(6.0, 0.0))["ratio"] == 6.0
