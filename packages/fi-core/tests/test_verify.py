"""Speculative verification: equal to plain sampling token for token, or distributed like the target."""

import fi_core as fi
import pytest
import torch
from fi_core.random import random_bits
from fi_core.reference.sampling.masses import Weights


def keys_of(num_rows, position=10):
    return fi.DrawKeys(
        torch.arange(num_rows) + 100,
        torch.zeros(num_rows, dtype=torch.int32),
        torch.full((num_rows,), position, dtype=torch.int64),
    )


def at_step(keys, step):
    return fi.DrawKeys(keys.seed, keys.sample, keys.position + step)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def weights_of(logits):
    """Unnormalised target probabilities whose masses are those of ``sample``."""
    flat = logits.flatten(0, -2)
    return Weights.of(flat, None).weight.view(logits.shape)


def test_chain_without_draft_probs_equals_plain_sampling():
    num_requests, num_draft, vocab_size = 40, 4, 31
    logits = noise(num_requests, num_draft + 1, vocab_size)
    keys = keys_of(num_requests)
    plain = torch.stack([fi.sample(logits[:, i], fi.FilterParams(), at_step(keys, i)) for i in range(num_draft + 1)], 1)
    drafts = plain[:, :num_draft].clone()
    for row in range(num_requests):
        wrong = row % (num_draft + 2)
        if wrong < num_draft:
            drafts[row, wrong] = (drafts[row, wrong] + 1) % vocab_size if row % 3 else -1
    tokens, num_accepted = fi.verify_chain(drafts, None, weights_of(logits), keys)
    for row in range(num_requests):
        accepted = min(row % (num_draft + 2), num_draft)
        assert int(num_accepted[row]) == accepted
        assert tokens[row].tolist() == plain[row, : accepted + 1].tolist() + [-1] * (num_draft - accepted)


def plain_chain(drafts, draft_probs, target_probs, keys):
    """Rejection sampling row by row in Python integers."""
    vocab_size = target_probs.shape[-1]
    all_tokens, all_accepted = [], []
    for row in range(drafts.shape[0]):
        tokens = []
        for step in range(drafts.shape[1] + 1):
            p = [int(x * 2**32) for x in target_probs[row, step].tolist()]
            drafted = int(drafts[row, step]) if step < drafts.shape[1] else -1
            number = []
            for purpose in (1, 2):
                hi, lo = random_bits(keys, purpose, step)
                number.append((int(hi[row]) << 31) + int(lo[row]))
            mass = p
            if 0 <= drafted < vocab_size:
                q = [int(x * 2**32) for x in draft_probs[row, step].tolist()]
                if number[0] * q[drafted] < p[drafted] << 62:
                    tokens.append(drafted)
                    continue
                residual = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
                mass = residual if sum(residual) else p
            target, token = number[1] * sum(mass) >> 62, -1
            for index in range(vocab_size):
                target -= mass[index]
                if target < 0:
                    token = index
                    break
            all_accepted.append(len(tokens))
            tokens.append(token)
            break
        all_tokens.append(tokens + [-1] * (drafts.shape[1] + 1 - len(tokens)))
    return all_tokens, all_accepted


def test_chain_with_draft_probs_agrees_with_integers():
    num_requests, num_draft, vocab_size = 60, 3, 12
    target = noise(num_requests, num_draft + 1, vocab_size, seed=1).softmax(-1)
    draft = (noise(num_requests, num_draft, vocab_size, seed=2) + 2 * target[:, :-1].log()).softmax(-1)
    drafts = draft.argmax(-1)
    drafts[::7, 1] = -1
    drafts[3, 0] = vocab_size
    draft[10:20] = target[10:20, :-1]
    target[4] = torch.nan
    target[5, 1] = 0
    target[7, 0, (drafts[7, 0] + 1) % vocab_size] = torch.nan  # beside a token that is accepted by its own probability
    draft[7, 0, drafts[7, 0]] = 0
    target[6] = torch.eye(vocab_size)[[*drafts[6].tolist(), 2]]
    keys = keys_of(num_requests)
    tokens, num_accepted = fi.verify_chain(drafts, draft, target, keys)
    usable = torch.nan_to_num(target)
    expected_tokens, expected_accepted = plain_chain(drafts, draft, usable, keys)
    assert tokens.tolist() == expected_tokens
    assert num_accepted.tolist() == expected_accepted
    assert tokens[4, 0] == -1 and tokens[7, 0] == drafts[7, 0] and len(set(expected_accepted)) > 2


def test_chain_with_draft_probs_follows_the_target():
    num_requests, vocab_size = 60000, 8
    target = noise(2, vocab_size, seed=3).softmax(-1)
    draft = noise(1, vocab_size, seed=4).softmax(-1)
    keys = keys_of(num_requests)
    drafted = fi.sample(draft.log(), fi.FilterParams(), keys, rows=torch.zeros(num_requests, dtype=torch.int32))
    tokens, num_accepted = fi.verify_chain(
        drafted.unsqueeze(1),
        draft.expand(num_requests, 1, -1).contiguous(),
        target.expand(num_requests, 2, -1).contiguous(),
        keys,
    )
    counts = tokens[:, 0].bincount(minlength=vocab_size).double()
    expected = target[0].double() * num_requests
    assert ((counts - expected) ** 2 / expected).sum() < 35  # 7 degrees of freedom: p is about 1e-5
    second = tokens[tokens[:, 1] >= 0, 1]
    assert len(second) == int(num_accepted.sum())
    expected = target[1].double() * len(second)
    assert ((second.bincount(minlength=vocab_size) - expected) ** 2 / expected).sum() < 35
    overlap = torch.minimum(target[0], draft[0]).sum().item()
    assert abs(num_accepted.double().mean().item() - overlap) < 0.01


