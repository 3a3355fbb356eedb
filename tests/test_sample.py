"""sample of every backend that runs here gives the tokens of the oracle."""

import pytest
import torch
from helpers import BACKENDS, DEVICE, require

from dalle_fast import backends, ops, reference

CUTS = [(0, 1.0, 1.0), (1, 1.0, 1.0), (7, 1.0, 0.6), (64, 0.9, 1.0), (0, 0.8, 1.7), (0, 1e-6, 1.0), (300, 0.5, 1.0)]


def draw(backend, logits, cut, seed=2**40 + 17, first=2**33, position=5):
    require(backend, "sample", logits.dtype)
    top_k, top_p, temperature = cut
    candidates = torch.arange(first, first + len(logits), device=DEVICE)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with backends.use(backend):
        return ops.sample(logits, candidates, torch.tensor([position], device=DEVICE), **settings).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("vocab", [300, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_of_the_oracle(backend, cut, vocab, dtype):
    logits = (3 * torch.randn(12, vocab)).to(DEVICE, dtype)
    assert torch.equal(draw(backend, logits, cut), draw("reference", logits, cut))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [(2, 1.0, 1.0), (0, 0.5, 1.0), (3, 0.7, 1.0)], ids=str)
def test_ties_go_to_the_lower_token(backend, cut):
    logits = torch.randint(-2, 3, (60, 37)).to(DEVICE, torch.float32)
    logits[:6] = 0.0
    logits[6:12] *= -0.0  # zeros of both signs are equal
    got = draw(backend, logits, cut)
    assert torch.equal(got, draw("reference", logits, cut))
    for row, token in zip(logits.cpu(), got.tolist(), strict=True):
        assert reference.allowed_tokens(row, cut[2], cut[0], cut[1])[token]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_neither_batch_nor_place(backend):
    logits = torch.randn(8, 100, device=DEVICE)
    whole = draw(backend, logits, (0, 1.0, 1.0))
    assert torch.equal(draw(backend, logits[3:6], (0, 1.0, 1.0), first=2**33 + 3), whole[3:6])
    assert not torch.equal(draw(backend, logits, (0, 1.0, 1.0), position=6), whole)
    assert not torch.equal(draw(backend, logits, (0, 1.0, 1.0), seed=3), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies(backend):
    """8,000 draws from known probabilities: χ² with 4 degrees of freedom stays below its 1 - 1e-6 quantile, 33.4."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    n = 8000 if backend != "triton" or DEVICE == "cuda" else 400
    tokens = draw(backend, p.log().expand(n, 5).contiguous().to(DEVICE), (0, 1.0, 1.0), first=0)
    seen = torch.bincount(tokens, minlength=5)
    assert float(((seen - n * p) ** 2 / (n * p)).sum()) < 33.4


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    require(backend, "sample", torch.float32)
    args = (torch.randn(2, 20, device=DEVICE), 1.0, 5, 0.9, 3, torch.arange(2, device=DEVICE))
    with backends.use(backend):
        torch.library.opcheck(torch.ops.dalle_fast.sample.default, (*args, torch.tensor([1], device=DEVICE)))


def end_of_a_step(n=2, guided=True, vocab=20, dim=6):
    """Arguments of ops.draw."""
    logits = torch.randn(2 * n if guided else n, vocab, device=DEVICE)
    table, rows, columns = (torch.randn(size, dim, device=DEVICE) for size in (vocab, 3, 4))
    given = torch.full((n,), -1, device=DEVICE)
    given[-1] = vocab - 1
    x = torch.zeros(len(logits), dim, device=DEVICE)
    position = torch.tensor([3], device=DEVICE)
    return [logits, torch.arange(n, device=DEVICE), given, position, 1, x, ops.Embedding(table, rows, columns, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_end_of_a_step(backend, guidance_scale):
    require(backend, "draw", torch.float32)
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 2**40 + 1, "guidance_scale": guidance_scale}
    args = end_of_a_step(n=5, guided=guidance_scale != 1)
    results = []
    for name in (backend, "reference"):
        args[5].zero_()
        with backends.use(name):
            tokens, log_p = ops.draw(*args, **settings)
        results.append((tokens, log_p.double(), args[5].clone()))
    (tokens, log_p, x), expected = results
    assert torch.equal(tokens, expected[0]) and torch.equal(x, expected[2]) and tokens[-1] == 19
    assert torch.allclose(log_p, expected[1], atol=1e-5)
    table, rows, columns, first = args[6]
    assert first == 1 and torch.equal(x[:5], table[tokens] + rows[0] + columns[3])  # token 2 has place 3


def test_ends_of_a_step_that_do_not_fit():
    logits, candidates, given, position, first, x, embedding = end_of_a_step()
    for changed, match in (
        ([logits, candidates[:1], given], r"got candidates \[1\] torch.int64, expected \[2\] int64"),
        ([logits, candidates, given.float()], r"got given \[2\] torch.float32, expected \[2\] int64"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.draw(*changed, position, first, x, embedding, guidance_scale=2.0)
    args = (logits, candidates, given, position, first)
    with pytest.raises(ValueError, match=r"got x \[3, 6\], expected \[4, 6\]"):
        ops.draw(*args, x[:3], embedding, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"got table torch.float64 on .*, expected torch.float32"):
        ops.draw(*args, x, embedding._replace(table=embedding.table.double()), guidance_scale=2.0)
    with pytest.raises(ValueError, match="got rows or columns alone"):
        ops.draw(*args, x, embedding._replace(rows=None), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"got candidates \[2\] torch.int64, expected \[4\] int64"):
        ops.draw(*args, x, embedding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_draw(backend):
    require(backend, "draw", torch.float32)
    logits, candidates, given, position, first, x, embedding = end_of_a_step()
    args = (logits, 1.0, 5, 0.9, 2.0, 3, candidates, given, position, first, x, *embedding)
    with backends.use(backend):
        torch.library.opcheck(torch.ops.dalle_fast.draw.default, args)
