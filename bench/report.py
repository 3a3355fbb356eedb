"""Results files -> Markdown tables and plots, and into the documents.

python -m bench.report [RESULTS.json …]         prints the tables (of all files in bench/results)
python -m bench.report RESULTS.json --docs      rewrites README.md and docs/performance.md between their markers
python -m bench.report RESULTS.json --plots DIR plots as PNG and SVG (needs matplotlib: pip install -e ".[bench]")
python -m bench.report NEW.json --against OLD.json   exit status 1 if something got slower or wrong

In a document, what stands between `<!-- bench: NAME -->` and `<!-- /bench -->` is replaced by the tables whose title
starts with NAME ("all": every table, "machine": device, date, commit and limits).
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
RESULTS = ROOT / "bench/results"
DOCUMENTS = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- bench: (.*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
QUANTIZED = ("int8", "int4")
SLOWER = 1.15  # two runs on one quiet machine agree within this

Record = dict[str, Any]
Data = dict[str, Any]


def load(paths: Iterable[Path] = ()) -> list[Data]:
    """The given files, or all of bench/results, newest last; only those that the suite wrote."""
    found = [json.loads(path.read_text()) for path in (list(paths) or sorted(RESULTS.glob("*.json")))]
    return [data for data in found if "cases" in data and "machine" in data]


def ours(record: Record) -> bool:
    return str(record["contender"]).startswith("dalle_fast")


def value(record: Record) -> float | None:
    """Seconds, or bytes where memory is what counts; None for what could not run."""
    found: float | None = record.get("seconds", record.get("held_bytes"))
    return found


def baseline(records: list[Record]) -> float | None:
    """Of one column: our best that does not quantize, which all others are held against."""
    return min((x for r in records if ours(r) and r["dtype"] not in QUANTIZED and (x := value(r))), default=None)


def grouped(data: Data) -> dict[str, list[Record]]:
    """{title: records}, in the order measured."""
    tables: dict[str, list[Record]] = {}
    for record in data["cases"].values():
        tables.setdefault(record["case"], []).append(record)
    return tables


def ratios(data: Data) -> dict[str, float]:
    """How many times as long as our fastest unquantized, by "title, column: contender dtype"."""
    found = {}
    for title, records in grouped(data).items():
        for record in records:
            base = baseline([r for r in records if r["column"] == record["column"]])
            if base and (own := value(record)):
                found[f"{title}, {record['column']}: {record['contender']} {record['dtype']}"] = own / base
    return found


def seconds(x: float) -> str:
    """Three digits and the unit that suits: 1.23 ms."""
    scale, unit = next((pair for pair in ((1.0, "s"), (1e-3, "ms")) if x >= pair[0]), (1e-6, "µs"))
    return f"{digits(x / scale)} {unit}"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def cell(record: Record | None, base: float | None) -> str:
    if record is None:
        return ""
    if (own := value(record)) is None:
        return "skipped" if "skipped" in record else "**failed**"
    parts = []
    if base and own != base:
        parts.append(f"{digits(own / base)}×")
    if "share" in record:
        parts.append(f"{100 * record['share']:.0f} %")
    amount = seconds(own) if "seconds" in record else f"{digits(own / 1e6)} MB"
    return amount + (f" ({', '.join(parts)})" if parts else "")


def table(title: str, records: list[Record]) -> str:
    columns = list(dict.fromkeys(r["column"] for r in records))
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["contender"], r["dtype"]), {})[r["column"]] = r
    base = {c: baseline([r for r in records if r["column"] == c]) for c in columns}
    lines = [f"**{title}**", "", f"| | type | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for (contender, dtype), found in rows.items():
        name = f"**{contender}**" if contender.startswith("dalle_fast") else contender
        lines.append(f"| {name} | {dtype} | {' | '.join(cell(found.get(c), base[c]) for c in columns)} |")
    reasons = {f"{r['contender']}: {r[how]}" for r in records for how in ("skipped", "failed") if how in r}
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
    )


def tables(results: list[Data], name: str = "all") -> str:
    """The Markdown of every table whose title starts with `name`."""
    parts = []
    for data in results:
        if name in ("all", "machine"):
            parts.append(machine(data))
        parts += [table(t, records) for t, records in grouped(data).items() if name == "all" or t.startswith(name)]
    return "\n".join(parts)


def filled(text: str, results: list[Data]) -> str:
    """A document with its blocks rewritten. Raises ValueError for a block that no table fits."""

    def block(match: re.Match[str]) -> str:
        content = tables(results, match[2])
        if not content:
            raise ValueError(f"got block {match[2]!r}, expected the start of one of {sorted(grouped(results[-1]))}")
        return f"{match[1]}{content}{match[3]}"

    return BLOCK.sub(block, text)


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Tables and plots of benchmark results."
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: all in bench/results)")
    parser.add_argument("--docs", action="store_true", help=f"rewrite {' and '.join(DOCUMENTS)} between their markers")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots as PNG and SVG")
    parser.add_argument(
        "--against", type=Path, metavar="OLD", help="compare with an earlier run; exit status 1 if worse"
    )
    args = parser.parse_args(arguments)
    results = load(args.results)
    if not results:
        parser.error("no results; `pytest bench --all --results bench/results` makes some")
    if args.against:
        found = [line for data in results for line in worse(data, load([args.against])[0])]
        sys.stdout.write("".join(f"{line}\n" for line in found) or "nothing is slower or wrong\n")
        return int(bool(found))
    if args.docs:
        for path in (ROOT / name for name in DOCUMENTS):
            if path.exists():
                path.write_text(filled(path.read_text(), results))
    if args.plots:
        from bench.plots import draw

        draw(results[-1], args.plots)
    if not (args.docs or args.plots):
        sys.stdout.write(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
