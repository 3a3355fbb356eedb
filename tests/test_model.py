import math

import pytest
import torch
import torch.nn.functional as F

from dalle_fast import reference
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel, rotary_table
from dalle_fast.passes import Rotary, rotate, shift_sequence


def tiny(**changes):
    model = DalleModel(ModelConfig.preset("tiny", **changes)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def tokens(config, batch=2):
    return torch.randint(1, config.text_vocab, (batch, config.caption_len)), torch.randint(
        config.image_vocab, (batch, config.cells)
    )


def test_the_forward_pass_is_a_plain_transformer_with_a_dense_mask():
    """The whole model written out once more, with nothing of ours but the masks and the parameters."""
    model = tiny()
    config = model.config
    text, image = tokens(config)
    text[:, 10:] = 0  # padding
    ids = torch.where(text == 0, config.text_vocab + torch.arange(config.caption_len), text)
    p = dict(model.named_parameters())
    cells = torch.arange(config.cells)
    place = p["row_positions"][cells // config.width] + p["column_positions"][cells % config.width]
    states = torch.cat([p["start"].expand(2, 1, -1), p["image_embedding.weight"][image[:, :-1]]], dim=1) + place
    x = torch.cat([p["text_embedding.weight"][ids] + p["text_positions"], states], dim=1)

    def norm(x, name):
        return F.layer_norm(x, (config.dim,), p[f"{name}.weight"], p[f"{name}.bias"])

    for i, mask in enumerate(model.masks):
        b = f"blocks.{i}"
        qkv = norm(x, f"{b}.attention_norm") @ p[f"{b}.qkv.weight"].T + p[f"{b}.qkv.bias"]
        q, k, v = (y.view(2, -1, config.heads, config.head_dim).transpose(1, 2) for y in qkv.chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(config.head_dim)).masked_fill(~torch.from_numpy(mask.dense()), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ p[f"{b}.out.weight"].T + p[f"{b}.out.bias"]
        y = F.gelu(norm(x, f"{b}.mlp_norm") @ p[f"{b}.up.weight"].T + p[f"{b}.up.bias"], approximate="tanh")
        x = x + y @ p[f"{b}.down.weight"].T + p[f"{b}.down.bias"]
    logits = norm(x, "final_norms.0") @ p["head.weight"].T + p["head.bias"]
    text_logits, image_logits = model(text, image)
    torch.testing.assert_close(text_logits, logits[:, : config.caption_len, : config.text_logits], rtol=0, atol=1e-11)
    torch.testing.assert_close(image_logits, logits[:, config.caption_len :, config.text_logits :], rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", ["none", "learned", "text"])
def test_image_logits_j_see_tokens_before_j_and_no_others(start):
    model = tiny(start=start, patterns=("full",) * 4)
    text, image = tokens(model.config, 1)
    before = model(text, image)[1]
    j = 20
    image[0, j] = (image[0, j] + 1) % model.config.image_vocab
    changed = (model(text, image)[1] - before).abs().amax((0, 2)) > 1e-9
    assert not changed[: j + 1].any()
    assert changed[j + 1 :].all()


@pytest.mark.parametrize("start", ["none", "learned", "text"])
def test_a_shorter_image_gives_the_same_logits(start):
    model = tiny(start=start)
    text, image = tokens(model.config)
    whole = model(text, image)[1]
    assert whole.shape[1] == model.config.cells
    for n in (0, 1, 13, 63):
        part = model(text, image[:, :n])[1]
        assert part.shape[1] == n + 1
        torch.testing.assert_close(part, whole[:, : n + 1], rtol=0, atol=1e-11)


def test_the_loss_weighs_text_an_eighth():
    model = tiny()
    text, image = tokens(model.config)
    text_logits, image_logits = model(text, image)
    text_loss = F.cross_entropy(text_logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())
    image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), image.flatten())
    torch.testing.assert_close(model.loss(text, image), text_loss / 8 + 7 * image_loss / 8)


def test_a_model_learns():
    model = DalleModel(ModelConfig.preset("tiny"))
    text, image = tokens(model.config, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(text, image)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_gradient_is_the_same_every_time():
    """To the bit, on several threads: a seed decides a training."""
    torch.manual_seed(1)
    model = DalleModel(ModelConfig.preset("tiny", dim=64, height=32, width=32))
    text, image = tokens(model.config)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            model.zero_grad()
            model.loss(text, image).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    finally:
        torch.set_num_threads(before)
    assert not [name for grads in found[1:] for name, grad in grads.items() if not torch.equal(grad, found[0][name])]


def test_token_shift_by_hand():
    layout = ModelConfig.preset("tiny", height=3, width=4, caption_len=5).layout
    x = torch.randn(2, layout.total, 8)
    shifted = shift_sequence(x, layout)
    zero = torch.zeros(2, 8)
    for s in range(layout.total):
        if s < 5:
            before = x[:, s - 1] if s else zero
            expected = torch.cat([before[:, :4], x[:, s, 4:]], dim=1)
        else:
            row, column = divmod(s - 5, 4)
            above = x[:, s - 4] if row else zero
            left = x[:, s - 1] if column else zero
            expected = torch.cat([above[:, :2], left[:, 2:4], x[:, s, 4:]], dim=1)
        torch.testing.assert_close(shifted[:, s], expected, rtol=0, atol=0)


def test_dividing_by_the_maximum_comes_before_the_last_norm():
    model = tiny(divide_by_max=True)
    x = torch.randn(2, 3, model.config.dim, dtype=torch.float64)
    model.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(model.run_blocks(x, None), x / x.max(-1, keepdim=True).values)


def test_rotation_turns_pairs_and_leaves_the_rest():
    config = ModelConfig.preset("tiny", head_dim=64, positions="rotary", start="none")
    angles = rotary_table(config)
    assert angles.shape == (config.layout.total, 60)
    x = torch.randn(1, 2, config.layout.total, 64)
    turned = rotate(x, Rotary.of(angles, 64, x.dtype))
    torch.testing.assert_close(turned[..., 60:], x[..., 60:])
    torch.testing.assert_close(
        turned[..., 0::2].square() + turned[..., 1::2].square(), x[..., 0::2] ** 2 + x[..., 1::2] ** 2
    )
    a = angles[7, 4]
    torch.testing.assert_close(turned[0, 1, 7, 4], x[0, 1, 7, 4] * a.cos() - x[0, 1, 7, 5] * a.sin())


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        ((2, 15), (2, 64), r"got text \[2, 15\]"),
        ((2, 16), (1, 64), r"got image \[1, 64\], expected \[2, up to 64\]"),
        ((2, 16), (2, 65), r"got image \[2, 65\]"),
    ],
)
def test_wrong_shapes_are_named(text, image, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model(torch.ones(text, dtype=torch.int64), torch.ones(image, dtype=torch.int64))


def test_the_model_compiles():
    model = DalleModel(ModelConfig.preset("tiny", layers=2, patterns=("row", "column"))).eval()
    text, image = tokens(model.config)
    with torch.no_grad():
        expected = model(text, image)[1]
        actual = torch.compile(model, backend="aot_eager", fullgraph=True)(text, image)[1]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("batch", "cells", "dtype", "gradient", "message"),
    [
        (1, 1, torch.float64, False, "got 1 cells of 1 candidates, expected 1 to 2 of 4"),
        (6, 1, torch.float64, False, "got 1 cells of 6 candidates, expected 1 to 2 of 4"),
        (8, 1, torch.float64, False, "got 1 cells of 8 candidates, expected 1 to 2 of 4"),
        (4, 3, torch.float64, False, "got 3 cells of 4 candidates, expected 1 to 2 of 4"),
        (4, 0, torch.float64, False, "got 0 cells of 4 candidates, expected 1 to 2 of 4"),
        (4, 1, torch.float32, False, "got a step in torch.float64 on cpu, expected torch.float32 on cpu"),
        (4, 1, torch.float64, True, "inference only"),
    ],
)
def test_a_step_that_does_not_fit_its_cache_is_refused(batch, cells, dtype, gradient, message):
    model = tiny()
    cache = Cache(model.config, 2, 2, chunk=2, dtype=torch.float64)
    with torch.no_grad():
        model.prefill(tokens(model.config)[0], cache)
    if dtype != torch.float64:
        cache = Cache(model.config, 2, 2, chunk=2, dtype=dtype)
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=message):
        model.step(torch.ones(batch, cells, dtype=torch.int64), cache)


