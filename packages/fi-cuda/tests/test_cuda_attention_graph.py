"""One captured step (update and attention of several layers) serves every batch within the capacity, on the GPU."""

from __future__ import annotations

import random
from dataclasses import replace

import fi_core as fi
import pytest
import torch
from fi_cuda.kernels.attention import prefix_state

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SIZE, PAGES, PAGE_SIZE, ENTRIES = 64, 4096, 16, 128
VARIANTS = {
    "decode": ({}, 1),
    "speculative": ({}, 4),
    "one head": ({"num_qo_heads": 8, "num_kv_heads": 1}, 1),
    "windows": ({"windows": (None, 100)}, 1),
    "invariant": ({"batch_invariant": True}, 1),
    "fp8": ({"kv_format": "fp8_e4m3"}, 1),
    "prefill": ({}, 150),
    "prefill windows": ({"windows": (None, 100)}, 40),
    "prefill invariant": ({"batch_invariant": True}, 40),
    "prefill rows": ({"kv_format": "fp8_e4m3"}, 40),
}


class Step:
    """Tensors with fixed addresses, and a step of two layers over them."""

    def __init__(self, changes, max_q_len):
        heads = {"num_qo_heads": 16, "num_kv_heads": 4}
        self.spec = fi.AttentionSpec(**{**heads, "head_dim": 64, "features": {"lse"}, **changes})
        self.max_q_len = max_q_len
        num_tokens = SIZE * max_q_len
        spec = self.spec
        sizes = {
            "max_batch": SIZE,
            "max_q_tokens": num_tokens,
            "max_q_len": max_q_len,
            "max_kv_len": ENTRIES * PAGE_SIZE,
        }
        self.plan = fi.plan(spec, **sizes, device="cuda", backend="cuda")
        wanted = "attention_decode" if max_q_len <= 16 else "attention_prefill"
        assert self.plan.selection.entry.name == wanted
        self.checker = fi.plan(spec, **sizes, device="cuda", backend="reference")
        shape = (PAGES, PAGE_SIZE, spec.num_kv_heads, 64)
        k, v = (torch.randn(shape, device="cuda").to(spec.kv_dtype) for _ in range(2))
        self.kv = fi.KVCache(k, v)
        self.q = torch.randn(num_tokens, spec.num_qo_heads, 64, device="cuda").bfloat16()
        table = torch.zeros(SIZE, ENTRIES, dtype=torch.int32, device="cuda")
        q_indptr = torch.zeros(SIZE + 1, dtype=torch.int32, device="cuda")
        self.batch = fi.Batch(q_indptr, torch.zeros(SIZE, dtype=torch.int32, device="cuda"), table)
        self.layers = [fi.LayerArgs(window=window) for window in spec.windows] * 2
        self.outs = [torch.empty_like(self.q) for _ in self.layers]
        self.lses = [torch.empty(num_tokens, spec.num_qo_heads, device="cuda") for _ in self.layers]

    def fill(self, rng):
        """A random batch of random size, requests past it without tokens; outputs poisoned."""
        size = rng.choice([0, 1, 5, SIZE])
        most = rng.choice([1, 2, self.max_q_len, self.max_q_len]) if self.max_q_len > 1 else 1
        q_lens = [rng.randint(0 if most > 1 else 1, most) for _ in range(size)] + [0] * (SIZE - size)
        longest = rng.choice([1, 50, ENTRIES * PAGE_SIZE])
        kv_lens = [rng.randint(0, longest) for _ in range(size)] + [0] * (SIZE - size)
        self.batch.q_indptr.copy_(torch.tensor([0, *q_lens]).cumsum(0))
        self.batch.kv_lens.copy_(torch.tensor(kv_lens))
        self.batch.table.copy_(torch.randint(0, PAGES, (SIZE, ENTRIES)))
        for tensor in (*self.outs, *self.lses):
            tensor.fill_(torch.nan)

    def run(self, plan):
        plan.update(self.batch)
        for layer, out, lse in zip(self.layers, self.outs, self.lses, strict=True):
            fi.attention(self.q, self.kv, plan, layer, out=out, lse=lse)

    def results(self):
        return [tensor.clone() for tensor in (*self.outs, *self.lses)]


