"""Threads change no number, torch's setting is obeyed, and both kinds of pool work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_fast import cpu_backend
from dalle_fast.config import ModelConfig
from dalle_fast.cpu_engine import CpuEngine
from dalle_fast.model import DalleModel

pytestmark = pytest.mark.skipif(cpu_backend.kernels_why_not() is not None, reason="the C++ kernels are not built")

SCRIPT = """
import os, threading, torch
from dalle_fast import cpu_backend
from dalle_fast.cpu_backend import PackedLinear, skinny_linear
torch.manual_seed(0)
x, packed = torch.randn(9, 300), PackedLinear(torch.randn(400, 300), dtype="int8")
results = []
for threads in (1, 2, 3, 1, 2):
    torch.set_num_threads(threads)
    results.append(skinny_linear(x, packed))
def other():  # a second Python thread calls at the same time
    for _ in range(20):
        results.append(skinny_linear(x, packed))
thread = threading.Thread(target=other)
thread.start()
other()
thread.join()
assert all(torch.equal(r, results[0]) for r in results)
print(cpu_backend.kernels().pool())
"""


@pytest.mark.parametrize("pool", ["own", "openmp"])
def test_pool(pool):
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], env={**os.environ, "DALLE_FAST_CPU_POOL": pool}, capture_output=True, text=True,
        cwd=Path(__file__).parent, timeout=120,
    )  # fmt: skip
    if "no libgomp is loaded" in done.stderr:
        pytest.skip("this torch does not bring libgomp")
    assert done.stdout.strip() == pool, done.stderr[-2000:]


def test_the_engine_gives_the_same_numbers_on_any_number_of_threads():
    config = ModelConfig.preset("tiny", height=2, width=3, token_shift=True)
    model = DalleModel(config).requires_grad_(False)
    text, tokens = torch.ones(2, 16, dtype=torch.int64), torch.randint(32, (10, 4))
    results = []
    for threads in (1, 2, 3, 5):
        engine = CpuEngine(model, threads=threads, chunk=2)
        results.append((engine.prefill(text, 5), engine.feed(tokens)))
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0]) and torch.equal(second, results[0][1])
