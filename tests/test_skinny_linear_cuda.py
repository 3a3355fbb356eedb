"""csrc/skinny_linear.cu, executed: on the CPU through tests/cuda_on_cpu, and on a GPU where there is one."""

import pytest
import torch
from cuda_emulation import Machine, available, machines
from helpers import assert_close

from dalle_fast import backends, cuda_backend, torch_backend
from dalle_fast.cpu_backend import EPILOGUES
from dalle_fast.linear import skinny_linear
from dalle_fast.packing import KINDS, STAGES, Branch, PackedWeight, pack

pytestmark = available
ROWS = (1, 2, 7, 8, 9, 16, 33, 64)


@pytest.fixture
def machine(request):
    return Machine(request.param)


@pytest.fixture
def multiprocessors(monkeypatch):
    """Sets among how many thread blocks work is shared out, and how much shared memory each may have."""

    def set_to(count, shared_limit=227 << 10):
        describe = cuda_backend.describe
        monkeypatch.setattr(
            cuda_backend, "describe", lambda d: describe(d)._replace(multiprocessors=count, shared_limit=shared_limit)
        )

    return set_to


def check(
    machine,
    rows,
    outputs,
    inputs,
    kind,
    epilogue="none",
    norm=False,
    residual=False,
    parts=1,
    scaled=False,
    joins=False,
):
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    gates = 2 if epilogue == "geglu" else 1
    weight, bias = torch.randn(outputs * gates, inputs) / inputs**0.5, torch.randn(outputs * gates)
    scale = torch.rand(outputs * gates) + 0.5 if scaled else None
    packed = pack(weight, bias, kind=kind, geglu=gates == 2, output_scale=scale)
    x = (torch.randn(rows, inputs) * 2 + 1).to(dtype)
    added = torch.randn(rows, outputs).to(dtype) if residual else None
    vectors = (torch.rand(inputs) + 0.5, torch.randn(inputs)) if norm else (None, None)
    branch = (None,) * 4
    if joins:
        branch = (
            (torch.randn(rows, inputs) * 3 - 1).to(dtype),
            torch.rand(inputs),
            torch.randn(inputs),
            torch.zeros_like(x),
        )

    def call(x, data, scale, bias, counters, added, norm_weight, norm_bias, branch, weight, bias_of_branch, total):
        packed = PackedWeight(data, scale, bias, counters, kind, inputs, outputs, gates == 2)
        joined = None if branch is None else Branch(branch, weight, bias_of_branch, total)
        return cuda_backend.skinny_linear(x, packed, added, norm_weight, norm_bias, 1e-5, epilogue, parts, joined)

    counters = packed.counters.clone()
    got = machine(call, x, packed.data, packed.scale, packed.bias, counters, added, *vectors, *branch)
    assert not counters.any()
    options = {"norm": vectors if norm else None, "epilogue": epilogue}
    plain_branch, exact_branch = None, None
    if joins:
        plain_branch = Branch(*branch[:3], torch.empty_like(x))
        exact_branch = Branch(*(v.double() for v in branch[:3]), torch.empty_like(x, dtype=torch.float64))
    with backends.use("torch"):
        plain = skinny_linear(x, packed, residual=added, branch=plain_branch, **options)
    with backends.use("reference"):
        wide = None if added is None else added.double()
        oracle = skinny_linear(x.double(), packed, residual=wide, branch=exact_branch, **options)
    assert_close(got.transpose(0, 1).reshape(rows, outputs), plain, oracle)
    if joins:
        assert_close(branch[3], plain_branch.sum, exact_branch.sum, what="sum")
    return got


@machines
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_kinds(machine, kind, rows):
    """Sizes that end inside every tile, group and part."""
    check(machine, rows, 140, 296, kind, "gelu_tanh", norm=True, residual=True)


@machines
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("kind", KINDS)
def test_epilogues(machine, kind, epilogue):
    for norm, residual, scaled in ((False, False, True), (True, False, False), (False, True, False)):
        check(machine, 3, 72, 96, kind, epilogue, norm, residual, scaled=scaled)
    check(machine, 11, 72, 96, kind, epilogue, norm=True, residual=True, scaled=True)


@machines
@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (129, 33), (40, 261), (128, 128), (17, 1)])
@pytest.mark.parametrize("kind", STAGES)
def test_odd_sizes(machine, kind, outputs, inputs, rows):
    for norm in (False, True):
        check(machine, rows, outputs, inputs, kind, norm=norm and inputs > 1, residual=True)


