"""Plots of one results file, each as PNG and SVG: roofline, step time against batch, memory against candidates, and step
time against position. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import work
from bench.report import Data, Record, grouped, ours

STEP = "A step of "
COLOURS = ("#0b6e4f", "#1b9e77", "#5ab4ac", "#7570b3", "#d95f02", "#e7298a", "#666666", "#a6761d", "#386cb0", "#b30000")


def draw(data: Data, folder: Path) -> list[Path]:
    """Writes what the data has points for; returns the files. Raises ImportError, with advice, without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install -e ".[bench]"') from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dalle_fast", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    plots: dict[str, Callable[[Any, Data], bool]] = {
        "roofline": roofline, "step_by_batch": by_batch, "memory": memory, "step_by_position": by_position
    }  # fmt: skip
    for name, plot in plots.items():
        figure = pyplot.figure(figsize=(8, 4.5), layout="constrained")
        if plot(figure, data):
            m = data["machine"]
            figure.suptitle(f"{m['device']}, {m['threads']} threads, {m['date']}", fontsize=8, color="#555555")
            for suffix in ("png", "svg"):
                written.append(folder / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        pyplot.close(figure)
    return written


def label(record: Record) -> str:
    return f"{record['contender']} {record['dtype']}"


def colour(index: int, record: Record) -> dict[str, Any]:
    """Ours in solid lines, peers dashed."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if ours(record) else "--", "linewidth": 1.6}


def roofline(figure: Any, data: Data) -> bool:
    """Operations a second against operations a byte, under the limits measured in the same run."""
    records = [r for r in data["cases"].values() if "flops" in r and "seconds" in r]
    if not records or not data["limits"]:
        return False
    axes = figure.add_subplot()
    sizes = sorted((int(size), rate) for size, rate in data["limits"]["read"].items())
    peaks = data["limits"]["matmul"]
    low, high = (f(r["flops"] / r["bytes"] for r in records) for f in (min, max))
    xs = [low / 2 * (high * 4 / low) ** (i / 60) for i in range(61)]
    for (size, rate), style in ((sizes[-1], "-"), (sizes[0], ":")):
        for peak in peaks.values():
            axes.plot(xs, [min(peak, x * rate) / 1e9 for x in xs], style, color="#999999", linewidth=1)
        note = f"reading {size >> 20} MiB at {rate / 1e9:.0f} GB/s"
        axes.annotate(note, (xs[4], xs[4] * rate / 1e9), fontsize=6, rotation=28, va="bottom")
    for dtype, peak in peaks.items():
        note = f"products in {dtype}: {peak / 1e9:.0f} GFLOP/s"
        axes.annotate(note, (xs[-1], peak / 1e9), fontsize=6, ha="right", va="bottom")
    for kind, marker in ((True, "o"), (False, "x")):
        chosen = [r for r in records if ours(r) == kind]
        axes.plot(
            [r["flops"] / r["bytes"] for r in chosen], [r["flops"] / r["seconds"] / 1e9 for r in chosen], marker,
            color=COLOURS[0] if kind else COLOURS[4], markersize=4, alpha=0.7, label="dalle_fast" if kind else "peers",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must be read", ylabel="GFLOP/s")
    axes.legend(loc="lower right")
    return True


def steps(data: Data) -> dict[str, list[Record]]:
    """The tables of whole steps that were timed at several batches or positions."""
    return {t: [r for r in rs if "seconds" in r] for t, rs in grouped(data).items() if t.startswith(STEP)}


def by_batch(figure: Any, data: Data) -> bool:
    tables = {t: rs for t, rs in steps(data).items() if len({r["batch"] for r in rs}) > 1}
    return _panels(figure, tables, _batch_panel)


def _batch_panel(axes: Any, records: list[Record]) -> None:
    for i, name in enumerate(dict.fromkeys(map(label, records))):
        points = sorted((r["batch"], r["seconds"] * 1e3) for r in records if label(r) == name)
        record = next(r for r in records if label(r) == name)
        axes.plot(*zip(*points, strict=True), "o", markersize=3, label=name, **colour(i, record))
    axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="ms a step")
    ticks = sorted({r["batch"] for r in records})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()


def by_position(figure: Any, data: Data) -> bool:
    tables = {t: [r for r in rs if "by_position" in r and r["batch"] == 1] for t, rs in steps(data).items()}
    return _panels(figure, {t: rs for t, rs in tables.items() if rs}, _position_panel)


def _position_panel(axes: Any, records: list[Record]) -> None:
    for i, record in enumerate(records):
        cells, seconds = zip(*record["by_position"], strict=True)
        axes.plot(cells, [1e3 * s for s in seconds], label=label(record), **colour(i, record))
    axes.set(yscale="log", xlabel="image token", ylabel="ms a step, batch 1")


def _panels(figure: Any, tables: dict[str, list[Record]], panel: Callable[[Any, list[Record]], None]) -> bool:
    """One panel a table, side by side, with one scale."""
    if not tables:
        return False
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, 4.6 * len(tables)), height + 1)
    all_axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (title, records) in zip(all_axes, tables.items(), strict=True):
        panel(axes, records)
        axes.set_title(title.removeprefix(STEP).split(":")[0], fontsize=9)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    for axes in all_axes[1:]:
        axes.set_ylabel("")
    return True


def memory(figure: Any, data: Data) -> bool:
    """Bytes of the caches of a preset against the number of candidates, from what a candidate was counted to take."""
    from dalle_fast.config import ModelConfig

    held = [r for r in data["cases"].values() if "held_bytes" in r and "preset" in r]
    if not held:
        return False
    axes = figure.add_subplot()
    counts = [2**i for i in range(10)]
    for i, record in enumerate(held):
        config = ModelConfig.preset(record["preset"])
        cell = 2 * config.heads * config.head_dim * 2
        prefix = config.layers * config.layout.text_len * cell if ours(record) else 0
        gigabytes = [(prefix + n * record["held_bytes"]) / 1e9 for n in counts]
        axes.plot(counts, gigabytes, label=f"{record['column']}, {record['contender']}", **colour(i // 2, record))
        weights = work.weights(config) * 2 / 1e9
        if not ours(record) and weights > 1:
            axes.axhline(80 - weights, color=COLOURS[i // 2], linewidth=0.7, linestyle=":")
            axes.annotate(f"80 GB less the weights of {record['column']}", (1, 80 - weights), fontsize=6, va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="candidates of one caption", ylabel="GB of cache")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.legend(fontsize=7)
    return True
