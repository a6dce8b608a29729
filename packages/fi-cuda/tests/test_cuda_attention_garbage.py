"""Lengths that no plan allows, on the GPU: attention ends, writes nothing, and the next legal batch is right."""

from __future__ import annotations

import random

import fi_core as fi
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SIZE, PAGE_SIZE, ENTRIES = 32, 16, 256
SENTINEL = 7.0


def garbage(rng: random.Random) -> tuple[list[int], list[int]]:
    """q_indptr and kv_lens of which at least one value is beyond the capacity."""
    q_indptr = list(range(SIZE + 1))
    kv_lens = [rng.randint(0, ENTRIES * PAGE_SIZE) for _ in range(SIZE)]
    values = [-1, -(2**31), 2**31 - 1, 2**30, ENTRIES * PAGE_SIZE + 1, rng.randint(-(2**31), -1)]
    kind = rng.choice(["q", "kv", "all"])
    if kind == "all":
        q_indptr = [rng.randint(-(2**31), 2**31 - 1) for _ in q_indptr]
        kv_lens = [rng.randint(-(2**31), 2**31 - 1) for _ in kv_lens]
    elif kind == "q":
        q_indptr[rng.randrange(SIZE + 1)] = rng.choice(values)
    else:
        kv_lens[rng.randrange(SIZE)] = rng.choice(values)
    return q_indptr, kv_lens


@pytest.mark.parametrize("max_q_len", [1, SIZE])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_garbage_lengths_end_and_leave_the_plan_whole(num_kv_heads, batch_invariant, max_q_len):
    spec = fi.AttentionSpec(8, num_kv_heads, 64, batch_invariant=batch_invariant)
    sizes = {"max_batch": SIZE, "max_q_tokens": SIZE, "max_q_len": max_q_len, "max_kv_len": ENTRIES * PAGE_SIZE}
    plan = fi.plan(spec, **sizes, device="cuda", backend="cuda")
    checker = fi.plan(spec, **sizes, device="cuda", backend="reference")
    shape = (SIZE * ENTRIES, PAGE_SIZE, num_kv_heads, 64)
    kv = fi.KVCache(*(torch.randn(shape, device="cuda").bfloat16() for _ in range(2)))
    q = torch.randn(SIZE, 8, 64, device="cuda").bfloat16()
    table = torch.randperm(SIZE * ENTRIES, device="cuda").int().view(SIZE, ENTRIES)
    q_indptr = torch.arange(SIZE + 1, dtype=torch.int32, device="cuda")
    kv_lens = torch.full((SIZE,), ENTRIES * PAGE_SIZE, dtype=torch.int32, device="cuda")
    batch = fi.Batch(q_indptr, kv_lens, table)
    legal = q_indptr.clone(), kv_lens.clone()
    out = torch.full_like(q, SENTINEL)
    finished = torch.cuda.Event()
    rng = random.Random(num_kv_heads)
    for _ in range(50):
        for tensor, values in zip((q_indptr, kv_lens), garbage(rng), strict=True):
            tensor.copy_(torch.tensor(values, dtype=torch.int32))
        plan.update(batch)
        fi.attention(q, kv, plan, out=out)
    finished.record()
    finished.synchronize()
    assert (out == SENTINEL).all()
    for tensor, values in zip((q_indptr, kv_lens), legal, strict=True):
        tensor.copy_(values)
    # The record seen before, and one of other tensors.
    for given in (batch, fi.Batch(q_indptr.clone(), kv_lens // 2, table.flip(0).contiguous())):
        plan.update(given)
        checker.update(given)
        fi.attention(q, kv, plan, out=out)
        torch.testing.assert_close(out, fi.attention(q, kv, checker), atol=2e-2, rtol=2e-2)