@machines
@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 64, 1000])
@pytest.mark.parametrize("kind", STAGES)
def test_sums_shared_by_blocks(machine, multiprocessors, kind, count):
    """One block with all tiles, shares that end anywhere in a sum, a block for each stage. Few rows: sums of one block each."""
    multiprocessors(count)
    for rows in (2, 10):
        check(machine, rows, 300, 900, kind, norm=True, residual=True)


@machines
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows(machine, multiprocessors, kind, count):
    """Blocks of 1 to 8 tiles of 16 outputs, the last one with fewer, and a tile with fewer outputs; stages for one warp of a
    block, for some, for all."""
    multiprocessors(count)
    for rows, outputs, inputs in ((1, 300, 8), (3, 41, 264), (5, 100, 776), (8, 270, 1288)):
        check(machine, rows, outputs, inputs, kind, "gelu", norm=rows > 1, residual=True, scaled=True)


@machines
@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_few_rows_with_gates(machine, multiprocessors, kind, count):
    """A tile is 8 values and their gates."""
    multiprocessors(count)
    for rows, outputs, inputs in ((1, 8, 520), (2, 77, 264), (7, 149, 136), (8, 60, 648)):
        check(machine, rows, outputs, inputs, kind, "geglu", norm=True, residual=rows > 2, scaled=True)


@machines
@pytest.mark.parametrize("rows", range(1, 9))
def test_few_rows_in_parts(machine, multiprocessors, rows):
    """Parts that end inside a tile; warps and pieces of LayerNorm that do not come out even."""
    multiprocessors(2)
    for inputs in (8, 2056):
        got = check(machine, rows, 3 * 44, inputs, "bfloat16", norm=True, parts=3, joins=rows % 2 == 0)
        assert got.shape == (3, rows, 44)


@machines
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_mean_far_from_zero_does_not_cancel(machine, rows):
    """LayerNorm of rows whose spread is a thousandth of their mean, or that lies in one input."""
    packed = pack(torch.randn(20, 1032) / 32, kind="float16")
    x = torch.full((rows, 1032), 512.0)
    x[:, ::2] += 0.5
    x[-1] = 1.0
    x[-1, 3] = 30000.0
    x = x.half()

    def call(x, data, counters, norm_weight, norm_bias):
        weight = PackedWeight(data, None, None, counters, "float16", 1032, 20, False)
        return cuda_backend.skinny_linear(x, weight, None, norm_weight, norm_bias, 1e-5, "none", 1)

    norm = (torch.ones(1032), torch.zeros(1032))
    got = machine(call, x, packed.data, packed.counters, *norm)[0]
    with backends.use("torch"):
        plain = skinny_linear(x, packed, norm=norm)
    with backends.use("reference"):
        oracle = skinny_linear(x.double(), packed, norm=norm)
    assert_close(got, plain, oracle)


@machines
@pytest.mark.parametrize("first", [0, 1])
def test_vectors_on_any_address(machine, first):
    """Views that start between multiples of 16 bytes."""
    packed = pack(torch.randn(50, 264) / 16, torch.randn(50), kind="int8")
    x, both = torch.randn(2, 264).bfloat16(), torch.randn(2, 264 + first)

    def call(x, data, scale, bias, counters, both):
        weight = PackedWeight(data, scale, bias, counters, "int8", 264, 50, False)
        norm = (both.flatten()[first : first + 264], both.flatten()[264 + first :][:264])
        return cuda_backend.skinny_linear(x, weight, None, *norm, 1e-5, "none", 1)

    got = machine(call, x, packed.data, packed.scale, packed.bias, packed.counters, both)[0]
    norm = (both.flatten()[first : first + 264], both.flatten()[264 + first :][:264])
    with backends.use("torch"):
        plain = skinny_linear(x, packed, norm=norm)
    with backends.use("reference"):
        oracle = skinny_linear(x.double(), packed, norm=norm)
    assert_close(got, plain, oracle)


@pytest.mark.emulated
def test_a_result_does_not_depend_on_the_order_of_blocks(multiprocessors):
    multiprocessors(13)
    results = []
    for order in ("forwards", "backwards"):
        torch.manual_seed(0)
        results.append([check(Machine(order), rows, 300, 904, "int8", norm=True) for rows in (5, 11)])
    for pair in zip(*results, strict=True):
        assert torch.equal(*pair)


