"""Every measured figure that a document quotes stands in a JSON of bench/results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import report
from dalle_fast.pipeline import DEMO
from examples.scenes import evaluate

ROOT = Path(__file__).resolve().parent.parent

MEASURED = re.compile(r"\d\s*(?:×|ms|µs|%|GB|MB|GFLOP/s|s)(?![\w/])")


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_figures_are_those_of_the_results(name: str) -> None:
    text = (ROOT / name).read_text()
    assert report.filled(text, report.load()) == text, f"{name} is out of date; run: python -m bench.report --docs"


def unmarked(text: str) -> list[str]:
    """Lines that name a quantity outside the blocks and figures that are filled in, but for goals and what is computed."""
    text = report.FIGURE.sub("", report.BLOCK.sub("", text))
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    lines = [line for part in sections if not re.match(r"## .*(computed|goal)", part) for line in part.splitlines()]
    return [line for line in lines if MEASURED.search(line)]


def test_no_figure_is_written_by_hand() -> None:
    assert unmarked((ROOT / "docs/performance.md").read_text()) == []


def test_no_table_of_the_readme_is_written_by_hand() -> None:
    assert [line for line in unmarked((ROOT / "README.md").read_text()) if line.startswith("|")] == []


def test_a_figure_written_by_hand_is_found() -> None:
    by_hand = "It takes 3.2 ms.\n\n## Limits, computed\nA step takes 8.2 ms.\n\n## Next\nfree of them, 16×16 cells, 8 s"
    assert unmarked(by_hand) == ["It takes 3.2 ms.", "free of them, 16×16 cells, 8 s"]
    assert unmarked("<!-- figure: x -->3 ms<!-- /figure -->\n<!-- bench: y -->\n4 ms\n<!-- /bench -->") == []


Pairs = list[tuple[report.Record, report.Record]]


def pairs_of(*files: Path) -> Pairs:
    """The cases of two runs that were measured in turns with something."""
    one, two = (json.loads(path.read_text())["cases"] for path in files)
    return [(one[name], two[name]) for name in one.keys() & two.keys() if "ratios" in one[name]]


def runs(kind: str, date: str = "2026-11-27") -> Pairs:
    """Those of two runs beside busy neighbours, undisturbed on the machine itself."""
    pairs = pairs_of(*sorted((ROOT / "bench/results/earlier").glob(f"{date}-{kind}-2-cores*.json")))
    return [pair for pair in pairs if all(record.get("others", 0.0) <= report.BUSY for record in pair)]


def apart(pairs: Pairs) -> int:
    return sum(max(a["ratio"], b["ratio"]) > report.SLOWER * min(a["ratio"], b["ratio"]) for a, b in pairs)


def once(pairs: Pairs) -> Pairs:
    """What they were after the first run of each."""
    return [(a.get("runs", [a])[0], b.get("runs", [b])[0]) for a, b in pairs]


def test_two_short_runs_beside_busy_neighbours_agree() -> None:
    """After two runs each, as the page says; after one, two ratios did not."""
    pairs = runs("intel-xeon-avx-512-vnni")
    assert len(pairs) == 11 and all(len(record["runs"]) == 2 for pair in pairs for record in pair)
    assert apart(once(pairs)) == 2
    assert apart(pairs) == 0


@pytest.mark.parametrize(("kind", "date"), [("amd-epyc-avx2", "2026-11-27"), ("amd-epyc-avx512-bf16", "2026-11-28")])
def test_two_short_runs_nearly_agree(kind: str, date: str) -> None:
    pairs = runs(kind, date)
    assert all("runs" in record for pair in pairs for record in pair)
    text = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert f"after one run each {apart(once(pairs))} of {len(pairs)} ratios disagreed, after two {apart(pairs)}" in text


def test_how_many_ratios_of_two_whole_runs_agree() -> None:
    name = "2026-11-30-intel-xeon-amx-2-cores.json"
    pairs = pairs_of(ROOT / "bench/results" / name, ROOT / "bench/results/repeated" / name)
    text = " ".join((ROOT / "docs/performance.md").read_text().split())
    for waited in (True, False):
        some = [(a, b) for a, b in pairs if ("counted" in a) == waited]
        first, now = (f"{len(some) - apart(of)} of {len(some)}" for of in (once(some), some))
        assert f"after one run each {first} ratios agreed, " in text and f" {now}. " in text
    assert apart(pairs) == 0


def test_scenes_in_the_readme_are_those_measured() -> None:
    measured = json.loads((ROOT / "bench/results/scenes-best-of-32.json").read_text())
    text = (ROOT / "README.md").read_text()
    for held_out, name in ((False, "combinations seen in training"), (True, "held-out combinations")):
        row = next(row for row in measured["rows"] if row["family"] == "all" and row["held_out"] == held_out)
        assert f"| {name} | {row['one']:.1%} | {row['best_of_n']:.1%} |".replace("%", " %") in text
    for name in ("best-of-32", "one-bfloat16", "one-int4"):
        assert json.loads((ROOT / f"bench/results/scenes-{name}.json").read_text())["weights"] == evaluate.hashes(
            DEMO
        ), name
    dvae = json.loads((ROOT / "bench/results/scenes-dvae.json").read_text())["weights"]
    assert dvae["dvae.safetensors"] == evaluate.hashes(DEMO)["dvae.safetensors"]
    assert measured["captions"] == 600 and "each of 600 fixed captions" in " ".join(text.split())
