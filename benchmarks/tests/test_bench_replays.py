"""Replays of a captured step equal eager steps bit for bit (gpu_check.py runs 10,000 of them), and updates never wait."""

from __future__ import annotations

import pytest
import replays
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(params=replays.VARIANTS)
def step(request):
    torch.manual_seed(1)
    return replays.Step(replays.VARIANTS[request.param], torch.device("cuda", 0))


def test_replays_of_random_batches_equal_eager_steps(step):
    assert replays.num_differing(step, 200) == 0


def test_an_update_neither_copies_to_the_host_nor_waits(step):
    assert replays.waits_of_an_update(step) == []


def test_a_difference_of_one_bit_is_found(step):
    results, other = step.outputs(), step.outputs()
    assert not results.differs(other)
    other.out.view(torch.int16)[-1, -1, -1, -1] ^= 1
    assert results.differs(other)


def test_steps_agree_with_the_reference(step):
    plan, checker = step.plan("cuda"), step.plan("reference")
    for _ in range(3):
        step.draw()
        results, expected = step.outputs(), step.outputs()
        step.run(plan, results)
        step.run(checker, expected)
        torch.testing.assert_close(results.out, expected.out, rtol=2e-2, atol=2e-2, equal_nan=True)
