"""Shared prefixes in the engine on a GPU: replayed steps read them once and answer as steps that do not."""

from __future__ import annotations

from dataclasses import replace

import fi_core as fi
import pytest
import torch
from fi_core.rope import RopeConfig
from fi_engine import Engine, EngineConfig
from fi_engine.random_model import SHAPES, random_model
from fi_sampling import SamplingParams
from fi_scheduler.sharing import ALWAYS

pytestmark = pytest.mark.gpu

COMMON = [(11 * i) % 320 for i in range(64)]
PROMPTS = [COMMON + [n, 3 * n + 1] for n in range(3)]
# All tokens are given, so that rounding cannot lead samples apart, and what is compared are their log-probabilities.
PARAMS = SamplingParams(seed=5, n=3, max_tokens=12, ignore_eos=True, allowed_token_ids=(7,), logprobs=0)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_samples_are_the_same_with_shared_prefixes(backend: str) -> None:
    sizes = {
        "num_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_qo_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
    }
    shape = replace(SHAPES["llama-3.2-1b"], **sizes, vocab_size=320, rope=RopeConfig(64), eos_ids=frozenset())
    model = random_model(shape, torch.device("cuda", 0), torch.bfloat16, 128, lambda line: None)
    limits = {"max_batch": 9, "max_model_len": 128, "num_pages": 100, "sharing_rates": ALWAYS}
    with fi.use(backend=backend):
        outputs = {}
        for shared in (True, False):
            engine = Engine(model, None, EngineConfig(**limits, shared_prefixes=shared))
            outputs[shared] = torch.tensor(
                [
                    [each.chosen for each in sample.logprobs]
                    for output in engine.generate(PROMPTS, PARAMS)
                    for sample in output.outputs
                ]
            )
            keys = {key[2] for key in engine._runner._graphs}
            assert shared in keys and (shared or keys == {False})
            engine.check_integrity()
    assert outputs[True].shape == (9, 12)
    torch.testing.assert_close(outputs[True], outputs[False], rtol=0, atol=0.1)
    # Other keys would be seen: requests differ by more, though they have all but two of 66 tokens in common.
    assert (outputs[False][0] - outputs[False][3]).abs().max() > 0.2


def test_levels_of_a_captured_step_change_between_replays() -> None:
    """Nodes lie on the device: one graph of planning and attention serves any levels, also those that were found in it."""
    device = torch.device("cuda", 0)
    torch.manual_seed(2)
    k, v = (torch.randn(40, 16, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(4, 8, 64, dtype=torch.bfloat16, device=device)
    spec = fi.AttentionSpec(8, 2, 64)
    sizes = {"max_batch": 4, "max_q_tokens": 4, "max_q_len": 1, "max_kv_len": 64, "device": device}
    table = torch.zeros(4, 4, dtype=torch.int32, device=device)
    indptr, lens = torch.arange(5, device=device).int(), torch.full((4,), 60, device=device).int()
    batch = fi.Batch(indptr, lens, table)
    with fi.use(backend="triton"):
        plain, shared = fi.plan(spec, **sizes), fi.plan(spec, **sizes, max_prefixes=3)
        out, expected = torch.empty_like(q), torch.empty_like(q)
        levels = fi.find_shared_prefixes(batch, 16, max_prefixes=3, min_saved_tokens=1)
        with_levels = fi.Batch(indptr, lens, table, levels=levels)
        kv = fi.KVCache(k, v)

        def step() -> None:
            fi.find_shared_prefixes(batch, 16, min_saved_tokens=1, out=levels)
            shared.update(with_levels)
            fi.attention(q, kv, shared, out=out)

        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for prefix in ((1, 2, 3), (4, 5), ()):
            rows = [[*prefix, *range(10 + 4 * row, 14 + 4 * row - len(prefix))] for row in range(4)]
            table.copy_(torch.tensor(rows, dtype=torch.int32))
            out.fill_(float("nan"))
            graph.replay()
            plain.update(batch)
            fi.attention(q, kv, plain, out=expected)
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
            assert int(levels.nodes[0, 3]) == 16 * len(prefix)
