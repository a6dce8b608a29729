"""Shared prefixes in Triton beyond the conformance cases: features together, equal bits, and what is beyond the capacity."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fi_core.conformance.compare import compare
from fi_core.contract import Case
from fi_core.ops.cases.attention import case
from fi_core.ops.cases.prefixes import Forest, _lengths, _random_forest
from fi_core.prefixes import SharedPrefixes
from fi_core.records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs
from fi_triton.attention.state import TritonAttention

EVERYTHING = frozenset({"soft_cap", "sinks", "alibi", "mask", "lse"})


def forest_case(seed: int, **options) -> Case:
    """Up to five levels over requests of one to five new tokens."""
    forest = _random_forest(seed, 9, 5, 70)
    q_lens = tuple((1, 3, 5, 1, 2)[(seed + request) % 5] for request in range(9))
    return case(f"levels_{seed}", q_lens, _lengths(forest, q_lens, (0, 1, 50)), forest=forest, heads=(6, 2), **options)


def check(made: Case, device: str) -> None:
    trial = made.build(torch.device(device), 0)
    actual, expected = trial.run(TritonAttention()), trial.expected()
    found = {name: compare(actual[name], expected[name], limit) for name, limit in trial.tolerance.items()}
    assert all(item.passed for item in found.values()), found
    again = trial.run(TritonAttention())
    assert all(torch.equal(actual[name].view(torch.uint8), again[name].view(torch.uint8)) for name in actual)


@pytest.mark.parametrize("seed", range(3))
def test_every_feature_over_random_trees(seed, device):
    options = {"features": EVERYTHING, "windows": (None, 60), "dtype": torch.bfloat16}
    check(forest_case(seed, **options, mask="kv", window=60), device)
    check(forest_case(seed, **options, mask="new", window=None, causal=False), device)


def test_fp8_with_scales_of_heads_and_of_a_tensor(device):
    for scale in ("heads", "tensor", "float"):
        check(
            forest_case(7, kv_format="fp8_e4m3", dtype=torch.bfloat16, scale=scale, page_size=5, kv_layout="HND"),
            device,
        )


def shared_batch(device: str) -> tuple[torch.Tensor, KVCache, Batch]:
    """Four requests of 40 tokens; all share 16, the first two 32."""
    generator = torch.Generator().manual_seed(3)
    k, v, q = (torch.randn(shape, generator=generator).to(device) for shape in ((12, 16, 2, 64),) * 2 + ((4, 4, 64),))
    table = torch.tensor([[0, 1, 4], [0, 1, 5], [0, 2, 6], [0, 3, 7]], dtype=torch.int32, device=device)
    nodes = torch.tensor([[0, 4, 0, 16], [0, 2, 16, 32]], dtype=torch.int32, device=device)
    indptr = torch.arange(5, dtype=torch.int32, device=device)
    lens = torch.full((4,), 40, dtype=torch.int32, device=device)
    return q, KVCache(k, v), Batch(indptr, lens, table, levels=SharedPrefixes(nodes))


@pytest.mark.parametrize("depth", [1, 2])
def test_levels_come_and_go_and_those_beyond_the_depth_spoil_nothing_else(depth, device):
    q, kv, batch = shared_batch(device)
    spec = AttentionSpec(4, 2, 64, dtype=torch.float32)
    layer = LayerArgs().resolve(spec)
    plain = TritonAttention().plan(spec, Capacity(4, 4, 1, 40), device)
    shared = TritonAttention().plan(spec, Capacity(4, 4, 1, 40, 3, depth), device)
    expected, out = torch.empty_like(q), torch.empty_like(q)
    plain.update(replace(batch, levels=None))
    plain.run(q, kv, layer, expected, None)
    for given in (batch, replace(batch, levels=None), batch):
        shared.update(given)
        out.fill_(math.nan)
        shared.run(q, kv, layer, out, None)
        # Requests in more nodes than the plan's depth lose work, and nothing is written past the buffers.
        sound = slice(2, 4) if depth == 1 and given.levels is not None else slice(0, 4)
        torch.testing.assert_close(out[sound], expected[sound], rtol=1e-5, atol=1e-6)
    assert any("shared prefixes: up to 3" in line for line in shared.describe())
    assert not any("shared prefixes" in line for line in plain.describe())


def test_workspace_is_known_before():
    spec = AttentionSpec(8, 2, 64)
    capacity = Capacity(16, 64, 8, 512, 15, 3)
    kernel = TritonAttention()
    state = kernel.plan(spec, capacity, "cpu") if not torch.cuda.is_available() else kernel.plan(spec, capacity, "cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert sum(part.numel() for part in state.workspace) == kernel.workspace_bytes(spec, capacity, device)


def test_a_forest_of_no_nodes_is_an_ordinary_batch(device):
    made = case("none", (1, 4), (30, 9), forest=Forest(()), dtype=torch.bfloat16, features={"lse"})
    check(made, device)
