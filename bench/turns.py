"""What is made of measurements on a machine that others share: of passes taken in turns with something else a ratio, and of
runs that lie hours apart the one that counts."""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from bench.report import RESTED, SLOWER, disturbed

HASTE = 1.05  # times its usual time: what plays beside a case was disturbed if it took longer
RUNS = 5  # of a case that does not settle


class Turns:
    """P passes of a case [P, positions], taken in turns with P + 1 moments [P + 1, calls] of something else, in seconds.

    Others only ever slow down, and what slows one side of a ratio may leave the other alone. So those passes count between two
    moments that took no longer than HASTE times `usual`; or all, if there are none such. What decides is never the case itself.
    """

    def __init__(self, passes: Tensor, moments: Tensor, usual: float) -> None:
        quiet = moments.mean(1) <= HASTE * usual
        count = quiet[:-1] & quiet[1:]
        self.counted = int(count.sum())  # how many
        self.kept = count if self.counted else count.new_ones(len(passes))
        self.passes, self.before, self.after = (x[self.kept] for x in (passes, moments[:-1], moments[1:]))

    def each(self) -> Tensor:
        """How many times as long each pass took as the moments around it."""
        return self.passes.mean(1) / ((self.before + self.after).mean(1) / 2)

    def extremes(self) -> list[float]:
        return [float(self.each().min()), float(self.each().max())]

    def beside(self) -> float:
        """Seconds of a call of what the passes were taken in turns with."""
        return float(((self.before + self.after).mean(1) / 2).quantile(0.25))

    def ratio(self) -> float:
        """The one that counts: of passes of one call the lower quartile, against that of the moments.

        A pass of many short steps would carry every pause of a shared machine into its mean. But seldom is the same step
        disturbed in all passes: each counts at its fastest, of the passes, of the moments before and of those after them.
        """
        if self.passes.shape[1] == 1:
            return float(self.passes.quantile(0.25)) / self.beside()
        beside = self.before.min(0).values.mean() + self.after.min(0).values.mean()
        return float(2 * self.passes.min(0).values.mean() / beside)


def counted(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that nobody disturbed, if there are any, and of these, those beside which the other side of the ratio took no
    longer than HASTE times its fastest: some neighbours stay for longer than a run."""
    runs = [run for run in runs if not disturbed(run)] or runs
    fastest = min(run.get("beside", 0.0) for run in runs)
    return [run for run in runs if run.get("beside", 0.0) <= HASTE * fastest]


def noise(run: dict[str, Any]) -> tuple[bool, float, float]:
    """Smaller, quieter: whether a neighbour kept memory busy, how often one kept the cores, and what processes took of them."""
    return run.get("memory", 1.0) < RESTED, run.get("in_vain", 0.0), run.get("others", 0.0)


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


def settled(record: dict[str, Any]) -> bool:
    """Whether the runs next to the middle one agree with it. One run never tells, however well its passes agree: on a shared
    machine they are of one moment."""
    runs = record.get("runs", [record])
    order = sorted(run.get("ratio", 0.0) if "ratios" in record else run["seconds"] for run in counted(runs))
    middle = (len(order) - 1) // 2
    near = order[max(0, middle - 1) : middle + 2]
    return len(runs) >= RUNS or (len(order) > 1 and near[-1] <= SLOWER * near[0])
