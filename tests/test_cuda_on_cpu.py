"""tests/cuda_on_cpu finds the faults that it promises to find, and none in kernels without; its arithmetic is the GPU's."""

import ctypes
import functools

import pytest
import torch
from cuda_emulation import HERE, available, build, control

pytestmark = available

FAULTS = {
    "reads_too_early": "race: ",
    "a_warp_is_not_the_block": "race: ",
    "lanes_need_a_barrier_too": "race: ",
    "overwrites_too_early": "race: ",
    "several_readers_then_a_write": "race: ",
    "two_write_one": "race: ",
    "one_byte_of_a_word": "race: ",
    "atomic_and_not": "race: ",
    "copy_not_waited_for": "race: touches bytes of a cp.async before waiting for it",
    "copy_of_another_thread": "race: ",
    "copy_over_what_is_read": "race: ",
    "copy_forgotten": "a thread ends before its cp.async is committed",
    "shared_array_overrun": "out-of-bounds access of shared memory: byte 256 of an array of 256 (thread 63",
    "shared_array_underrun": "out-of-bounds access of shared memory: byte -4 of an array of 256 (thread 0",
    "static_array_overrun": "out-of-bounds access of shared memory: byte 252 of an array of 252 (thread 63",
    "shared_memory_too_small": "an array exceeds the dynamic shared memory",
    "shared_misaligned": "misaligned access of shared memory",
    "global_read_overrun": "out-of-bounds access of global memory: byte 256 of 256 (thread 63",
    "global_read_underrun": "out-of-bounds access of global memory: byte -4 of 256 (thread 0",
    "global_plain_read_overrun": "out-of-bounds access of global memory: byte 256 of 256",
    "global_plain_write_overrun": "out-of-bounds access of global memory: byte 256 of 256",
    "global_plain_write_underrun": "out-of-bounds write beside global memory of 256",
    "global_copy_overrun": "out-of-bounds access of global memory: byte 256 of 256 (thread 63",
    "global_misaligned": "misaligned access of global memory",
    "null_pointer": "access of memory that is not there",
    "barrier_in_a_branch": "divergent barrier: 32 threads ended, others wait at broken_kernels.cu:",
    "barrier_after_an_exit": "divergent barrier: 1 threads ended, others wait at broken_kernels.cu:",
    "barriers_on_two_lines": "divergent __syncthreads: threads wait at broken_kernels.cu:",
    "shuffle_in_a_branch": "divergent barrier: 2 threads ended, others wait at broken_kernels.cu:",
    "shuffle_against_vote": "divergent ",
    "some_lanes_only": "__shfl_sync with a partial mask",
}


@functools.cache
def library():
    path = build("broken.so", HERE / "cuda_on_cpu/broken_kernels.cu")
    loaded = control(path)
    loaded.run.restype = ctypes.c_char_p
    loaded.run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return loaded


def run(name, threads=64, shared=512, backwards=False):
    """(what was found, the output of a kernel for the input 0, 1, … 63)."""
    c = library()
    addresses = [c.cuda_on_cpu_allocate(256) for _ in range(2)]
    given, out = ((ctypes.c_float * 64).from_address(address) for address in addresses)
    given[:] = range(64)
    c.cuda_on_cpu_backwards(int(backwards))
    message = c.run(name.encode(), *addresses, threads, shared).decode()
    result = list(out)
    c.cuda_on_cpu_release()
    return message.removeprefix(": "), result


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("backwards", [False, True])
def test_faults_are_found(name, backwards):
    found = run(name, backwards=backwards)[0]
    # Which thread of several is the first to err depends on their order.
    assert FAULTS[name].split(" (thread")[0] in found if backwards else found.startswith(FAULTS[name]), found


@pytest.mark.parametrize("backwards", [False, True])
def test_kernels_without_a_fault_run(backwards):
    assert run("right", backwards=backwards) == ("", [2 * i + 64 for i in range(64)])
    assert run("right_in_a_warp", backwards=backwards) == ("", [i ^ 30 for i in range(64)])
    assert run("copy_right", backwards=backwards) == ("", [0, 0, *range(61, -1, -1)])


def test_a_fault_does_not_outlive_its_launch():
    assert run("reads_too_early")[0] and run("barrier_in_a_branch")[0] and run("null_pointer")[0]
    assert run("right") == ("", [2 * i + 64 for i in range(64)])


def test_launches_that_a_gpu_refuses():
    assert run("right", threads=48)[0] == "a block must have full warps, at most 32"
    assert run("right", threads=1056)[0] == "a block must have full warps, at most 32"
    assert run("right", shared=300 << 10)[0]
    assert run("right", shared=100 << 10)[0] == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_instructions_and_votes(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d, votes = torch.empty(16, 8), torch.empty(4, 32, dtype=torch.int32)
    library().multiply(ctypes.c_int(dtype == torch.float16), *(ctypes.c_void_p(x.data_ptr()) for x in (a, b, d, votes)))
    expected = a.double() @ b.double()
    assert (d - expected).abs().max() < 1e-5
    lanes = torch.arange(32)
    assert (votes[0] == sum(1 << i for i in range(0, 32, 3)) - (1 << 32) * (30 % 3 == 0 and 31 % 3 == 0)).all()
    assert torch.equal(votes[1].long(), torch.where(lanes < 3, lanes, lanes - 3))
    assert torch.equal(votes[2].long(), torch.where(lanes > 28, lanes, lanes + 3))
    assert torch.equal(votes[3].long(), lanes // 8 * 64 + 28)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype):
    """Every value of the type, those halfway to the next and around them, infinities and NaN."""
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = (exact + exact.roll(-1)) / 2
    x = torch.cat([exact, between, between * (1 + 2**-20), between * (1 - 2**-20), torch.randn(1000) * 1e-6])
    rounded, back = torch.empty(len(x), dtype=torch.int16), torch.empty(len(x))
    pointers = [ctypes.c_void_p(y.data_ptr()) for y in (x, rounded, back)]
    library().convert(ctypes.c_int(dtype == torch.float16), ctypes.c_int(len(x)), *pointers)
    expected = x.to(dtype)
    assert torch.equal(rounded.view(dtype).nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), expected.float().nan_to_num(7))
