"""Prefill with tunings that are not built in, on the GPU: each against the reference."""

from __future__ import annotations

from contextlib import contextmanager

import fi_core as fi
import pytest
import torch
from fi_core.conformance.kit import BoundCase, bound_cases
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry
from fi_cuda.kernels.attention.prefill_tuning import box_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROWS = {
    "consumers": 2,
    "key_stages": 2,
    "query_stages": 1,
    "ping_pong": True,
    "overlap": True,
    "parts": 1,
    "copy_order": "keys ahead",
}
TUNINGS = {
    "rows by two warpgroups": ROWS,
    "keys ahead": {"copy_order": "keys ahead"},
    "in order": {"copy_order": "in order"},
    "apart": {"copy_order": "apart"},
    "whole tiles": {"pieces": 1},
    "three stages of keys": {"key_stages": 3, "query_stages": 1},
    "clusters of two blocks": {"cluster": 2},
}
CASES = (
    "long_page_size",
    "long_ragged",
    "long_interleaved",
    "long_window",
    "_d64",
    "long_padding",
    "capacity_to_spare",
)
DIMS = (64, 96, 128)


class Tuning:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "attention_prefill" else None


@contextmanager
def tuned(given):
    plugin, manager = Tuning(given), registry().manager
    manager.register(plugin)
    try:
        yield
    finally:
        manager.unregister(plugin)


@pytest.mark.parametrize("name", TUNINGS)
def test_cases_of_the_kit(name):
    failed, num_cases = [], 0
    for part in CASES:
        for case in bound_cases("cuda", ["attention"], "cuda", part):
            values = case.case.values if isinstance(case, BoundCase) else {}
            if not isinstance(case, BoundCase) or case.kernel.name != "attention_prefill":
                continue
            if values["head_dim"] not in DIMS or values["kv_format"] not in ("bf16", "fp16"):
                continue
            if "cluster" in TUNINGS[name] and box_tokens(values["page_size"], 128) is not None:
                continue
            with tuned(TUNINGS[name]):
                result = case.result()
            num_cases += 1
            failed += [str(result)] if result.outcome != "passed" else []
    assert num_cases > 10 and not failed, "\n".join(failed)


@pytest.mark.parametrize(("page_size", "cluster"), [(1, 1), (1, 2), (2, 1), (2, 2), (16, 1), (None, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 3000])
def test_pieces_of_long_caches(page_size, cluster, head_dim, window):
    q_lens, kv_lens, size = [130, 20, 1, 300], [6000, 5000, 7000, 300], page_size or 1
    torch.manual_seed(0)
    ragged = page_size is None
    spec = fi.AttentionSpec(
        8, 2, head_dim, page_size=page_size, table="ragged" if ragged else "dense", windows=(window,), features={"lse"}
    )
    counts = [-(-kv_len // size) for kv_len in kv_lens]
    rows = (sum(counts),) if ragged else (sum(counts), size)
    k, v = (torch.randn(*rows, 2, head_dim, device="cuda").bfloat16() for _ in range(2))
    q = torch.randn(sum(q_lens), 8, head_dim, device="cuda").bfloat16()
    indptr = lambda lengths: torch.tensor([0, *lengths], device="cuda").cumsum(0).int()  # noqa: E731
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cuda")
    pages = torch.randperm(sum(counts), device="cuda").int()
    for row, part in zip(table, pages.split(counts), strict=True):
        row[: part.shape[0]] = part
    where = {"kv_indptr": indptr(kv_lens)} if ragged else {"table": table}
    batch = fi.Batch(indptr(q_lens), torch.tensor(kv_lens, dtype=torch.int32, device="cuda"), **where)
    layer = fi.LayerArgs(window=window)
    found = []
    for backend, num_calls in (("reference", 1), ("cuda", 2)):
        with tuned({"cluster": cluster}):
            plan = fi.plan(
                spec, max_batch=4, max_q_tokens=451, max_q_len=300, max_kv_len=7000, device="cuda", backend=backend
            )
        plan.update(batch)
        for _ in range(num_calls):  # the second call finds the counters as the first left them
            out, lse = torch.full_like(q, torch.nan), torch.full((451, 8), torch.nan, device="cuda")
            fi.attention(q, fi.KVCache(k, v), plan, layer, out=out, lse=lse)
            found.append((out.float(), lse))
    for out, lse in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, found[0][1], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[1][0], found[2][0])
