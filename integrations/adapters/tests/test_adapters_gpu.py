"""On a GPU: what the engines count on when they capture a step, with plans and draws as the adapters make them."""

import fi_core as fi
import pytest
import torch
from fi_adapters.draws import draw, fresh_keys
from fi_adapters.forms import LayerForm, Limits
from fi_adapters.plans import PlanPair, update

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 16
FORM = LayerForm(HEADS, KV_HEADS, DIM, "bf16")
LIMITS = Limits(max_batch=8, max_tokens=256, max_kv_len=512)


class Engine:
    """Buffers as an engine keeps them: addresses stay, contents change."""

    def __init__(self, num_rows):
        self.pairs = {FORM: PlanPair(FORM.spec(torch.bfloat16, PAGE), LIMITS, torch.device("cuda", 0))}
        self.memory = torch.randn(300, 2, PAGE, KV_HEADS, DIM, device="cuda").bfloat16()
        self.cache = fi.KVCache(self.memory[:, 0], self.memory[:, 1])
        self.q, self.out = (torch.randn(num_rows, HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
        self.k, self.v = (torch.randn(num_rows, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2))

    def set(self, q_lens, kv_lens):
        """A batch of these lengths in the engine's buffers (made by the first call)."""
        starts = torch.tensor([0, *q_lens]).cumsum(0)
        pages = torch.randperm(299)[: 32 * len(kv_lens)].view(len(kv_lens), 32) + 1
        slots = []
        for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
            places = torch.arange(kv_len - q_len, kv_len)
            slots.append(pages[row, places // PAGE] * PAGE + places % PAGE)
        values = (starts.int(), torch.tensor(kv_lens).int(), pages.int(), torch.cat(slots))
        if not hasattr(self, "batch"):
            indptr, lengths, table, mapping = (value.cuda() for value in values)
            self.batch = fi.Batch(indptr, lengths, table=table, slot_mapping=mapping)
        names = ("q_indptr", "kv_lens", "table", "slot_mapping")
        for name, value in zip(names, values, strict=True):
            getattr(self.batch, name).copy_(value)

    def plan(self, longest):
        return update(self.pairs, self.batch, longest)[FORM]

    def layer(self, plan):
        fi.append_kv(self.k, self.v, self.cache, self.batch)
        fi.attention(self.q, self.cache, plan, out=self.out)

    def check(self):
        """The output against softmax over gathered keys in float64."""
        starts = self.batch.q_indptr.tolist()
        for row, kv_len in enumerate(self.batch.kv_lens.tolist()):
            pages = self.batch.table[row].long()
            keys, values = (self.memory[pages, part].flatten(0, 1)[:kv_len].double() for part in (0, 1))
            keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
            num_new = starts[row + 1] - starts[row]
            for token in range(num_new):
                seen = kv_len - num_new + token + 1
                logits = torch.einsum("hd,thd->ht", self.q[starts[row] + token].double(), keys[:seen]) / DIM**0.5
                expected = torch.einsum("ht,thd->hd", logits.softmax(dim=1), values[:seen])
                torch.testing.assert_close(self.out[starts[row] + token].double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("first", "later", "longest"),
    [
        (([1, 1, 1], [9, 40, 500]), ([1, 1, 1], [512, 3, 100]), 1),
        (([5, 1, 30], [20, 40, 500]), ([1, 34, 1], [512, 34, 7]), 64),
    ],
    ids=["decode", "mixed"],
)
def test_one_graph_serves_other_lengths(first, later, longest):
    """Planning before each replay, as vLLM's builders do it."""
    torch.manual_seed(0)
    engine = Engine(sum(first[0]))
    engine.set(*first)
    plan = engine.plan(longest)
    engine.layer(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.layer(plan)
    for lengths in (first, later, first):
        engine.set(*lengths)
        engine.plan(longest)
        engine.out.fill_(torch.nan)
        graph.replay()
        engine.check()


def test_planning_inside_the_graph():
    """As the backend for SGLang does it: nothing but a replay for new lengths."""
    torch.manual_seed(0)
    engine = Engine(3)
    engine.set([1, 1, 1], [9, 40, 500])
    engine.layer(engine.plan(1))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.layer(engine.plan(1))
    for kv_lens in ([9, 40, 500], [512, 1, 77]):
        engine.set([1, 1, 1], kv_lens)
        engine.out.fill_(torch.nan)
        graph.replay()
        engine.check()


def test_a_step_and_a_draw_wait_for_nothing():
    torch.manual_seed(0)
    engine, logits = Engine(3), torch.randn(3, 1000, device="cuda")
    generators = {1: torch.Generator("cuda").manual_seed(5)}
    engine.set([1, 1, 1], [9, 40, 500])

    def step():
        engine.layer(engine.plan(1))
        return draw(logits, fi.FilterParams(), fresh_keys(3, logits.device, generators))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.min() >= 0


def test_a_seeded_draw_takes_of_its_generator_what_vllm_takes_back():
    generator = torch.Generator("cuda").manual_seed(5)
    fresh_keys(4, torch.device("cuda"), {2: generator})
    assert generator.get_offset() == 4
