"""The bundled model as it is used: a caption in, eight ranked pictures out."""

from __future__ import annotations

import pytest
import torch

from bench.conftest import Measure
from bench.device import ON_GPU
from dalle_fast.pipeline import DEMO, Pipeline
from dalle_fast.sampling import SamplingSettings

TITLE = "The bundled model: 8 pictures of a caption, decoded and ranked by CLIP"
CAPTION = "a red circle above a blue square"


TYPES = ("int8", "bfloat16", "int4", "float32") if not ON_GPU else ("bfloat16",)


@pytest.mark.parametrize("dtype", [TYPES[0], *(pytest.param(t, marks=pytest.mark.importance(2)) for t in TYPES[1:])])
def test_bundled_model(dtype: str, measure: Measure) -> None:
    backend = "cpu backend" if not ON_GPU else "CUDA graph"
    measure.describe(TITLE, "8 pictures", f"dalle_fast, {backend}", dtype, batch=8)
    if not (DEMO / "model.safetensors").exists():
        pytest.skip("the bundled model is not in this checkout")
    if measure.small and dtype != TYPES[0]:
        pytest.skip("one type is enough to see that it runs")
    pipeline = Pipeline.load(dtype=dtype)
    settings = SamplingSettings(seed=1)
    n = 1 if measure.small else 8

    def run() -> None:
        ranked = pipeline.rank(list(pipeline.sample(CAPTION, n, settings)))
        scores = [picture.score for picture in ranked]
        assert len(ranked) == n and scores == sorted(scores, key=lambda x: -(x or 0.0))

    first = next(iter(pipeline.sample(CAPTION, 1, settings)))  # its tokens must be as likely as the plain model says
    log_p, _ = pipeline.score(first.tokens, CAPTION)
    pipeline.rank([first])
    got, want = torch.tensor([first.log_likelihood]), torch.tensor([log_p])
    measure.check(got, want, {"float32": 1e-3, "bfloat16": 0.02, "int8": 0.02, "int4": 0.15}[dtype])
    measure(run, passes=1 if measure.small else 2, warmup=0)  # what it needs was loaded above
