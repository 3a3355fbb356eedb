"""The CUDA kernels, executed: on the CPU through tests/cuda_on_cpu, and on a GPU where there is one."""

import pytest
import torch
from cuda_emulation import Machine, available, machines
from helpers import assert_close
from test_decode_attention import inputs, plain_step

from dalle_fast import cuda_backend, reference
from dalle_fast.cuda_backend import Shape
from dalle_fast.masks import Mask

pytestmark = available
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def machine(request):
    return Machine(request.param)


def check(machine, mask, prompts, group, n, first, dtype, head_dim, shape=None, heads=2):
    mask = Mask.parse(mask)
    args = [x.cpu() for x in inputs(mask, prompts, group, n, first, dtype, head_dim, heads)]
    wide, position = [x.double() for x in args], torch.tensor([first])
    expected = reference.decode_attention(*wide, position, str(mask))
    plain = plain_step(*(x.clone() for x in args), first, mask)
    got = machine(cuda_backend.decode_attention, *args, position, str(mask), shape=shape)
    assert_close(got, plain, expected)
    for name, tail, want in zip(("tail_k", "tail_v"), args[5:], wide[5:], strict=True):
        assert torch.equal(tail.double().nan_to_num(7e7), want.nan_to_num(7e7)), name


@machines
@TYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", [Shape(16, 1), Shape(64, 1), Shape(16, 2)], ids=str)
def test_decode_attention(machine, dtype, head_dim, shape):
    check(machine, "row@70+8x8", 2, 9, 2, 21, dtype, head_dim, shape)
