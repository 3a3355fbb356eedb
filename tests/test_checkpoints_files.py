"""What `dalle-fast convert` leaves behind: a folder that draws, or nothing; and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peer_packages
import pytest
import safetensors.torch
import torch
from test_checkpoints_dalle_pytorch import checkpoint, random_peer
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast import checkpoints, cli
from dalle_fast.checkpoints import writing
from dalle_fast.config import ModelConfig
from dalle_fast.weights import WeightError


def rudalle_state(dim: int = 32, vocab: int = 48, side: int = 4, caption: int = 8) -> dict[str, torch.Tensor]:
    """ruDALL-E's names, one layer."""

    def pair(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.rand(shape), f"{name}.bias": torch.rand(shape[:1])}

    layer = "transformer.layers.0"
    state = {
        "text_embeddings.weight": torch.rand(40 + caption, dim),
        "image_embeddings.weight": torch.rand(vocab, dim),
        "text_pos_embeddings.weight": torch.rand(caption + 1, dim),
        "image_row_embeddings.weight": torch.rand(side, dim),
        "image_col_embeddings.weight": torch.rand(side, dim),
    }
    norms = ("input", "before_first_addition", "post_attention", "before_second_addition")
    for name in [f"{layer}.{norm}_layernorm" for norm in norms] + ["transformer.final_layernorm", "to_logits.0"]:
        state |= pair(name, dim)
    state |= pair(f"{layer}.attention.query_key_value", 3 * dim, dim) | pair(f"{layer}.attention.dense", dim, dim)
    state |= pair(f"{layer}.mlp.dense_h_to_4h", 4 * dim, dim) | pair(f"{layer}.mlp.dense_4h_to_h", dim, 4 * dim)
    return state | pair("to_logits.1", 40 + caption + vocab, dim)


