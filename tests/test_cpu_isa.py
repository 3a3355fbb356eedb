"""The tests of the C++ ops and engine again, for every other instruction set that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_fast import cpu_backend

pytestmark = pytest.mark.skipif(cpu_backend.kernels_why_not() is not None, reason="the C++ kernels are not built")

HERE = Path(__file__).parent
FILES = ("test_cpu_ops.py", "test_cpu_engine.py")


def run(code_or_files, **environment):
    return subprocess.run(
        [sys.executable, "-P", *code_or_files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512_vnni", "avx512", "amx"])
def test_instruction_set(isa):
    if isa == cpu_backend.kernels().isa():
        pytest.skip("it is the one that this run tests already")
    probe = run(["-c", "import dalle_fast._C as c; c.cpu.isa()"], DALLE_FAST_CPU_ISA=isa)
    if "does not have" in probe.stderr:
        pytest.skip(probe.stderr.splitlines()[-1])
    assert probe.returncode == 0, probe.stderr
    done = run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(HERE / f) for f in FILES)], DALLE_FAST_CPU_ISA=isa
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_unknown_names_are_refused():
    for name, value in (("DALLE_FAST_CPU_ISA", "sse9"), ("DALLE_FAST_CPU_POOL", "tbb")):
        code = f"import dalle_fast._C as c; c.cpu.{'isa' if 'ISA' in name else 'pool'}()"
        assert f"got {name}='{value}', expected" in run(["-c", code], **{name: value}).stderr
