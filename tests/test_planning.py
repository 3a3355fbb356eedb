"""Memory planning is arithmetic: nothing is allocated."""

import logging

import pytest
import torch

from dalle_fast.config import ModelConfig
from dalle_fast.planning import even_waves, halving, plan_memory

BIG = ModelConfig.preset("openai-12b")


def test_twelve_billion_in_bfloat16_on_80_gb():
    plan = plan_memory(BIG, 80 * 10**9)
    assert plan.candidates >= 170
    assert plan.total(plan.candidates) <= 80 * 10**9 < plan.total(plan.candidates + 1)


def test_what_changes_the_plan():
    free = 80 * 10**9
    plan = plan_memory(BIG, free)
    assert plan_memory(BIG, free - plan.weights, weights_loaded=True).candidates == plan.candidates
    guided = plan_memory(BIG, free, guided=True).candidates
    assert guided < plan.candidates <= 2 * guided + 2
    assert plan_memory(BIG, free, chunk=32).candidates < plan.candidates
    assert plan_memory(BIG, free, dtype=torch.float32).candidates < plan.candidates // 2
    assert plan_memory(BIG, plan.weights).candidates == 0
    assert plan_memory(BIG, free, fp8_tails=True).candidates > 1.7 * plan.candidates


@pytest.mark.parametrize(("n", "most"), [(512, 171), (512, 512), (1, 9), (7, 2), (10, 3)])
def test_even_waves(n, most):
    waves = even_waves(n, most)
    assert sum(waves) == n and max(waves) <= most and max(waves) - min(waves) <= 1 and len(waves) == -(-n // most)


def test_no_candidates():
    with pytest.raises(ValueError, match="got 4 candidates in waves of at most 0"):
        even_waves(4, 0)


def test_out_of_memory_halves_the_wave_says_so_and_goes_on(caplog):
    def run(first, size, most):
        assert size <= most
        if most > 3:
            raise torch.OutOfMemoryError("no room")
        return list(range(first, first + size))

    with caplog.at_level(logging.WARNING):
        waves = list(halving(20, 8, run))
    assert [i for wave in waves for i in wave] == list(range(20))
    assert "a wave of 8 candidates ran out of memory, going on with 4: no room" in caplog.text
    assert [len(wave) for wave in waves] == [2] * 10


def test_a_single_candidate_that_does_not_fit_raises():
    def run(first, size, most):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        list(halving(5, 4, run))
