"""The bundled model as it is used: a caption in, eight ranked pictures out."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench.conftest import Measure
from bench.device import ON_GPU, clock
from dalle_fast.pipeline import DEMO, Pipeline
from dalle_fast.sampling import SamplingSettings

TITLE = "The bundled model: 8 pictures of a caption, decoded and ranked by CLIP"
CAPTION = "a red circle above a blue square"


TYPES = ("int8", "bfloat16", "int4", "float32") if not ON_GPU else ("bfloat16",)


class Drawing:
    """Draws and ranks pictures of the caption. Called, it returns the seconds that took, the only entry."""

    def __init__(self, dtype: str, n: int) -> None:
        self.pipeline, self.n = Pipeline.load(dtype=dtype), n

    def __call__(self) -> list[float]:
        start = clock()
        ranked = self.pipeline.rank(list(self.pipeline.sample(CAPTION, self.n, SamplingSettings(seed=1))))
        scores = [picture.score for picture in ranked]
        assert len(ranked) == self.n and scores == sorted(scores, key=lambda x: -(x or 0.0))
        return [clock() - start]


beside = lru_cache(maxsize=1)(Drawing)  # in bfloat16; the other types are measured in turns with it


@pytest.mark.parametrize("dtype", [TYPES[0], *(pytest.param(t, marks=pytest.mark.importance(2)) for t in TYPES[1:])])
def test_bundled_model(dtype: str, measure: Measure) -> None:
    backend = "cpu backend" if not ON_GPU else "CUDA graph"
    measure.describe(TITLE, "8 pictures", f"dalle_fast, {backend}", dtype, batch=8)
    if not (DEMO / "model.safetensors").exists():
        pytest.skip("the bundled model is not in this checkout")
    if measure.small and dtype != TYPES[0]:
        pytest.skip("one type is enough to see that it runs")
    drawing = Drawing(dtype, 1 if measure.small else 8)
    pipeline = drawing.pipeline
    first = next(iter(pipeline.sample(CAPTION, 1, SamplingSettings(seed=1))))
    log_p, _ = pipeline.score(first.tokens, CAPTION)  # its tokens must be as likely as the plain model says
    pipeline.rank([first])
    got, want = torch.tensor([first.log_likelihood]), torch.tensor([log_p])
    measure.check(got, want, {"float32": 1e-3, "bfloat16": 0.02, "int8": 0.02, "int4": 0.15}[dtype])
    against = None if dtype == "bfloat16" else beside("bfloat16", drawing.n)
    if against is None:
        measure.facts["ratio"] = 1.0
    # What it needs was loaded above.
    measure(drawing, passes=1 if measure.small else 2, warmup=0, against=against)
