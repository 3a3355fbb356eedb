"""Long runs: killed at any moment, resumed, and the same tokens as if nothing had happened; other settings are refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import write_tiny_clip, write_tiny_model

from dalle_fast import records, weights
from dalle_fast.cli import main
from dalle_fast.jobs import Job, fingerprint
from dalle_fast.pipeline import Pipeline
from dalle_fast.sampling import SamplingSettings
from dalle_fast.tokenizer import CaptionError

PROMPTS = ["a red cube", "a blue circle on a red cube"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, device="cpu")


def tokens(folder: Path) -> list[list[tuple[int, list[int]]]]:
    """For each caption (candidate, tokens) in turn."""
    found = [json.loads((folder / f"{i:04d}/sample.json").read_text())["pictures"] for i in range(len(PROMPTS))]
    return [sorted((p["candidate"], p["tokens"]) for p in pictures) for pictures in found]


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def finished(count: int) -> list[str]:
    files = [f"{i:04d}.png" for i in range(count)] + ["sample.json", "sheet.png"]
    return sorted(["manifest.json", *(f"{i:04d}/{name}" for i in range(len(PROMPTS)) for name in files)])


def test_a_job_draws_what_sample_draws(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = SamplingSettings(temperature=0.8, seed=3)
    with Job(pipeline, PROMPTS, tmp_path, 5, settings, wave=2, first=1) as job:
        folders = list(job.run())
    assert folders == [tmp_path / "0000", tmp_path / "0001"]
    expected = [
        [(p.candidate, p.tokens.tolist()) for p in pipeline.sample(prompt, 5, settings, first=1)] for prompt in PROMPTS
    ]
    assert tokens(tmp_path) == expected
    assert sorted(p.name for p in folders[0].iterdir()) == [
        *(f"000{i}.png" for i in range(1, 6)),
        "sample.json",
        "sheet.png",
    ]
    record = json.loads((folders[1] / "sample.json").read_text())
    assert (record["prompt"], record["seed"], record["settings"]["temperature"]) == (PROMPTS[1], 3, 0.8)


def test_killed_and_resumed(model: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, at moments that nobody chose, until a run reaches the end by itself."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    options = ["sample", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(model), "-n", "40", "--wave", "2"]
    options += ["--device", "cpu"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    out, kills = tmp_path / "killed", 0
    command = [sys.executable, "-m", "dalle_fast.cli", *options, "--out", str(out)]
    while kills < 2:
        before = set(names(out)) if out.exists() else set()
        run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while run.poll() is None and time.monotonic() < deadline:
            if out.exists() and len(set(names(out)) - before) >= 12 + kills:
                run.kill()
                break
            time.sleep(0.002)
        if run.wait(timeout=60) == 0:
            break
        kills += 1
    assert kills == 2, "the run was over before it was killed"
    done = {p: p.stat().st_mtime_ns for p in out.glob("*/wave-*.json")}
    started = time.time_ns()
    assert main([*options, "--out", str(out)]) == 0
    assert done and all(stamp < started for stamp in done.values())
    assert tokens(out) == tokens(tmp_path / "whole")
    assert names(out) == finished(40) == names(tmp_path / "whole")
    for name in ("0000/0007.png", "0001/sheet.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_wave_is_not_drawn_again(pipeline: Pipeline, tmp_path: Path) -> None:
    def interrupt(j: int, drawn: object) -> None:
        if len(list(tmp_path.rglob("wave-*.json"))) == 2 and j == 5:
            raise KeyboardInterrupt

    with Job(pipeline, PROMPTS, tmp_path, 6, wave=2) as job, pytest.raises(KeyboardInterrupt):
        list(job.run(on_token=interrupt))
    assert names(tmp_path / "0000") == [*(f"000{i}.png" for i in range(4)), "wave-000000.json", "wave-000002.json"]
    stamp = (tmp_path / "0000/0003.png").stat().st_mtime_ns
    (tmp_path / "0000/0001.png").unlink()  # someone's mistake: its wave is drawn again
    skipped: list[int] = []
    with Job(pipeline, PROMPTS, tmp_path, 6) as job:  # the wave is the manifest's
        assert job.wave == 2 and len(list(job.run(on_skip=skipped.append))) == 2
    assert skipped == [2] and (tmp_path / "0000/0003.png").stat().st_mtime_ns == stamp
    assert names(tmp_path) == finished(6)
    with Job(pipeline, PROMPTS, tmp_path, 6) as job:
        assert len(list(job.run(on_token=interrupt, on_skip=skipped.append))) == 2
    assert skipped == [2, 6, 6]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_several_prompts_share_a_wave(pipeline: Pipeline, tmp_path: Path, guidance_scale: float) -> None:
    """They draw what each draws alone, to the bit; and a run that was stopped between goes on with those that lack a wave."""
    if not pipeline.engine.batch_invariant:
        pytest.skip("the engine's rounding depends on the batch")
    prompts = [*PROMPTS, "a blue cube", "a red circle", "a circle"]
    settings = SamplingSettings(seed=5, guidance_scale=guidance_scale)
    rows: list[int] = []

    def watch(j: int, drawn: torch.Tensor) -> None:
        if j == 0:
            rows.append(len(drawn))
        if len(rows) == 2 and j == 5:
            raise KeyboardInterrupt

    with Job(pipeline, prompts, tmp_path, 3, settings, wave=8) as job, pytest.raises(KeyboardInterrupt):
        list(job.run(on_token=watch))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("000[01]/0*.png")}
    (tmp_path / "0003").mkdir()  # and a wave of a later prompt is there, of a run that drew in another order
    for picture in pipeline.sample(prompts[3], 3, settings):
        records.write_picture(tmp_path / "0003", picture)
    entry = {"pictures": json.loads((tmp_path / "0000/sample.json").read_text())["pictures"]}
    records.write_json(tmp_path / "0003/wave-000000.json", entry)  # told by its entries: they are the first prompt's
    skipped: list[int] = []
    rows.append(0)
    with Job(pipeline, prompts, tmp_path, 3, settings, wave=8) as job:
        list(job.run(on_token=watch, on_skip=skipped.append))
    assert rows == [6, 6, 0, 6] and skipped == [3, 3, 3] and len(stamps) == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    for i, prompt in enumerate(prompts):
        drawn = json.loads((tmp_path / f"{i:04d}/sample.json").read_text())["pictures"]
        alone = list(pipeline.sample(prompts[0] if i == 3 else prompt, 3, settings, wave=1))
        assert [(p["candidate"], p["tokens"]) for p in drawn] == [(p.candidate, p.tokens.tolist()) for p in alone]
        if i != 3:
            assert [p["log_likelihood"] for p in drawn] == [p.log_likelihood for p in alone]


def test_prompts_do_not_share_a_wave_where_that_would_change_tokens(model: Path, tmp_path: Path) -> None:
    plain, rows = Pipeline.load(model, device="cpu", backend="torch"), set()
    with Job(plain, PROMPTS, tmp_path, 2, wave=4) as job:
        list(job.run(on_token=lambda j, drawn: rows.add(len(drawn))))
    assert rows == {2}
    assert tokens(tmp_path) == [
        [(p.candidate, p.tokens.tolist()) for p in plain.sample(prompt, 2, wave=4)] for prompt in PROMPTS
    ]


def test_the_disk_holds_what_a_finished_wave_speaks_of(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that keeps only what was synced: content by file, names by folder. Whenever a JSON file gets its name, it and
    what it speaks of would survive a power failure; and when files of waves are removed, so would the record."""
    contents: set[int] = set()  # inodes of files whose content is safe
    names_held: set[Path] = set()
    claims = 0
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def held(path: Path) -> bool:
        return path in names_held and path.stat().st_ino in contents

    def synced(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            names_held.update(path.iterdir())
        else:
            contents.add(path.stat().st_ino)

    def moved(old: Path, new: Path) -> None:
        nonlocal claims
        assert Path(old).stat().st_ino in contents
        if new.suffix == ".json":
            pictures = list(new.parent.glob("*.png"))
            assert all(held(path) for path in pictures) and (pictures or new.name == "manifest.json")
            claims += 1
        replace(old, new)
        names_held.discard(new)

    def removed(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("wave-"):
            assert held(path.parent / "sample.json") and path.parent in names_held
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(Path, "unlink", removed)
    with Job(pipeline, PROMPTS, tmp_path, 4, wave=2) as job:
        list(job.run())
    assert claims == 1 + len(PROMPTS) * 3
    assert all(held(path) for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fails_at", [1, 4, 9, 13])
def test_a_full_disk_loses_nothing(
    fails_at: int, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system fills up within the write of some file: half of it is there, then ENOSPC."""
    calls = 0
    original = weights.write_atomically

    def write(path: Path, do: object) -> None:
        nonlocal calls
        calls += 1

        def half(temporary: Path) -> None:
            do(temporary)  # type: ignore[operator]
            temporary.write_bytes(temporary.read_bytes()[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        original(path, half if calls > fails_at else do)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "write_atomically", write)
    with Job(pipeline, PROMPTS, tmp_path, 4, wave=2) as job, pytest.raises(OSError, match="No space left") as caught:
        list(job.run())
    assert str(caught.value.filename).startswith(str(tmp_path)) and "/." not in str(caught.value.filename)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    waves = 2 if fails_at >= 9 else 0  # of the first caption, whose record has taken their place
    assert len(kept) == fails_at - waves, "a half-written file, or a finished one that is gone"
    monkeypatch.undo()
    with Job(pipeline, PROMPTS, tmp_path, 4, wave=2) as job:
        list(job.run())
    with Job(pipeline, PROMPTS, tmp_path / "whole", 4, wave=2) as job:
        list(job.run())
    assert tokens(tmp_path) == tokens(tmp_path / "whole")
    assert all(path.read_bytes() == content for path, content in kept.items() if path.exists())


def test_a_file_too_large_is_one_line(model: Path, tmp_path: Path) -> None:
    """The kernel itself refuses: RLIMIT_FSIZE lets small files through and stops the larger ones half way."""
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    command = [sys.executable, "-m", "dalle_fast.cli", "sample", "--prompts", str(tmp_path / "prompts.txt"), "-n", "3"]
    command += ["--model", str(model), "--out", str(tmp_path / "out"), "--wave", "1", "--device", "cpu"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))  # the manifest fits, a picture does not

    run = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(
        f"dalle-fast sample: error: cannot write {tmp_path}/out/0000/0000.png: "
    )
    assert names(tmp_path / "out") == ["manifest.json"]


OTHER: dict[str, tuple[list[str], str]] = {
    "seed": (["--seed", "4"], "got seed=4, but "),
    "n": (["-n", "5"], "got n=5, but "),
    "temperature": (["--temperature", "0.5"], "got temperature=0.5, but "),
    "rank": (["--rank", "likelihood"], "got rank='likelihood', but "),
    "wave": (["--wave", "3"], "got wave=3, but "),
    "dtype": (["--dtype", "float32"], "got dtype='float32', but "),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_runs_manifest_is_refused(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = OTHER[case]
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    command = ["sample", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(model), "-n", "2"]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([*command, *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "was begun with" in lines[0]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_other_prompts_models_and_manifests_are_refused(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    Job(pipeline, PROMPTS, tmp_path).close()
    with pytest.raises(ValueError, match=r"prompts that differ from .* at number 2"):
        Job(pipeline, [PROMPTS[0], "a cube"], tmp_path)
    with pytest.raises(ValueError, match="at number 3"):
        Job(pipeline, [*PROMPTS, "a cube"], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["model"] == fingerprint(model) and manifest["prompts"] == PROMPTS
    manifest["settings"]["model"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="got model="):
        Job(pipeline, PROMPTS, tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="no manifest of a job"):
        Job(pipeline, PROMPTS, tmp_path)


def test_two_at_once_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with Job(pipeline, PROMPTS, tmp_path), pytest.raises(ValueError, match="another run is drawing into"):
        Job(pipeline, PROMPTS, tmp_path)
    Job(pipeline, PROMPTS, tmp_path).close()


def test_bad_prompts_are_named_before_anything_is_drawn(
    pipeline: Pipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptionError, match="prompt 2: got caption 'куб'"):
        Job(pipeline, ["a cube", "куб"], tmp_path / "job")
    with pytest.raises(ValueError, match="keep=3 ranked by None"):
        Job(pipeline, ["a cube"], tmp_path / "job", keep=3)
    for content, message in ((b"\n \n", "got no caption in"), (b"\xff\xfe\xfd", "cannot read prompts")):
        (tmp_path / "prompts.txt").write_bytes(content)
        arguments = ["sample", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "job")]
        assert main([*arguments, "--model", str(model)]) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


def test_prompts_from_standard_input_ranked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a red cube\na blue circle\n")
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        command = [
            "sample",
            "--prompts",
            "-",
            "--n",
            "6",
            "--keep",
            "2",
            "--rank",
            "both",
            "--out",
            str(tmp_path / "o"),
        ]
        assert main([*command, "--model", str(model), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "2 of 2 captions" in captured.out and "768/768" in captured.err
    pictures = json.loads((tmp_path / "o/0001/sample.json").read_text())["pictures"]
    assert len(pictures) == 6 and all(p["score"] is not None for p in pictures)
    by_clip = sorted(range(6), key=lambda i: -pictures[i]["score"])
    by_likelihood = sorted(range(6), key=lambda i: -pictures[i]["log_likelihood"])
    total = [by_clip.index(i) + by_likelihood.index(i) for i in range(6)]
    assert total == sorted(total)
    assert Image.open(tmp_path / "o/0001/sheet.png").size == (132, 64)  # two pictures


def test_ctrl_c_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\na blue cube\n")
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "dalle_fast.cli",
        "sample",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "-n",
        "5000",
    ]
    command += ["--wave", "1", "--model", str(model), "--out", str(out), "--device", "cpu"]
    run = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while not (out / "0000/wave-000001.json").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in stderr, stderr
    assert "0 of 2 captions" in stdout and "the same command goes on" in stdout
    assert not [name for name in names(out) if Path(name).name.startswith(".")]
