"""Attention gives equal bits for equal inputs and plan: every case of the kit, run again and again on the GPU."""

from __future__ import annotations

from contextlib import contextmanager

import fi_core as fi
import pytest
import torch
from fi_core.conformance.kit import BoundCase, bound_cases
from fi_core.hookspecs import hookimpl
from fi_core.records import AttentionSpec, Batch, KVCache
from fi_core.registry import registry, use

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

KERNELS = sorted(entry.name for entry in registry().kernels("attention") if entry.backend == "cuda")
TIMES = 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_repeats_its_bits(kernel):
    changed, num_cases = [], 0
    for bound in bound_cases("cuda", ["attention"], "cuda"):
        if not isinstance(bound, BoundCase) or bound.kernel.name != kernel:
            continue
        implementation = registry().implementation(bound.kernel)
        trial = bound.case.build(bound.device, bound.seed)
        first, *others = (trial.run(implementation) for _ in range(TIMES))
        num_cases += 1
        for found in others:
            changed += [
                f"{bound.name}: {name}"
                for name, tensor in first.items()
                if not torch.equal(tensor.contiguous().view(torch.uint8), found[name].contiguous().view(torch.uint8))
            ]
    assert num_cases > 0 and not changed, "\n".join(changed)


@contextmanager
def prefill_tuned(**given):
    """Prefill plans made inside have these parameters."""

    class Plugin:
        @hookimpl
        def fi_tuning(self, op):
            return given if op == "attention_prefill" else None

    plugin, manager = Plugin(), registry().manager
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)


# Which tiles read the copy that one left, and which gather for themselves, differs from run to run.
@pytest.mark.parametrize("lens", [[512] * 32, [700, 1300, 33, 1, 2000, 390, 4000]])
def test_dense_copies_change_no_bit(lens):
    torch.manual_seed(0)
    device, num_pages = torch.device("cuda"), sum(lens)
    k, v = (torch.randn(num_pages, 1, 8, 128, device=device).bfloat16() for _ in range(2))
    q = torch.randn(num_pages, 32, 128, device=device).bfloat16()
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    indptr = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    batch = Batch(indptr, lengths, torch.randperm(num_pages, device=device, dtype=torch.int32), table_indptr=indptr)
    spec = AttentionSpec(32, 8, 128, page_size=1, table="indptr")
    capacities = {"max_q_tokens": num_pages, "max_q_len": max(lens), "max_kv_len": max(lens)}
    outputs = []
    for dense_tiles, times in ((0, 1), (8, 20)):
        with prefill_tuned(dense_tiles=dense_tiles), use(backend="cuda"):
            plan = fi.plan(spec, max_batch=len(lens), **capacities, device=device)
            plan.update(batch)
            outputs += [fi.attention(q, KVCache(k, v), plan).clone() for _ in range(times)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
