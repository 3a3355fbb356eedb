"""What a candidate adds to memory. Counted from the shapes of a real cache, nothing is allocated."""

from __future__ import annotations

import pytest
import torch

from bench import work
from bench.conftest import Measure
from dalle_fast.cache import Cache
from dalle_fast.config import ModelConfig

MODELS = {"openai-12b": "12B", "rudalle-malevich": "1.3B", "demo": "bundled"}


@pytest.mark.importance(2)
@pytest.mark.parametrize("dense", [False, True], ids=["tail", "dense"])
@pytest.mark.parametrize("preset", MODELS)
def test_memory(preset: str, dense: bool, measure: Measure) -> None:
    config = ModelConfig.preset(preset)
    contender = "dense cache, text included" if dense else "dalle_fast, tails beside a shared prefix"
    measure.describe("Memory of a candidate", MODELS[preset], contender, "bfloat16", preset=preset)
    cache = Cache(config, 1, 1, dtype=torch.bfloat16, device="meta")
    ours, whole = work.tail_bytes(config)
    assert ours == cache.tail_nbytes(), f"got {cache.tail_nbytes()} bytes, expected {ours}"
    assert cache.nbytes() - ours < whole, "the prefix alone must be less than a dense cache"
    measure.hold(whole if dense else ours)