def captured(step, rng):
    """A graph of the step, after a call that makes what it needs."""
    step.fill(rng)
    step.run(step.plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(step.plan)
    return graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_replays_equal_eager_calls_and_the_reference(variant):
    torch.manual_seed(0)
    step = Step(*VARIANTS[variant])
    rng = random.Random(variant)
    graph = captured(step, rng)
    for turn in range(100):
        step.fill(rng)
        poisoned = step.results()
        graph.replay()
        replayed = step.results()
        step.run(step.plan)
        for first, second in zip(replayed, step.results(), strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        if turn % 10 == 0:
            step.run(step.checker)
            num_tokens = int(step.batch.q_indptr[-1])
            for actual, wanted, before in zip(replayed, step.results(), poisoned, strict=True):
                torch.testing.assert_close(
                    actual[:num_tokens].float(), wanted[:num_tokens].float(), rtol=2e-2, atol=2e-2
                )
                rest = actual[num_tokens:], before[num_tokens:]
                assert torch.equal(*(tensor.view(torch.uint8) for tensor in rest))


class SharingStep(Step):
    """The same under a plan with levels: nodes and order have fixed addresses too."""

    NODES, DEPTH = 9, 3

    def __init__(self, max_q_len):
        super().__init__({}, max_q_len)
        levels = fi.SharedPrefixes(*(torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in ((9, 4), SIZE)))
        self.unshared, self.batch = self.batch, replace(self.batch, levels=levels)
        capacity = {
            name: getattr(self.plan.capacity, name) for name in ("max_batch", "max_q_tokens", "max_q_len", "max_kv_len")
        }
        sharing = {"max_prefixes": self.NODES, "max_prefix_depth": self.DEPTH}
        self.plan = fi.plan(self.spec, **capacity, **sharing, device="cuda", backend="cuda")
        assert self.plan.selection.entry.name == "attention_prefix"

    def fill(self, rng):
        """Also groups within groups, whose prefixes end anywhere, in a random order; now and then none."""
        super().fill(rng)
        order = rng.sample(range(SIZE), SIZE)
        q_lens, kv_lens = self.batch.q_indptr.diff().tolist(), self.batch.kv_lens.tolist()
        nodes = []

        before = [kv_len - q_len for kv_len, q_len in zip(kv_lens, q_lens, strict=True)]

        def divide(begin, end, first, depth):
            """Nodes of the places from ``begin`` on that have keys from ``first`` on, longest first."""
            while depth < self.DEPTH and len(nodes) < self.NODES:
                found = sum(before[place] > first for place in order[begin:end])
                if not found:
                    break
                stop = rng.randint(begin + 1, begin + found)
                if rng.random() < 0.8:
                    last = rng.randint(first + 1, before[order[stop - 1]])
                    nodes.append((begin, stop, first, last))
                    pages, members = slice(first // PAGE_SIZE, -(-last // PAGE_SIZE)), torch.tensor(order[begin:stop])
                    self.batch.table[members, pages] = self.batch.table[members[0], pages]
                    divide(begin, stop, last, depth + 1)
                begin = stop

        if rng.random() < 0.9:
            order.sort(key=lambda place: -before[place])
            divide(0, SIZE, 0, 0)
        self.batch.levels.order.copy_(torch.tensor(order))
        self.batch.levels.nodes.copy_(torch.tensor([*nodes, *[(0, 0, 0, 0)] * (self.NODES - len(nodes))]))
        return len(nodes)


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("max_q_len", [1, 4])
def test_levels_change_between_replays(max_q_len, choose, monkeypatch):
    """One graph of planning and attention serves any levels, chosen or as they are given, and waits for nothing."""
    usual = prefix_state.prefix_tuning_for
    monkeypatch.setattr(prefix_state, "prefix_tuning_for", lambda *given: replace(usual(*given), choose=choose))
    torch.manual_seed(0)
    step = SharingStep(max_q_len)
    rng = random.Random(f"{max_q_len} {choose}")
    graph = captured(step, rng)
    num_nodes = 0
    for turn in range(60):
        num_nodes += step.fill(rng)
        graph.replay()
        replayed = step.results()
        step.run(step.plan)
        for first, second in zip(replayed, step.results(), strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        if turn % 10 == 0:
            num_tokens = int(step.batch.q_indptr[-1])
            with_levels, step.batch = step.batch, step.unshared
            step.run(step.checker)
            step.batch = with_levels
            for actual, wanted in zip(replayed, step.results(), strict=True):
                torch.testing.assert_close(
                    actual[:num_tokens].float(), wanted[:num_tokens].float(), rtol=2e-2, atol=2e-2
                )
    assert num_nodes > 50
