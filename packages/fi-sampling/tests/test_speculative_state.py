"""Speculative verification under the requests' parameters equals plain generation, or follows its distribution."""

import fi_core as fi
import pytest
import torch
from fi_sampling import SamplingParams, SamplingState, pipeline_of, verify_chain, verify_tree

VOCAB_SIZE = 11
PARAMS = [
    SamplingParams(seed=1, temperature=0.0),
    SamplingParams(seed=2, temperature=0.8, top_k=5, top_p=0.9),
    SamplingParams(seed=3, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3, max_tokens=None),
    SamplingParams(seed=4, allowed_token_ids=(0, 2, 4, 6), min_p=0.05),
    SamplingParams(seed=5, min_tokens=5, stop_token_ids=(1, 3), logit_bias={2: 1.0}),
    SamplingParams(seed=6),
]
SLOTS = torch.tensor([4, 0, 5, 1, 3, 2])


def model(context):
    """Logits [V] that depend on every token of a context."""
    seed = hash(tuple(context)) % 2**31
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def new_state():
    state = SamplingState(6, VOCAB_SIZE)
    for slot, params in zip(SLOTS.tolist(), PARAMS, strict=True):
        state.add(slot, params, (1, 2))
    return state


def plain(num_tokens):
    """What each request generates one token at a time."""
    state, texts = new_state(), [[1, 2] for _ in PARAMS]
    for index in range(num_tokens):
        logits = torch.stack([model(text) for text in texts])
        tokens = state.sample(logits, SLOTS, torch.full((6,), 2 + index)).tokens
        state.record(SLOTS, tokens)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
    return texts


def test_chains_reproduce_plain_generation():
    expected, state, texts = plain(12), new_state(), [[1, 2] for _ in PARAMS]
    draw = torch.Generator().manual_seed(3)
    total_accepted = 0
    for _ in range(5):
        drafts = torch.full((6, 3), -1)
        for row, text in enumerate(texts):
            truth = (expected[row] + [0] * 20)[len(text) : len(text) + 3]
            count = int(torch.randint(0, 4, (), generator=draw))
            drafts[row, :count] = torch.tensor(truth[:count], dtype=torch.int64)
            if count and torch.rand((), generator=draw) < 0.4:
                drafts[row, count - 1] = (drafts[row, count - 1] + 1) % VOCAB_SIZE
        contexts = [[text + drafts[row, :step].tolist() for step in range(4)] for row, text in enumerate(texts)]
        logits = torch.stack([torch.stack([model(context) for context in row]) for row in contexts])
        positions = torch.tensor([len(text) for text in texts])
        verdict = verify_chain(state, logits, SLOTS, positions, drafts)
        state.record(SLOTS, verdict.tokens)
        for row, text in enumerate(texts):
            accepted = int(verdict.num_accepted[row])
            assert verdict.tokens[row, :accepted].tolist() == drafts[row, :accepted].tolist()
            assert verdict.tokens[row, accepted + 1 :].eq(-1).all()
            text += verdict.tokens[row, : accepted + 1].tolist()
            total_accepted += accepted
    assert total_accepted > 20
    for text, reference in zip(texts, expected, strict=True):
        length = min(len(text), len(reference))
        assert text[:length] == reference[:length]


def test_trees_reproduce_plain_generation():
    expected, state, texts = plain(12), new_state(), [[1, 2] for _ in PARAMS]
    # Nodes 0 and 1 below the root, 2 and 3 below 1, 4 below 3, 5 below 0, 6 padding; stored in a shuffled order.
    shape = [-1, -1, 1, 1, 3, 0, 5]
    order = torch.tensor([4, 0, 6, 3, 5, 2, 1])
    place = order.argsort()
    parents = torch.tensor(
        [-1 if shape[node] < 0 else int(place[shape[node]]) for node in order.tolist()], dtype=torch.int32
    )
    total_accepted = 0
    for turn in range(4):
        drafts = torch.zeros(6, 7, dtype=torch.int64)
        for row, text in enumerate(texts):
            truth = (expected[row] + [0] * 20)[len(text) : len(text) + 3]
            other = [(token + 1 + turn) % VOCAB_SIZE for token in truth]
            nodes = [other[0], truth[0], other[1], truth[1], truth[2], truth[1], -1]
            drafts[row] = torch.tensor(nodes)[order]
        logits = torch.empty(6, 8, VOCAB_SIZE)
        for row, text in enumerate(texts):
            logits[row, 0] = model(text)
            for node in range(7):
                path, above = [], node
                while above >= 0:
                    path.append(int(drafts[row, above]))
                    above = int(parents[above])
                logits[row, node + 1] = model(text + path[::-1])
        positions = torch.tensor([len(text) for text in texts])
        verdict = verify_tree(state, logits, SLOTS, positions, drafts, parents.expand(6, -1).contiguous())
        state.record(SLOTS, verdict.tokens)
        for row, text in enumerate(texts):
            accepted = int(verdict.num_accepted[row])
            path = verdict.path[row, :accepted].tolist()
            assert drafts[row, path].tolist() == verdict.tokens[row, :accepted].tolist()
            assert verdict.path[row, accepted:].eq(-1).all() and verdict.tokens[row, accepted + 1 :].eq(-1).all()
            text += verdict.tokens[row, : accepted + 1].tolist()
            total_accepted += accepted
    assert total_accepted > 20
    for text, reference in zip(texts, expected, strict=True):
        length = min(len(text), len(reference))
        assert text[:length] == reference[:length]


