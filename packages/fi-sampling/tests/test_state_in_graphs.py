"""A step's sampling and its record captured once in a CUDA graph: requests come and go between replays, a user's processor
included, and every token is the one that the reference draws on a CPU."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_sampling import DEFAULT_OPS, Pipeline, SamplingParams, SamplingState, logits_op

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

CAPACITY, VOCAB = 4, 1000
PARAMS = [
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, frequency_penalty=0.5, presence_penalty=0.25),
    SamplingParams(top_k=20, seed=2, repetition_penalty=1.5, logit_bias={7: 5.0, 9: -3.0}),
    SamplingParams(temperature=0.0, seed=3, repetition_penalty=1.2, top_p=0.5),
    SamplingParams(top_k=5, top_p=0.7, seed=4, presence_penalty=-0.5, temperature=1.3),
    SamplingParams(seed=5, logit_bias={11: 8.0}, frequency_penalty=1.0),
]


@logits_op("shift")
def shift(logits, step):
    return logits + torch.where(torch.arange(logits.shape[1], device=logits.device) % 3 == 0, 0.5, 0.0)


def state_on(device, user):
    state = SamplingState(CAPACITY, VOCAB, device=device, pipeline=Pipeline([shift, *DEFAULT_OPS]) if user else None)
    for slot in range(CAPACITY):
        state.add(slot, PARAMS[slot], prompt_ids=[slot, 20 + slot, 33])
    return state


def changes(state, turn):
    """Between steps: a request goes and another comes into its slot, whose features others in flight have too."""
    if turn == 3:
        state.remove(2)
        state.add(2, PARAMS[4], prompt_ids=[5, 6])


@pytest.mark.parametrize("user", [False, True])
def test_one_graph_serves_requests_that_come_and_go(user):
    ours, reference = state_on("cuda", user), state_on("cpu", user)
    generator = torch.Generator().manual_seed(1)
    logits = torch.empty((CAPACITY, VOCAB), device="cuda")
    slots, positions = (torch.zeros(CAPACITY, dtype=torch.int64, device="cuda") for _ in range(2))

    def step():
        tokens = ours.sample(logits, slots, positions).tokens
        ours.record(slots, tokens)
        return tokens

    if not user:
        assert len(ours.explain().splitlines()) == 2  # one launch draws, one records
    slots.fill_(-1)
    step()  # everything is compiled; padding rows leave no trace
    torch.cuda.synchronize()
    signature, graph = ours.signature, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    for turn in range(8):
        changes(ours, turn)
        changes(reference, turn)
        assert ours.signature == signature
        rows = torch.randperm(CAPACITY, generator=generator)
        rows[turn % CAPACITY] = -1
        given = 3 * torch.randn((CAPACITY, VOCAB), generator=generator)
        logits.copy_(given)
        slots.copy_(rows)
        positions.fill_(turn)
        tokens.fill_(-77)
        graph.replay()
        with fi.use(backend="reference"):
            expected = reference.sample(given, rows, torch.full_like(rows, turn)).tokens
            reference.record(rows, expected)
        assert tokens.tolist() == expected.tolist(), turn
    assert torch.equal(ours.columns.history.num_output.cpu(), reference.columns.history.num_output)