def walk(drafts, parents, draws):
    """Follow ``draws(node)`` through one tree, in Python."""
    node, tokens, path = -1, [], []
    while True:
        tokens.append(draws(node, len(path)))
        children = [i for i in range(len(drafts)) if parents[i] == node and drafts[i] == tokens[-1] >= 0]
        if not children:
            return tokens, path
        node = children[0]
        path.append(node)


@pytest.mark.parametrize("vocab_size", [2, 5, 40])
def test_tree_equals_plain_sampling_along_its_path(vocab_size):
    num_requests, num_draft = 50, 9
    logits = noise(num_requests, num_draft + 1, vocab_size, seed=vocab_size)
    generator = torch.Generator().manual_seed(7)
    parents = torch.stack(
        [torch.randint(-1, max(i, 1), (num_requests,), generator=generator) for i in range(num_draft)], 1
    )
    parents[:, 0] = -1
    drafts = torch.randint(-1, min(vocab_size, 6), (num_requests, num_draft), generator=generator)
    order = torch.randperm(num_draft, generator=generator)  # parents may come after their children
    place = order.argsort()
    parents = torch.where(parents >= 0, place[parents.clamp(min=0)], -1)[:, order].to(torch.int32)
    drafts = drafts[:, order]
    keys = keys_of(num_requests)
    tokens, path, num_accepted = fi.verify_tree(drafts, parents, weights_of(logits), keys)

    def draws_of(row):
        def draws(node, depth):
            key = fi.DrawKeys(*(part[row : row + 1] for part in (keys.seed, keys.sample, keys.position + depth)))
            return int(fi.sample(logits[row, node + 1 : node + 2], fi.FilterParams(), key))

        return draws

    for row in range(num_requests):
        expected, nodes = walk(drafts[row].tolist(), parents[row].tolist(), draws_of(row))
        assert tokens[row].tolist() == expected + [-1] * (num_draft + 1 - len(expected))
        assert path[row].tolist() == nodes + [-1] * (num_draft + 1 - len(nodes))
        assert int(num_accepted[row]) == len(nodes)
    assert num_accepted.max() >= 1


def test_a_chain_is_a_tree():
    num_requests, num_draft, vocab_size = 30, 4, 3
    target = noise(num_requests, num_draft + 1, vocab_size, seed=5).softmax(-1)
    drafts = torch.randint(0, vocab_size, (num_requests, num_draft), generator=torch.Generator().manual_seed(2))
    parents = torch.arange(-1, num_draft - 1, dtype=torch.int32).expand(num_requests, -1).contiguous()
    chain_tokens, chain_accepted = fi.verify_chain(drafts, None, target, keys_of(num_requests))
    tokens, _, accepted = fi.verify_tree(drafts, parents, target, keys_of(num_requests))
    assert torch.equal(tokens, chain_tokens) and torch.equal(accepted, chain_accepted)


def test_cycles_and_unusable_rows_end_the_walk():
    target = torch.tensor([1.0, 0.0]).expand(3, 4, 2).clone()
    target[1, 0] = torch.nan
    target[2, 1] = 0
    drafts = torch.zeros(3, 3, dtype=torch.int64)
    parents = torch.tensor([[2, 0, 1], [-1, 0, 1], [-1, 0, 1]], dtype=torch.int32)
    tokens, path, accepted = fi.verify_tree(drafts, parents, target, keys_of(3))
    assert tokens.tolist() == [[0, -1, -1, -1], [-1] * 4, [0, -1, -1, -1]]
    assert path.tolist() == [[-1] * 4, [-1] * 4, [0, -1, -1, -1]]
    assert accepted.tolist() == [0, 0, 1]


def test_bad_arguments_are_named():
    drafts, target, keys = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4, 5), keys_of(2)
    calls = {
        "draft_tokens": lambda: fi.verify_chain(drafts[0], None, target, keys),
        "draft_tokens.dtype": lambda: fi.verify_chain(drafts.int(), None, target, keys),
        "target_probs": lambda: fi.verify_chain(drafts, None, target[:, :3], keys),
        "draft_probs": lambda: fi.verify_chain(drafts, target, target, keys),
        "keys.seed": lambda: fi.verify_chain(drafts, None, target, keys_of(3)),
        "parents.dtype": lambda: fi.verify_tree(drafts, drafts, target, keys),
    }
    for argument, call in calls.items():
        with pytest.raises(fi.ArgumentError) as caught:
            call()
        assert caught.value.argument == argument
    empty = fi.verify_chain(drafts[:0], None, target[:0], keys_of(0))
    assert empty[0].shape == (0, 4) and empty[1].shape == (0,)