@pytest.mark.parametrize("seed", range(4))
def test_trees_agree_with_the_operation(seed):
    generator = torch.Generator().manual_seed(seed)
    num_requests, num_draft, vocab_size = 40, 10, 4
    state = SamplingState(num_requests, vocab_size)
    for slot in range(num_requests):
        state.add(slot, SamplingParams(seed=slot), ())
    parents = torch.stack(
        [torch.randint(-1, max(i, 1), (num_requests,), generator=generator) for i in range(num_draft)], 1
    )
    parents[:, 0] = torch.where(torch.arange(num_requests) % 3 == 0, num_draft - 1, -1)  # some are cycles
    parents[::4, 3], parents[1::4, 4] = num_draft + 3, -2  # and some are no nodes
    drafts = torch.randint(-1, vocab_size, (num_requests, num_draft), generator=generator)
    logits = torch.randn(num_requests, num_draft + 1, vocab_size, generator=generator)
    slots, positions = torch.arange(num_requests), torch.full((num_requests,), 4)
    verdict = verify_tree(state, logits, slots, positions, drafts, parents.to(torch.int32))
    keys = fi.DrawKeys(torch.arange(num_requests), torch.zeros(num_requests, dtype=torch.int32), positions)
    tokens, path, accepted = fi.verify_tree(drafts, parents.to(torch.int32), logits.softmax(2), keys)
    assert torch.equal(verdict.tokens, tokens) and torch.equal(verdict.path, path)
    assert torch.equal(verdict.num_accepted, accepted) and accepted.max() > 1


def test_chains_with_draft_probs_follow_the_filtered_target():
    num_requests, vocab_size = 20000, 6
    logits = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(1))
    draft = torch.randn(vocab_size, generator=torch.Generator().manual_seed(2)).softmax(0)
    params = SamplingParams(temperature=0.7, top_k=4, seed=8)
    state = SamplingState(1, vocab_size)
    state.add(0, params, ())
    slots, positions = torch.zeros(num_requests, dtype=torch.int64), torch.arange(num_requests)
    keys = state.step(slots, positions).row_keys
    drafted = fi.sample(draft.log().expand(num_requests, -1).contiguous(), fi.FilterParams(), keys).unsqueeze(1)
    verdict = verify_chain(
        state,
        logits.expand(num_requests, 2, -1).contiguous(),
        slots,
        positions,
        drafted,
        draft.expand(num_requests, 1, -1).contiguous(),
    )
    scaled = logits[0].double() / 0.7
    kept = scaled.topk(4).indices
    target = torch.zeros(vocab_size, dtype=torch.float64).index_copy(0, kept, scaled[kept].softmax(0))
    counts = verdict.tokens[:, 0].bincount(minlength=vocab_size)
    assert counts[target == 0].sum() == 0
    expected = target[kept] * num_requests
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom: p is about 1e-5
    overlap = torch.minimum(target, draft.double()).sum().item()
    assert abs(verdict.num_accepted.double().mean().item() - overlap) < 0.02


def test_bad_arguments_are_named():
    state = new_state()
    logits, drafts = torch.zeros(6, 3, VOCAB_SIZE), torch.zeros(6, 2, dtype=torch.int64)
    calls = {
        "draft_tokens": lambda: verify_chain(state, logits, SLOTS, SLOTS, drafts.int()),
        "logits": lambda: verify_chain(state, logits[:, :2], SLOTS, SLOTS, drafts),
        "parents": lambda: verify_tree(state, logits, SLOTS, SLOTS, drafts, drafts),
    }
    for argument, call in calls.items():
        with pytest.raises(fi.ArgumentError) as caught:
            call()
        assert caught.value.argument == argument
    own = SamplingState(6, VOCAB_SIZE, pipeline=pipeline_of(["softmax", "draw_probs"]))
    with pytest.raises(fi.ArgumentError, match=r"^state\.pipeline:"):
        verify_chain(own, logits, SLOTS, SLOTS, drafts, torch.zeros(6, 2, VOCAB_SIZE))