def test_a_cache_of_another_model_is_refused():
    model = tiny()
    cache = Cache(ModelConfig.preset("tiny", positions="rotary"), 1, 2, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match=r"got a cache made for .*rotary.*expected one for "):
        model.step(torch.ones(2, 1, dtype=torch.int64), cache)


def test_a_step_compiles():
    model = DalleModel(ModelConfig.preset("tiny", layers=2, patterns=("row", "column"))).eval()
    text, image = tokens(model.config)
    logits = []
    with torch.no_grad():
        for compiled in (False, True):
            cache = Cache(model.config, len(text), 1)
            model.prefill(text, cache)
            step = torch.compile(model.step, backend="aot_eager", fullgraph=True) if compiled else model.step
            logits.append([step(image[:, i : i + 1], cache) for i in range(3)])
            assert cache.position.item() == 3 + model.config.first_cell
    torch.testing.assert_close(logits[1], logits[0])


def test_save_and_load_give_the_same_logits(tmp_path):
    model = DalleModel(ModelConfig.preset("tiny", positions="rotary")).eval().requires_grad_(False)
    model.save(tmp_path)
    text, image = tokens(model.config)
    torch.testing.assert_close(DalleModel.load(tmp_path)(text, image)[1], model(text, image)[1], rtol=0, atol=0)
    narrow = DalleModel.load(tmp_path, dtype=torch.bfloat16)
    assert narrow.head.weight.dtype == torch.bfloat16 and narrow.rotary.equal(model.rotary)  # angles are not rounded


def test_the_oracle_itself_is_a_softmax_over_allowed_keys():
    mask = "column@2+2x3"
    q, k, v = torch.randn(3, 1, 1, 8, 4, dtype=torch.float64).unbind(0)
    out, lse = reference.sparse_attention(q, k, v, mask)
    scores = q[0, 0, 6] @ k[0, 0, [0, 1, 3, 6]].T / 2  # cell 4: the text, cell 1 and itself
    torch.testing.assert_close(out[0, 0, 6], scores.softmax(0) @ v[0, 0, [0, 1, 3, 6]])
    torch.testing.assert_close(lse[0, 0, 6], scores.logsumexp(0))
