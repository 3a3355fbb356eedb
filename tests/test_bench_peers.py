"""The baselines of bench/peers, where they would go wrong unseen: on another device, or in what they leave behind."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench.peers import dense
from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel

TINY = ModelConfig.preset("tiny", height=4, width=4, start="learned")


def test_a_dense_cache_lies_where_its_model_does() -> None:
    with torch.device("meta"):
        engine = dense.DenseEngine(DalleModel(TINY).requires_grad_(False))
    engine.prefill(torch.zeros(1, TINY.caption_len, dtype=torch.int64, device="meta"), 2)
    assert all(mask.is_meta for mask in engine.masks) and all(k.is_meta and v.is_meta for k, v in engine.cache)


def test_a_compiled_step_leaves_its_model_alone() -> None:
    """Its layers are one to the compiler; the model's own keep their numbers, and their weights are not copied."""
    model = DalleModel(TINY).eval().requires_grad_(False)
    text, tokens = torch.zeros(1, TINY.caption_len, dtype=torch.int64), torch.zeros(1, TINY.cells, dtype=torch.int64)
    stepper = dense.CompiledStepper(model, text, tokens, 2)
    assert [block.index for block in model.blocks] == list(range(TINY.layers))
    assert {block.index for block in stepper.blocks} == {0}
    assert stepper.blocks[1].qkv.weight is model.blocks[1].qkv.weight
    plain = dense.DenseStepper(model, text, tokens, 2, sliced=False)
    stepper.layer = dense._layer  # not compiled, which takes long
    for cell in (0, 5):
        stepper.seek(cell), plain.seek(cell)
        assert torch.allclose(stepper.step(), plain.step(), atol=1e-5)
