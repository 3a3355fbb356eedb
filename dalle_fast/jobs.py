"""Long runs over many captions. Every finished wave is on disk, and the same call again goes on where the last was stopped.

A job's folder holds manifest.json, a folder a caption (0000, 0001, …), and in each the pictures. A wave is finished when its
wave-NNNNNN.json is there, which is written after its pictures; a caption is finished when its sample.json is there, which is
written after its sheet and takes the place of the waves' files. Every file is written whole or not at all, and the disk
holds the pictures before the file that says they are finished: a power failure loses no more than a kill.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

import dalle_fast
from dalle_fast import records
from dalle_fast.pipeline import Pipeline, order
from dalle_fast.records import Entry
from dalle_fast.sampling import SamplingSettings, default_wave
from dalle_fast.tokenizer import CaptionError
from dalle_fast.weights import read_text

MANIFEST = "manifest.json"
WAVE = "wave-{:06d}.json"
SAMPLED = 2**20  # bytes of a weight file, from either end, that tell it from others


class Job:
    """n candidates of each prompt, written into a folder.

    >>> with Job(pipeline, ["a red cube", "a penguin"], "out", n=512, by="clip", keep=32) as job:
    ...     for folder in job.run():
    ...         print(folder / "sheet.png")

    wave: candidates drawn at a time; None takes the manifest's, or sampling.default_wave. by, keep: as in Pipeline.rank.
    Raises ValueError for a folder whose manifest is of another run, naming the setting that differs, or in which another
    process is drawing; CaptionError, naming the prompt, before anything is drawn; OSError where it can't write.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        folder: str | Path,
        n: int = 8,
        settings: SamplingSettings | None = None,
        *,
        wave: int | None = None,
        first: int = 0,
        truncate: bool = False,
        by: str | None = None,
        keep: int | None = None,
    ) -> None:
        settings = settings or SamplingSettings()
        settings.check(pipeline.config.image_vocab)
        if n < 1 or not prompts or (wave is not None and wave < 1):
            raise ValueError(f"got n={n} of {len(prompts)} prompts in waves of {wave}, expected at least 1 of each")
        if by is not None:
            order([], [], by)
        if keep is not None and (by is None or not 1 <= keep <= n):
            raise ValueError(f"got keep={keep} ranked by {by}, expected 1 to {n} and a way to rank")
        for i, prompt in enumerate(prompts):
            try:
                pipeline.tokenizer.encode(prompt, truncate=truncate)
            except CaptionError as error:
                raise CaptionError(f"prompt {i + 1}: {error}") from None
        self.pipeline, self.prompts, self.folder = pipeline, list(prompts), Path(folder)
        self.n, self.first, self.settings, self.truncate = n, first, settings, truncate
        self.by, self.keep = by, keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.wave = self._agree(wave)
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise ValueError(f"another run is drawing into {self.folder}") from None
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes draw into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _agree(self, wave: int | None) -> int:
        """Compares this run with the manifest, or writes one; returns the wave."""
        path = self.folder / MANIFEST
        begun = read_manifest(path) if path.exists() else None
        if wave is None:
            wave = begun["settings"].get("wave") if begun else default_wave(self.pipeline.engine, self.n, self.settings)
        assert wave is not None
        mine = {
            "version": dalle_fast.__version__,
            "model": fingerprint(self.pipeline.folder),
            "engine": type(self.pipeline.engine).__name__,
            **self.pipeline.choices,
            "n": self.n,
            "first": self.first,
            **asdict(self.settings),
            "truncate": self.truncate,
            "rank": self.by,
            "keep": self.keep,
            "wave": wave,
        }
        if begun is None:
            records.write_json(path, {"settings": mine, "prompts": self.prompts})
            return wave
        theirs = begun["settings"]
        differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"got {name}={mine.get(name)!r}, but {path} was begun with {name}={theirs.get(name)!r}: choose another folder"
            )
        if begun["prompts"] != self.prompts:
            pairs = zip(begun["prompts"], self.prompts, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(begun["prompts"]), len(self.prompts)))
            raise ValueError(f"got prompts that differ from {path} at number {same + 1}: choose another folder")
        for left in (*self.folder.glob(".*.json.*"), *self.folder.glob("*/.*.*.*")):  # a killed run's, half-written
            left.unlink(missing_ok=True)
        return wave

    def run(
        self,
        *,
        on_token: Callable[[int, Tensor], None] | None = None,
        on_skip: Callable[[int], None] | None = None,
        command: str | None = None,
    ) -> Iterator[Path]:
        """Draws what is not there yet and yields each prompt's folder once it is finished.

        on_token as in Pipeline.sample; on_skip(k): k pictures are there already. Raises OSError, naming the file, where one
        can't be written: what was finished stays, and another run goes on from there.
        """
        ahead: dict[tuple[int, int], list[Entry]] = {}
        for i, prompt in enumerate(self.prompts):
            folder = self._folder(i)
            if not (folder / records.RECORD).exists():
                entries = []
                for start in range(0, self.n, self.wave):
                    if (i, start) not in ahead:
                        found = self._finished(i, start)
                        if found is None:
                            ahead |= self._draw(i, start, on_token)
                        else:
                            ahead[i, start] = found
                            if on_skip is not None:
                                on_skip(len(found))
                    entries += ahead.pop((i, start))
                header = {
                    "dalle_fast": dalle_fast.__version__,
                    "command": command,
                    "prompt": prompt,
                    "seed": self.settings.seed,
                    "settings": asdict(self.settings),
                    "model": str(self.pipeline.folder),
                    "wave": self.wave,
                    "ranked_by": self.by,
                    "kept": self.keep,
                }
                ranker = self.pipeline.ranker if self.by in ("clip", "both") else None
                records.finish(folder, entries, header, by=self.by, keep=self.keep, ranker=ranker)
            elif on_skip is not None:
                on_skip(self.n)
            for left in folder.glob("wave-*.json"):
                left.unlink()
            yield folder

    def _folder(self, i: int) -> Path:
        return self.folder / f"{i:04d}"

    def _finished(self, i: int, start: int) -> list[Entry] | None:
        """The entries of a wave of prompt i, None if it is yet to be drawn."""
        path = self._folder(i) / WAVE.format(start)
        if not path.exists():
            return None
        entries = [Entry(**values) for values in json.loads(read_text(path))["pictures"]]
        return entries if all((path.parent / entry.file).exists() for entry in entries) else None

    def _draw(
        self, i: int, start: int, on_token: Callable[[int, Tensor], None] | None
    ) -> dict[tuple[int, int], list[Entry]]:
        """Draws and writes a wave of prompt i. If it leaves room, the same wave of the next prompts that lack it is drawn
        side by side with it, where that changes no token. Returns the entries by (prompt, start)."""
        count = min(self.wave, self.n - start)
        room = self.wave // count if self.pipeline.engine.batch_invariant else 1
        lacking = (
            k
            for k in range(i, len(self.prompts))
            if not (self._folder(k) / records.RECORD).exists() and self._finished(k, start) is None
        )
        group = list(itertools.islice(lacking, room))
        pictures = self.pipeline.sample(
            [self.prompts[k] for k in group],
            count,
            self.settings,
            wave=self.wave,
            first=self.first + start,
            truncate=self.truncate,
            on_token=on_token,
        )
        drawn = {}
        for k in group:
            entries = [records.write_picture(self._folder(k), picture) for picture in itertools.islice(pictures, count)]
            records.write_json(self._folder(k) / WAVE.format(start), {"pictures": [vars(entry) for entry in entries]})
            drawn[k, start] = entries
        return drawn


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that no job wrote."""
    try:
        manifest = json.loads(read_text(path))
        if isinstance(manifest["settings"], dict) and isinstance(manifest["prompts"], list):
            return dict(manifest)
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"cannot read {path}: it is no manifest of a job")


def fingerprint(folder: Path) -> str:
    """Tells a model folder from others: SHA-256 over the small files and over size, beginning and end of the large ones."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED))
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()