@machines
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_joins_first(machine, multiprocessors, kind):
    multiprocessors(3)
    for rows, outputs, inputs in ((1, 200, 136), (8, 60, 137), (6, 40, 2088), (9, 130, 264), (10, 20, 133)):
        if kind in STAGES or inputs % 8 == 0:
            check(machine, rows, outputs, inputs, kind, "gelu", norm=True, joins=True)
    check(machine, 3, 50, 64, kind, joins=True)


@machines
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_that_do_not_fit_in_shared_memory(machine, multiprocessors, kind):
    multiprocessors(3, 99 << 10)
    for norm, inputs in ((False, 5000), (True, 5000), (False, 5003)):
        if kind in STAGES or inputs % 8 == 0:
            check(machine, 8, 20, inputs, kind, norm=norm)


@machines
def test_parts(machine):
    for rows in (1, 6, 20):
        assert check(machine, rows, 3 * 44, 64, "int8", norm=True, parts=3).shape == (3, rows, 44)


@machines
def test_a_nan_stays_in_its_row(machine):
    x = torch.randn(9, 64).bfloat16()
    x[3, 5] = float("nan")
    packed = pack(torch.randn(50, 64), kind="int8")

    def call(x, data, scale, counters):
        weight = PackedWeight(data, scale, None, counters, "int8", 64, 50, False)
        norm = (torch.ones(64, device=x.device), torch.zeros(64, device=x.device))
        return cuda_backend.skinny_linear(x, weight, None, *norm, 1e-5, "none", 1)

    for rows in (x[:8], x):
        y = machine(call, rows, packed.data, packed.scale, packed.counters)[0]
        assert y[3].isnan().all() and y[torch.arange(len(rows)) != 3].isfinite().all()


def test_16_bit_weights_want_rows_of_their_type():
    packed = pack(torch.randn(4, 8), kind="float16")
    with pytest.raises(ValueError, match=r"got x torch.bfloat16 for a weight of float16"):
        cuda_backend.skinny_linear(torch.randn(2, 8).bfloat16(), packed, None, None, None, 1e-5, "none", 1)


@machines
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_dense_weights(machine, multiprocessors, epilogue, kind):
    """As nn.Linear has them. Tiles, stages and halves of a tile that are not whole; one warp's share and less."""
    multiprocessors(3)
    for rows, outputs, inputs in ((1, 200, 136), (8, 60, 264), (3, 13, 8), (5, 129, 520), (2, 8, 32)):
        plain = epilogue != "geglu"
        check(machine, rows, outputs, inputs, kind, epilogue, norm=True, residual=plain, scaled=rows % 2 == 0)
    check(machine, 7, 40, 72, kind, epilogue, norm=True, joins=True)
    check(machine, 6, 3 * 44, 64, kind, parts=3)


@machines
def test_the_kernel_for_dense_weights_wants_few_rows(machine, monkeypatch):
    """More are cuBLAS's."""
    assert (
        cuda_backend.few_rows(2048, torch.device("cpu")) == 8 and cuda_backend.few_rows(15872, torch.device("cpu")) == 2
    )
    check(machine, 9, 40, 64, "bfloat16", joins=True)
    monkeypatch.setattr(cuda_backend, "few_rows", lambda inputs, device: 64)
    with pytest.raises(RuntimeError, match=r"got 9 rows of 64 inputs for a dense weight"):
        check(machine, 9, 40, 64, "bfloat16")


@machines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("joins", [False, True])
def test_join(machine, joins, dtype):
    """What a product would start with, on its own, of any number of rows."""
    for rows, inputs in ((1, 8), (70, 136), (3, 2056)):
        x, branch, total = (torch.randn(rows, inputs).to(dtype) for _ in range(3))
        vectors = [torch.randn(inputs) for _ in range(4)]

        def call(x, branch, total, *vectors):
            joined = Branch(branch, *vectors[2:], total) if joins else None
            return cuda_backend.join(x, *vectors[:2], 1e-5, joined)

        got = machine(call, x, branch, total, *vectors)
        plain_total, exact_total = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
        plain, exact = (
            torch_backend.join(of, *vectors[:2], 1e-5, Branch(rows_, *vectors[2:], sum_) if joins else None)
            for of, rows_, sum_ in ((x, branch, plain_total), (x.double(), branch.double(), exact_total))
        )
        assert_close(got, plain, exact)
        if joins:
            assert_close(total, plain_total, exact_total, what="sum")