def words(path: Path, *names: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(("[PAD]", "[UNK]", *names))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_a_converted_folder_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with peer_packages.dalle_pytorch() as peer:
        source = checkpoint(*random_peer(peer, text=6, side=8), tmp_path / "dalle.pt")
    tokenizer, out = words(tmp_path / "words.json", "red", "cube"), tmp_path / "models/out"
    assert cli.main(["convert", "dalle-pytorch", str(source), str(out), "--tokenizer", str(tokenizer)]) == 0
    assert "still needs" not in capsys.readouterr().out
    names = {"config.json", "model.safetensors", "tokenizer.json", "discrete_vae.json", "discrete_vae.safetensors"}
    assert {p.name for p in out.iterdir()} == names | {"notes.json"}
    assert set(json.loads((out / "notes.json").read_text())["sources"]) == {"dalle.pt", "words.json"}
    pictures = tmp_path / "pictures"
    command = ["sample", "red cube", "-n", "1", "--model", str(out), "--out", str(pictures), "--device", "cpu"]
    assert cli.main([*command, "--dtype", "float32"]) == 0
    assert (pictures / "0000.png").exists()


def test_without_its_tokenizers_a_folder_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(rudalle_state(), tmp_path / "rudalle.bin")
    command = ["convert", "rudalle", str(tmp_path / "rudalle.bin"), str(tmp_path / "out"), "--model-version", "3"]
    assert cli.main([*command, "--heads", "2", "--dtype", "bfloat16"]) == 0
    assert "still needs a caption tokenizer and an image tokenizer" in capsys.readouterr().out
    assert safetensors.torch.load_file(tmp_path / "out/model.safetensors")["head.bias"].dtype == torch.bfloat16
    assert cli.main([*command, "--heads", "2"]) == 2  # what is there stays, unless told otherwise
    assert "already holds config.json, model.safetensors, notes.json" in capsys.readouterr().err
    assert cli.main([*command, "--heads", "4", "--overwrite"]) == 0
    assert ModelConfig.from_json((tmp_path / "out/config.json").read_text()).heads == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rudalle", "absent.bin", "out/deep", "--model-version", "3"], "cannot read absent.bin"),
        (["rudalle", "rudalle.bin", "out/deep"], "expected 3 (Malevich"),
        (["rudalle", "rudalle.bin", "out/deep", "--model-version", "3"], "got heads=None for dim=32"),
        (["rudalle", "nan.bin", "out/deep", "--model-version", "3", "--heads", "2"], "head.bias has values"),
        (["rudalle", "rudalle.bin", "noise", "--model-version", "3", "--heads", "2"], "which is a file"),
        (["rudalle", "rudalle.bin", "out", "--model-version", "2", "--heads", "2", "--sha256", "00"], "expected 00"),
        (["rudalle", "rudalle.bin", "out", "--model-version", "3", "--heads", "2", "--tokenizer", "noise"], "noise"),
        (
            ["rudalle", "rudalle.bin", "out", "--model-version", "3", "--heads", "2", "--images", "rudalle.bin"],
            "without a",
        ),
        (
            ["rudalle", "rudalle.bin", "out", "--model-version", "3", "--heads", "2", "--tokenizer", "many.json"],
            "up to 60",
        ),
        (["rudalle", "empty", "out", "--model-version", "3"], "without weight files"),
        (["dalle-pytorch", "rudalle.bin", "out"], "without hparams"),
        (["dalle-pytorch", "rudalle.bin", "out", "--heads", "2"], "whose file says how many"),
        (["images", "rudalle.bin", "out"], "got a file without a VQGAN"),
        (["images", "rudalle.bin", "out", "--heads", "2"], "which has none"),
        (["images", "noise", "out"], "cannot read noise"),
        (["minimal", "noise", "out"], "invalid choice"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    state = rudalle_state()
    torch.save(state, "rudalle.bin")
    torch.save(state | {"to_logits.1.bias": torch.full((96,), torch.inf)}, "nan.bin")
    Path("noise").write_bytes(b"\xff\x00noise")
    Path("empty").mkdir()
    words(Path("many.json"), *map(str, range(59)))
    before = {p: p.is_file() and p.read_bytes() for p in Path(".").rglob("*")}
    try:
        code = cli.main(["convert", *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert {p: p.is_file() and p.read_bytes() for p in Path(".").rglob("*")} == before


def test_what_is_written_is_a_safetensors_file(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "half": torch.rand(3).half(),
        "wide": torch.rand(2, 3, dtype=torch.float64),
        "slice": torch.rand(4, 4)[1:3],
        "turned": torch.rand(3, 5).T,
        "brain": torch.rand(1).bfloat16(),
        "long": torch.rand(writing.CHUNK + 3),
    }
    expected = {name: x.clone() for name, x in state.items()}
    with (tmp_path / "x.safetensors").open("wb") as file:
        assert writing.stream(file, state) == [] and not state
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(rudalle_state(), tmp_path / "rudalle.bin")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "stream", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.convert("rudalle", tmp_path / "rudalle.bin", tmp_path / "a/b", version=3, heads=2)
    assert [p.name for p in tmp_path.iterdir()] == ["rudalle.bin"]


def shards(folder: Path, **sizes: int) -> None:
    folder.mkdir()
    state = rudalle_state(**sizes)
    rest = {name: state.pop(name) for name in list(state) if name.startswith("to_logits.1")}
    torch.save(state, folder / "pytorch_model-1.bin")
    safetensors.torch.save_file(rest, folder / "pytorch_model-2.safetensors")


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path / "source")
    checkpoints.convert("rudalle", tmp_path / "source", tmp_path / "out", version=3, heads=2)
    assert set(json.loads((tmp_path / "out/notes.json").read_text())["sources"]) == {
        "pytorch_model-1.bin",
        "pytorch_model-2.safetensors",
    }
    torch.save(rudalle_state(), tmp_path / "source/again.pt")
    with pytest.raises(WeightError, match="again, expected shards without overlap"):
        checkpoints.convert("rudalle", tmp_path / "source", tmp_path / "other", version=3, heads=2)


ANONYMOUS = """
import sys, threading, torch
from dalle_fast import checkpoints

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def convert(name):
    checkpoints.convert("rudalle", name, name + "-out", version=3, heads=2, dtype=getattr(torch, sys.argv[1], None))

def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, anonymous())

convert("small")  # what is loaded once is there now
done, peak, start = threading.Event(), 0, anonymous()
threading.Thread(target=watch, daemon=True).start()
convert("large")
done.set()
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc/self/smaps_rollup")
@pytest.mark.parametrize("dtype", ["as it is", "float16"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_conversion_holds_less_than_a_shard(tmp_path: Path, suffix: str, dtype: str) -> None:
    """Beside what is mapped from the files, which the system may drop at any time."""
    for name, dim, layers in (("small", 32, 1), ("large", 1024, 5)):
        one = rudalle_state(dim=dim)
        state = {k.replace("layers.0.", f"layers.{i}."): x.clone() for i in range(layers) for k, x in one.items()}
        names = list(state)
        (tmp_path / name).mkdir()
        for i in range(4):
            shard = {key: state[key] for key in names[i * len(names) // 4 : (i + 1) * len(names) // 4]}
            path = tmp_path / name / f"{i}.{suffix}"
            torch.save(shard, path) if suffix == "bin" else safetensors.torch.save_file(shard, path)
    largest = max(path.stat().st_size for path in (tmp_path / "large").iterdir())
    assert largest > 60e6
    command = [sys.executable, "-c", ANONYMOUS, dtype]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < largest
