"""Results files -> Markdown tables and plots, and into the documents.

python -m bench.report [RESULTS.json …]           prints the tables (of all files in bench/results)
python -m bench.report RESULTS.json --out DIR     DIR/report.md, with the plots beside it as PNG and SVG
python -m bench.report --docs                     rewrites what is marked in README.md and docs/performance.md, and docs/plots
python -m bench.report NEW.json --against OLD.json    exit status 1 if something got slower or wrong
python -m bench.report ONE.json --repeated TWO.json   exit status 1 if a ratio of the two runs differs by more than 15 %

Plots need matplotlib: pip install -e ".[bench]". In a document, what stands between `<!-- bench: NAME -->` and
`<!-- /bench -->` is replaced by the tables whose title starts with NAME ("all": every table, "machine": device, date, commit
and limits), and what stands between `<!-- figure: … -->` and `<!-- /figure -->` by one number: `CASE` is its time (or its
memory), `CASE / CASE` a ratio of two, `CASE share` its share of the limit, `CASE peak_bytes` that entry of its record, with
a case as in `test_step[paper-1-ours_cpu-int8]`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "bench/results", ROOT / "docs/plots"
DOCUMENTS = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- bench: (.*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure: ([^>]*?) -->).*?(<!-- /figure -->)", re.DOTALL)
QUANTIZED = ("int8", "int4")
BUSY = 0.1  # share of the machine that other processes may use meanwhile, or of the moments that other machines may
RESTED = 0.7  # of the best pace that memory, or the cores, have had: less is another machine's doing
SLOWER = 1.15  # two runs on one quiet machine agree within this

Record = dict[str, Any]
Data = dict[str, Any]


def load(paths: Iterable[Path] = ()) -> list[Data]:
    """The given files, or all of bench/results, newest last; only those that the suite wrote."""
    found = [json.loads(path.read_text()) for path in (list(paths) or sorted(RESULTS.glob("*.json")))]
    return [data for data in found if "cases" in data and "machine" in data]


def ours(record: Record) -> bool:
    return str(record["contender"]).startswith("dalle_fast")


def disturbed(record: Record) -> bool:
    """By other processes, or by other machines on the same memory or the same cores. Marked, and measured again."""
    busy = max(record.get("others", 0.0), record.get("in_vain", 0.0)) > BUSY
    passes = record.get("passes", 0)
    few = 3 * record.get("counted", passes) < passes
    return bool(busy or few or record.get("memory", 1.0) < RESTED)


def value(record: Record) -> float | None:
    """Seconds, or bytes where memory is what counts; None for what could not run."""
    found: float | None = record.get("seconds", record.get("held_bytes"))
    return found


def baseline(records: list[Record]) -> Record | None:
    """Of one column: our best that does not quantize, if there is one, which all others are held against. Best in turns: by
    their times, which may lie hours apart, it would be another from run to run."""
    mine = [r for r in records if ours(r) and value(r)]
    mine = [r for r in mine if r["dtype"] not in QUANTIZED] or mine
    in_turns = all("ratio" in r for r in mine)
    return min(mine, key=lambda r: (r["ratio"] if in_turns else 0.0, value(r) or 0.0), default=None)


def ratio(one: Record, other: Record) -> float | None:
    """How many times as long (or as large) as the other: by what all of their column was measured in turns with, if both
    were, else by their times, which may lie hours apart. None if one has not run."""
    if not (value(one) and value(other)):
        return None
    together = (one["case"], one["column"]) == (other["case"], other["column"])
    if together and "ratio" in one and "ratio" in other:
        return float(one["ratio"] / other["ratio"])
    return float(value(one) or 0.0) / float(value(other) or 1.0)


def grouped(data: Data) -> dict[str, list[Record]]:
    """{title: records}, in the order measured."""
    tables: dict[str, list[Record]] = {}
    for record in data["cases"].values():
        tables.setdefault(record["case"], []).append(record)
    return tables


def named(data: Data) -> dict[str, Record]:
    """Records by "title, column: contender dtype"."""
    records = data["cases"].values()
    return {f"{r['case']}, {r['column']}: {r['contender']} {r['dtype']}": r for r in records}


def ratios(data: Data) -> dict[str, float]:
    """How many times as long as our fastest unquantized, by name."""
    found = {}
    for name, record in named(data).items():
        column = [r for r in data["cases"].values() if (r["case"], r["column"]) == (record["case"], record["column"])]
        base = baseline(column)
        if base and (times := ratio(record, base)):
            found[name] = times
    return found


def seconds(x: float) -> str:
    """Three digits and the unit that suits: 1.23 ms."""
    scale, unit = next((pair for pair in ((1.0, "s"), (1e-3, "ms")) if x >= pair[0]), (1e-6, "µs"))
    return f"{digits(x / scale)} {unit}"


def size(nbytes: float) -> str:
    return f"{digits(nbytes / 1e9)} GB" if nbytes >= 1e9 else f"{digits(nbytes / 1e6)} MB"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def cell(record: Record | None, base: Record | None) -> str:
    if record is None:
        return ""
    if (own := value(record)) is None:
        return "skipped" if "skipped" in record else "**failed**"
    parts = []
    if base and base is not record and (times := ratio(record, base)):
        parts.append(f"{digits(times)}×")
    if "share" in record:
        parts.append(f"{100 * record['share']:.0f} %")
    amount = seconds(own) if "seconds" in record else size(own)
    return amount + (f" ({', '.join(parts)})" if parts else "") + " †" * disturbed(record)


def table(title: str, records: list[Record]) -> str:
    columns = list(dict.fromkeys(r["column"] for r in records))
    if all(re.fullmatch(r"batch \d+", column) for column in columns):
        columns.sort(key=lambda column: int(column.split()[1]))
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["contender"], r["dtype"]), {})[r["column"]] = r
    base = {c: baseline([r for r in records if r["column"] == c]) for c in columns}
    lines = [f"**{title}**", "", f"| | type | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for (contender, dtype), found in rows.items():
        if all("skipped" in r for r in found.values()):
            continue  # its reason stands below
        name = f"**{contender}**" if contender.startswith("dalle_fast") else contender
        lines.append(f"| {name} | {dtype} | {' | '.join(cell(found.get(c), base[c]) for c in columns)} |")
    reasons = {f"{r['contender']}: {r[how]}" for r in records for how in ("skipped", "failed") if how in r}
    if any(disturbed(r) for r in records):
        reasons.add(
            f"†: others used more than {100 * BUSY:.0f} % of the machine meanwhile, or its memory or cores were not at rest"
        )
    lines += [""] * bool(reasons) + [f"- {reason}" for reason in sorted(reasons)]
    return "\n".join(lines) + "\n"


def machine(data: Data) -> str:
    """Where and when, and the limits that the shares refer to."""
    m, limits = data["machine"], data["limits"] or {"read": {}, "matmul": {}, "copy": 0.0}
    commits = sorted({r["commit"] for r in data["cases"].values()})
    read = ", ".join(f"{rate / 1e9:.1f} GB/s over {int(size) >> 20} MiB" for size, rate in limits["read"].items())
    matmul = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in limits["matmul"].items())
    return (
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}, commit {', '.join(commits)}.\n"
        f"Limits measured in the same run: reading {read}; copying {limits['copy'] / 1e9:.1f} GB/s; matrix products {matmul}.\n"
        + "Reading is measured again after each case on a CPU, whose share refers to that.\n"
        * any("read" in r for r in data["cases"].values())
    )


def joined(results: list[Data]) -> list[Data]:
    """One for each device: of a case that several files hold, what was measured last."""
    devices: dict[str, Data] = {}
    for data in results:
        before = devices.get(data["machine"]["device"], {"cases": {}})["cases"]
        newer = {name: r for name, r in data["cases"].items() if timed(r) or not timed(before.get(name, {}))}
        devices[data["machine"]["device"]] = {**data, "cases": {**before, **newer}}
    return list(devices.values())


def timed(record: Record) -> bool:
    return bool({"seconds", "held_bytes"} & record.keys())


def tables(results: list[Data], name: str = "all") -> str:
    """The Markdown of every table whose title starts with `name`; one for all files of a device."""
    parts = [machine(data) for data in results] if name in ("all", "machine") else []
    for data in joined(results):
        parts += [table(t, records) for t, records in grouped(data).items() if name == "all" or t.startswith(name)]
    return "\n".join(parts)


def filled(text: str, results: list[Data]) -> str:
    """A document with its blocks rewritten. Raises ValueError for a block that no table fits."""

    def block(match: re.Match[str]) -> str:
        content = tables(results, match[2])
        if not content:
            raise ValueError(f"got block {match[2]!r}, expected the start of one of {sorted(grouped(results[-1]))}")
        return f"{match[1]}{content}{match[3]}"

    return FIGURE.sub(lambda m: f"{m[1]}{figure(m[2], results)}{m[3]}", BLOCK.sub(block, text))


def figure(expression: str, results: list[Data]) -> str:
    """The number that an expression of a document stands for, from the newest results that have its cases. Raises
    ValueError if none has."""
    left, _, right = (part.strip() for part in expression.partition(" / "))
    name = left[: left.rfind("]") + 1] or left.partition(" ")[0]  # parameters may hold spaces
    entry = left[len(name) :].strip()
    for data in reversed(results):
        cases = {test.split("::")[-1]: record for test, record in data["cases"].items()}
        one, other = cases.get(name, {}), cases.get(right, {})
        if value(one) is None or (right and value(other) is None):
            continue
        if right:
            text = f"{digits(ratio(one, other) or 0.0)}×"
        elif entry == "share":
            text = f"{100 * one['share']:.0f} %"
        elif entry:
            text = size(one[entry])
        else:
            text = seconds(one["seconds"]) if "seconds" in one else size(one["held_bytes"])
        return text + " †" * any(disturbed(r) for r in (one, other))
    raise ValueError(f"got figure {expression!r}, but no results file has measured it")


def worse(new: Data, old: Data) -> list[str]:
    """What is wrong in `new`, or slower than in `old` by more than SLOWER. Both are taken relative to the limit measured in
    the same run where there is one, so that a busy or another machine does not count."""
    found = []
    for test, record in new["cases"].items():
        before = old["cases"].get(test, {})
        if "failed" in record:
            found.append(f"{test}: {record['failed']}")
        elif "seconds" in record and "seconds" in before and before["dtype"] == record["dtype"]:
            scale = before.get("limit_seconds", 1) / record.get("limit_seconds", 1)
            if (ratio := record["seconds"] / before["seconds"] * scale) > SLOWER:
                found.append(f"{test}: {ratio:.2f} times as long as before")
    return found


def disagree(one: Data, two: Data) -> list[str]:
    """Ratios to our own time that two runs measured more than SLOWER apart, and what we took beside them: where that differs,
    it was the machine."""
    first, second = ratios(one), ratios(two)
    found = []
    for name in first.keys() & second.keys():
        times = first[name], second[name]
        if max(times) > SLOWER * min(times):
            amounts = [value(named(data)[name]) or 0.0 for data in (one, two)]
            ours_took = " and ".join(seconds(amount / x) for amount, x in zip(amounts, times, strict=True))
            found.append(f"{name}: {times[0]:.2f} and {times[1]:.2f}, beside ours of {ours_took}")
    return sorted(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Tables and plots of benchmark results."
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: all in bench/results)")
    parser.add_argument("--docs", action="store_true", help=f"rewrite {' and '.join(DOCUMENTS)} where marked")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and the plots")
    parser.add_argument(
        "--against", type=Path, metavar="OLD", help="compare with an earlier run; exit status 1 if worse"
    )
    parser.add_argument("--repeated", type=Path, metavar="TWO", help="compare the ratios of two runs of one version")
    args = parser.parse_args(arguments)
    results = load(args.results)
    if not results:
        parser.error("no results; `pytest bench --all --results bench/results` makes some")
    for old, compare, nothing in (
        (args.against, worse, "nothing is slower or wrong"),
        (args.repeated, disagree, "all ratios agree"),
    ):
        if old:
            found = [line for data in results for line in compare(data, load([old])[0])]
            sys.stdout.write("".join(f"{line}\n" for line in found) or f"{nothing}\n")
            return int(bool(found))
    if args.docs:
        for path in (ROOT / name for name in DOCUMENTS):
            if path.exists():
                path.write_text(filled(path.read_text(), results))
    if args.docs or args.out:
        from bench.plots import draw

        most = max(joined(results), key=lambda data: len([r for r in data["cases"].values() if "by_position" in r]))
        written = draw(most, PLOTS if args.docs else args.out)
    if args.out:
        pictures = "\n".join(f"![{path.stem}]({path.name})" for path in written if path.suffix == ".png")
        (args.out / "report.md").write_text(f"# Benchmark results\n\n{tables(results)}\n{pictures}\n")
    if not (args.docs or args.out):
        sys.stdout.write(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
