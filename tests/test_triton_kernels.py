"""What only the Triton kernels have: odd tiles, split prefixes, fp8 tails, choice by name, and compilation for devices
that are not here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, assert_close, require
from test_decode_attention import inputs, plain_step

from dalle_fast import backends, reference, triton_backend
from dalle_fast.backends import Call
from dalle_fast.kernels import configs
from dalle_fast.kernels.configs import Tile
from dalle_fast.masks import Mask

SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # bytes a program may have


@pytest.fixture(autouse=True)
def usable():
    require("triton", "decode_attention", torch.float32)
    require("triton", "sparse_attention", torch.float32)


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (64, 32)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mask", ["column@19+7x9", "conv(kernel=3,boundary=torus)@33+8x8"])
def test_any_tile_and_any_split_of_the_queries(tile, splits, mask):
    length = Mask.parse(mask).layout.total - 5
    q, k, v, grad = (torch.randn(1, 2, length, 16, device=DEVICE) for _ in range(4))
    tile = Tile(*tile, 4, 1)
    out, lse = triton_backend.sparse_attention(q, k, v, mask, tile=tile)
    wide = [x.double().cpu() for x in (q, k, v)]
    want, want_lse = reference.sparse_attention(*wide, mask)
    assert (out.cpu() - want).abs().max() < 2e-6 and (lse.cpu() - want_lse).abs().max() < 4e-6
    got = triton_backend.sparse_attention_backward(grad, q, k, v, out, lse, mask, tile=tile, splits=splits)
    for ours, expected in zip(
        got, reference.sparse_attention_backward(grad.double().cpu(), *wide, want, want_lse, mask), strict=True
    ):
        assert (ours.cpu() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_a_split_prefix(splits, n):
    mask = Mask.parse("row@100+8x8")
    args = inputs(mask, 2, 3, n, 20, torch.float32, 16)
    wide = [x.double().cpu() for x in args]
    plain = plain_step(*(x.cpu().clone() for x in args), 20, mask)
    expected = reference.decode_attention(*wide, torch.tensor([20]), str(mask))
    position = torch.tensor([20], device=DEVICE)
    got = triton_backend.decode_attention(*args, position, str(mask), splits=splits)
    assert_close(got.cpu(), plain, expected)
    assert torch.equal(args[5].double().cpu().nan_to_num(7e7), wide[5].nan_to_num(7e7))


@pytest.mark.skipif(DEVICE != "cpu", reason="about the choice without a GPU")
def test_on_a_cpu_only_by_name():
    call = Call("sample", "cpu", torch.float32, 0)
    assert "must be asked for by name" in str(backends.why_not("triton", call))
    assert backends.choose(call).__name__ != "dalle_fast.triton_backend"
    with backends.use("triton"):
        assert backends.choose(call) is triton_backend
        with pytest.raises(backends.BackendUnavailable, match="multiplies bfloat16 matrices wrongly"):
            backends.choose(Call("decode_attention", "cpu", torch.bfloat16, 64))
        with pytest.raises(backends.BackendUnavailable, match="needs a head dim of 16, 32, 64, 128, got 48"):
            backends.choose(Call("decode_attention", "cpu", torch.float32, 48))


def test_tiles_of_devices_that_the_table_does_not_list():
    assert configs.tile("sm_89", "sample") == configs.TABLE["sm_80", "sample", 0]
    assert configs.tile("sm_120", "decode_attention", 32) == configs.TABLE["sm_100", "decode_attention", 64]
    assert configs.tile("gfx950", "sparse_attention", 128) == configs.TABLE["gfx942", "sparse_attention", 128]
    with pytest.raises(KeyError, match="got architecture xe2"):
        configs.tile("xe2", "sample")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", sorted(SHARED))
def test_every_tile_compiles_fits_and_spills_nothing(compiled, arch):
    mine = [x for x in compiled if x["arch"] == arch]
    assert {(x["arch"], x["op"], x["head_dim"]) for x in mine} == {key for key in configs.TABLE if key[0] == arch}
    for kernel in mine:
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["spills"] == 0, kernel
        assert (kernel["dots"] > 0) == (kernel["kernel"] not in ("delta", "sample")), kernel
        # log(u) next to u = 1 needs the accurate logarithm: the approximate one may return 0, and its log is infinite.
        assert not (kernel["kernel"] == "sample" and kernel["approximate_log"]), kernel


def test_tiles_visited_are_those_of_the_plan():
    """At 256 + 32x32 and 64 x 64, against dense causal: row 2.0, column 2.3 (thanks to its order), conv 1.6 times fewer."""
    dense = 20 * 21 // 2
    for rule, fewer in (("row", 2.0), ("column", 2.3), ("conv(kernel=11,boundary=flat)", 1.58)):
        lists = triton_backend._lists(f"{rule}@256+32x32", 64, 64, torch.device("cpu"))
        offsets, split, blocks, ids = lists.by_query
        assert math.floor(100 * dense / (10 + 64 + len(blocks))) >= 100 * fewer
        for b in range(16):  # full tiles first
            assert (ids[offsets[b] : split[b]] < 0).all() and (ids[split[b] : offsets[b + 1]] >= 0).all()
