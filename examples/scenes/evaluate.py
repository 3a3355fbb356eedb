"""How often the model draws exactly what a fixed set of captions says, by one candidate and by the best of n for CLIP.

`python -m examples.scenes.evaluate --help`. The 600 captions do not change: 200 a family, half of them with combinations
that no training program has seen, in an order of which every prefix is balanced, so `--captions 60` is a fair sample.
Each caption's result is a line of `--log` as soon as it is there; a run that was interrupted goes on after its last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle_fast.pipeline import DEMO, Pipeline
from dalle_fast.sampling import SamplingSettings
from dalle_fast.weights import write_text

from . import checker
from .grammar import FAMILIES, Scene, sample_caption, sample_scene

CAPTIONS = 600
TARGETS = {False: (0.90, 0.98), True: (0.75, 0.95)}  # what was aimed at: one candidate, best of 32; by held_out


@dataclass(frozen=True)
class Question:
    """One caption, its scene, and whether training held its combination out."""

    caption: str
    scene: Scene
    held_out: bool


def questions(count: int = CAPTIONS, seed: int = 2024) -> list[Question]:
    """The first `count` of the fixed captions, all different; families take turns, then seen and held out."""
    rng = np.random.default_rng(seed)
    found: dict[str, Question] = {}
    while len(found) < count:
        turn = len(found)
        scene = sample_scene(rng, FAMILIES[turn % 3], held_out=turn // 3 % 2 == 1)
        caption = sample_caption(scene, rng)
        found.setdefault(caption, Question(caption, scene, turn // 3 % 2 == 1))
    return list(found.values())


def answer(pipeline: Pipeline, question: Question, n: int, settings: SamplingSettings, wave: int) -> dict[str, Any]:
    """One line of the log: which of n candidates are exact, CLIP's scores, and what candidate 0 and CLIP's best have wrong."""
    pictures = list(pipeline.sample(question.caption, n, settings, wave=wave))
    checks = [checker.check(np.asarray(picture.image), question.scene) for picture in pictures]
    scores = [0.0] if n == 1 else pipeline.ranker.scores([p.image for p in pictures], question.caption).tolist()
    best = int(np.argmax(scores))
    return {
        "caption": question.caption,
        "family": question.scene.family,
        "held_out": question.held_out,
        "exact": [all(check.values()) for check in checks],
        "attributes": [round(sum(check.values()) / len(check), 4) for check in checks],
        "scores": [round(score, 3) for score in scores],
        "best": best,
        "wrong_first": [name for name, right in checks[0].items() if not right],
        "wrong_best": [name for name, right in checks[best].items() if not right],
    }


def summarize(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of captions by family and by held_out, then of all."""
    rows = []
    for family in (*FAMILIES, "all"):
        for held_out in (False, True):
            mine = [line for line in lines if line["held_out"] == held_out and family in (line["family"], "all")]
            if not mine:
                continue
            rows.append(
                {
                    "family": family,
                    "held_out": held_out,
                    "captions": len(mine),
                    "one": float(np.mean([line["exact"][0] for line in mine])),
                    "mean_of_n": float(np.mean([np.mean(line["exact"]) for line in mine])),
                    "best_of_n": float(np.mean([line["exact"][line["best"]] for line in mine])),
                    "any_of_n": float(np.mean([any(line["exact"]) for line in mine])),
                    "attributes_one": float(np.mean([line["attributes"][0] for line in mine])),
                    "attributes_best": float(np.mean([line["attributes"][line["best"]] for line in mine])),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], n: int) -> str:
    """Markdown."""
    head = f"| scenes | combinations | captions | candidate 0 exact | mean of {n} | best of {n} by CLIP | any of {n} |"
    lines = [f"{head} attributes right: 0 | best |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        shares = ("one", "mean_of_n", "best_of_n", "any_of_n", "attributes_one", "attributes_best")
        cells = " | ".join(f"{row[name]:.1%}" for name in shares)
        kind = "held out" if row["held_out"] else "seen in training"
        lines.append(f"| {row['family']} | {kind} | {row['captions']} | {cells} |")
    return "\n".join(lines)


def hashes(folder: Path) -> dict[str, str]:
    """Which weights a result is of."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in ("model.safetensors", "dvae.safetensors", "clip/model.safetensors")
        if (folder / name).exists()
    }


def setup(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that the results depend on; the first line of the log."""
    weights = hashes(folder)
    settings = SamplingSettings(args.temperature, args.top_k, args.top_p, args.guidance, args.seed)
    return {"settings": asdict(settings), "n": args.n, "dtype": args.dtype, "device": args.device, "weights": weights}


def read_log(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an earlier run; starts the file if there is none. Raises ValueError if that run was of other settings."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]  # a line cut short by a kill is drawn again
    first, *rest = (json.loads(line) for line in complete.splitlines())
    if first != header:
        raise ValueError(f"got a log {path} of other settings, expected another --log (or delete it)")
    if complete != text:
        path.write_text(complete)
    return rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="model folder (the bundled one)")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="how many of the 600 (%(default)s)")
    parser.add_argument("--n", type=int, default=32, help="candidates a caption (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, int8, int4 … (%(default)s)")
    parser.add_argument("--wave", type=int, default=32, help="candidates drawn at a time; no result depends on it")
    parser.add_argument("--log", type=Path, default=Path("out/evaluate.jsonl"), help="one line a caption (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the summary goes, e.g. bench/results/scenes.json")
    args = parser.parse_args()
    header = setup(args, args.model)
    lines = read_log(args.log, header)
    pipeline = Pipeline.load(args.model, device=args.device, dtype=args.dtype)
    settings = SamplingSettings(**header["settings"])
    asked = questions()[: args.captions]
    with args.log.open("a") as log, tqdm(total=len(asked), initial=len(lines), unit=" captions") as bar:
        for question in asked[len(lines) :]:
            lines.append(answer(pipeline, question, args.n, settings, args.wave))
            log.write(json.dumps(lines[-1]) + "\n")
            log.flush()
            exact = [line["exact"][0] for line in lines], [line["exact"][line["best"]] for line in lines]
            bar.set_postfix_str(f"exact: one {np.mean(exact[0]):.1%}, best {np.mean(exact[1]):.1%}")
            bar.update()
    rows = summarize(lines[: args.captions])
    print(table(rows, args.n))
    if args.json:
        whole = {
            "what": "scenes: share of captions whose picture has every attribute right",
            **header,
            "captions": len(asked),
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "date": date.today().isoformat(),
            "targets": {("held out" if held else "seen"): target for held, target in TARGETS.items()},
            "rows": rows,
            "wrong": [
                {
                    "caption": line["caption"],
                    "held_out": line["held_out"],
                    "any": any(line["exact"]),
                    "wrong_best": line["wrong_best"],
                }
                for line in lines[: args.captions]
                if not line["exact"][line["best"]]
            ],
        }
        write_text(args.json, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
