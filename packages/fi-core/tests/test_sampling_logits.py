"""``top_k``, ``logprobs`` and ``penalize_logits`` against plain Python and float64 formulas."""

from dataclasses import replace

import fi_core as fi
import pytest
import torch


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("k", [1, 3, 17, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_k_is_exact_with_ties(k, dtype):
    logits = noise(7, 60)
    logits[1] = (logits[1] / 3).round()
    logits[2] = 1.0
    logits[3, ::2] = -torch.inf
    logits[4] = -torch.inf
    logits[5, 11] = torch.inf
    logits[6, 3:9] = torch.nan
    logits = logits.to(dtype)
    values, indices = fi.top_k(logits, k)
    numbers = [[-torch.inf if x != x else x for x in row] for row in logits.to(torch.float32).tolist()]
    for row, line in enumerate(numbers):
        order = sorted(range(60), key=lambda token: (-line[token], token))[:k]
        assert indices[row].tolist() == order
        assert values[row].tolist() == [line[token] for token in order]


def test_top_k_rejects_bad_k():
    for k in (0, 6, 2.0):
        with pytest.raises(fi.ArgumentError, match=r"^k:"):
            fi.top_k(torch.zeros(2, 5), k)
    assert fi.top_k(torch.zeros(0, 5), 2)[1].shape == (0, 2)
    for top_n in (-1, 6, 2.0):
        with pytest.raises(fi.ArgumentError, match=r"^top_n:"):
            fi.logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), top_n)


@pytest.mark.parametrize("top_n", [0, 1, 5, 33])
def test_logprobs(top_n):
    logits = noise(5, 33)
    logits[1] = (logits[1] / 2).round()
    logits[2] *= 1e29
    logits[3, ::3] = -torch.inf
    tokens = torch.tensor([4, 0, 32, 3, -1])
    out = fi.logprobs(logits, tokens, top_n)
    wide = logits.double()
    expected = wide - wide.logsumexp(1, keepdim=True)
    assert out.chosen[4] == -torch.inf
    torch.testing.assert_close(out.chosen[:4], expected[range(4), tokens[:4]].float(), rtol=1e-5, atol=1e-5)
    for row in range(5):
        order = sorted(range(33), key=lambda token: (-logits[row, token].item(), token))[:top_n]
        assert out.indices[row].tolist() == order
        torch.testing.assert_close(out.values[row], expected[row, order].float(), rtol=1e-5, atol=1e-5)


def test_logprobs_of_unusable_rows_are_nan():
    logits = torch.zeros(3, 6)
    logits[0, 1], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    assert fi.logprobs(logits, torch.zeros(3, dtype=torch.int64)).chosen.isnan().all()


def plain_penalties(logits, penalties):
    """The documented order, token by token, in Python floats."""
    result = logits.double().tolist()
    for n, line in enumerate(result):
        row = n if penalties.rows is None else int(penalties.rows[n])
        for token in range(len(line)):
            value = line[token]
            if penalties.allowed is not None and not (int(penalties.allowed[n, token // 32]) >> (token % 32)) & 1:
                value = -float("inf")
            if penalties.bias_indptr is not None:
                for entry in range(int(penalties.bias_indptr[n]), int(penalties.bias_indptr[n + 1])):
                    if int(penalties.bias_tokens[entry]) == token:
                        value += float(penalties.bias_values[entry])
            prompt = 0 if penalties.prompt_counts is None else int(penalties.prompt_counts[row, token])
            output = 0 if penalties.output_counts is None else int(penalties.output_counts[row, token])
            if penalties.repetition is not None and (prompt or output):
                factor = float(penalties.repetition[n])
                value = value / factor if value > 0 else value * factor
            if penalties.frequency is not None:
                value -= float(penalties.frequency[n]) * output
            if penalties.presence is not None:
                value -= float(penalties.presence[n]) * (output > 0)
            line[token] = value
    return torch.tensor(result, dtype=torch.float64)


def all_penalties(num_rows, vocab_size, rows=None):
    generator = torch.Generator().manual_seed(8)
    held = num_rows if rows is None else int(rows.max()) + 1
    words = (vocab_size + 31) // 32
    prompt, output = (
        torch.randint(-3, 4, (held, vocab_size), generator=generator).clamp(min=0).to(torch.int32) for _ in range(2)
    )
    tokens = torch.stack([torch.randperm(vocab_size, generator=generator)[:4] for _ in range(num_rows)]).to(torch.int32)
    tokens[:, 3] = -1
    tokens[0, 2] = vocab_size
    return {
        "allowed": torch.randint(-(2**31), 2**31, (num_rows, words), generator=generator).to(torch.int32),
        "bias_indptr": (torch.arange(num_rows + 1) * 4).to(torch.int32),
        "bias_tokens": tokens.flatten(),
        "bias_values": torch.randn(num_rows * 4, generator=generator) * 5,
        "repetition": torch.rand(num_rows, generator=generator) + 0.6,
        "frequency": torch.randn(num_rows, generator=generator),
        "presence": torch.randn(num_rows, generator=generator),
        "prompt_counts": prompt,
        "output_counts": output,
        "rows": rows,
    }


PARTS = {
    "allowed": ("allowed",),
    "bias": ("bias_indptr", "bias_tokens", "bias_values"),
    "repetition": ("repetition", "prompt_counts", "output_counts"),
    "repetition of the output": ("repetition", "output_counts"),
    "repetition of the prompt": ("repetition", "prompt_counts"),
    "frequency": ("frequency", "output_counts"),
    "presence": ("presence", "output_counts"),
    "all": tuple(all_penalties(1, 4)),
}


@pytest.mark.parametrize("names", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("vocab_size", [4, 32, 77])
@pytest.mark.parametrize("aliased", [False, True])
def test_penalties(names, vocab_size, aliased):
    logits = noise(6, vocab_size)
    logits[2, 1], logits[3] = -torch.inf, 0.0
    penalties = fi.PenaltyParams(
        **{name: value for name, value in all_penalties(6, vocab_size).items() if name in names}
    )
    expected = plain_penalties(logits, penalties)
    assert not torch.equal(expected, logits.double())
    out = logits.clone() if aliased else torch.full_like(logits, torch.nan)
    result = fi.penalize_logits(out if aliased else logits, penalties, out=out)
    assert result is out
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_penalties_with_a_row_map_and_bfloat16():
    rows = torch.tensor([4, 0, 0, 2], dtype=torch.int32)
    logits = noise(4, 50).to(torch.bfloat16)
    penalties = fi.PenaltyParams(**all_penalties(4, 50, rows))
    result = fi.penalize_logits(logits, penalties)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), plain_penalties(logits, penalties), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("penalties.allowed", {"allowed": torch.zeros(3, 1, dtype=torch.int32)}),
        ("penalties.allowed.dtype", {"allowed": torch.zeros(3, 2)}),
        ("penalties.bias_indptr, bias_tokens, bias_values", {"bias_tokens": torch.zeros(2, dtype=torch.int32)}),
        (
            "penalties.bias_tokens",
            {
                "bias_indptr": torch.zeros(4, dtype=torch.int32),
                "bias_tokens": torch.tensor(1, dtype=torch.int32),
                "bias_values": torch.tensor(1.0),
            },
        ),
        ("penalties.output_counts", {"frequency": torch.zeros(3)}),
        ("penalties.output_counts", {"repetition": torch.ones(3)}),
        ("penalties.output_counts", {"output_counts": torch.zeros(3, 40, dtype=torch.int32)}),
        ("penalties.rows", {"rows": torch.zeros(3, dtype=torch.int32)}),
        (
            "penalties.prompt_counts",
            {
                "prompt_counts": torch.zeros(3, 40, dtype=torch.int32),
                "output_counts": torch.zeros(3, 40, dtype=torch.int32),
                "presence": torch.zeros(3),
            },
        ),
    ],
)
def test_bad_penalties_are_named(argument, changes):
    with pytest.raises(fi.ArgumentError) as caught:
        fi.penalize_logits(torch.zeros(3, 40), fi.PenaltyParams(**changes))
    assert caught.value.argument == argument


@pytest.mark.parametrize("row", [2, -1])
def test_rows_of_penalties_out_of_range_are_named_on_a_cpu(row):
    counts, rows = torch.zeros(2, 40, dtype=torch.int32), torch.tensor([0, 1, row], dtype=torch.int32)
    with pytest.raises(fi.IndexCheckError, match=rf"^penalties\.rows\[2\]: {row} is outside its limit 1"):
        penalties = fi.PenaltyParams(presence=torch.ones(3), output_counts=counts, rows=rows)
        fi.penalize_logits(torch.zeros(3, 40), penalties)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def said(tokens, num_rows=1, vocab_size=40, capacity=8, prompt=()):
    """A history in which every row has said ``tokens``."""
    history = fi.TokenHistory.empty(num_rows, vocab_size, capacity)
    fi.record_tokens(history, torch.tensor([list(tokens)] * num_rows))
    for token in prompt:
        history.seen[:, token // 32] |= -(2**31) if token % 32 == 31 else 1 << token % 32
    return history


def test_a_sparse_history_penalises_as_dense_counts_do():
    generator = torch.Generator().manual_seed(11)
    for vocab_size in (1, 31, 32, 33, 97):
        logits = torch.randn(5, vocab_size, generator=generator)
        tokens = torch.randint(0, vocab_size, (7, 30), generator=generator)
        tokens[:, ::4] = -1
        history = fi.TokenHistory.empty(7, vocab_size, vocab_size)
        for piece in tokens.split([1, 9, 20], dim=1):
            fi.record_tokens(history, piece)
        counts = torch.zeros(7, vocab_size + 1, dtype=torch.int32)
        counts.scatter_add_(1, torch.where(tokens < 0, vocab_size, tokens), torch.ones_like(tokens, dtype=torch.int32))
        counts = counts[:, :vocab_size].contiguous()
        assert torch.equal(history.num_output.long(), (tokens >= 0).sum(1))
        assert torch.equal(history.num_entries.long(), (counts > 0).sum(1))
        shared = {"repetition": torch.rand(5) + 0.5, "frequency": torch.randn(5), "presence": torch.randn(5)}
        shared["rows"] = ints([6, 0, 3, 3, 1])
        dense = fi.penalize_logits(logits, fi.PenaltyParams(**shared, output_counts=counts))
        sparse = fi.penalize_logits(logits, fi.PenaltyParams(**shared, history=history))
        assert torch.equal(dense, sparse)


def test_repetition_counts_the_prompt_and_the_others_do_not():
    history, column = said([3], prompt=(5, 31)), torch.full((1,), 2.0)
    found = fi.penalize_logits(torch.ones(1, 40), fi.PenaltyParams(repetition=column, history=history))[0]
    assert {token: value for token, value in enumerate(found.tolist()) if value != 1} == {3: 0.5, 5: 0.5, 31: 0.5}
    found = fi.penalize_logits(torch.ones(1, 40), fi.PenaltyParams(presence=column, history=history))[0]
    assert {token: value for token, value in enumerate(found.tolist()) if value != 1} == {3: -1.0}


def test_output_that_does_not_fit_leaves_nothing_to_draw_in_its_row():
    history = fi.TokenHistory.empty(3, 40, 2)
    fi.record_tokens(history, torch.tensor([[1, 2, 3, 1], [1, 2, 1, 2], [-1, -1, -1, -1]]))
    assert history.num_entries.tolist() == [3, 2, 0] and history.num_output.tolist() == [4, 4, 0]
    keys = fi.DrawKeys(torch.arange(3), torch.zeros(3, dtype=torch.int32), torch.arange(3))
    counted = fi.PenaltyParams(frequency=torch.ones(3), history=history)
    assert (fi.sample(torch.zeros(3, 40), fi.FilterParams(), keys, penalties=counted) < 0).tolist() == [
        True,
        False,
        False,
    ]
    idle = fi.PenaltyParams(frequency=torch.tensor([0.0, 1.0, 1.0]), history=history)
    assert (fi.sample(torch.zeros(3, 40), fi.FilterParams(), keys, penalties=idle) >= 0).all()
    repeated = fi.PenaltyParams(repetition=torch.ones(3), history=history)
    assert (fi.sample(torch.zeros(3, 40), fi.FilterParams(), keys, penalties=repeated) >= 0).all()


def test_bias_until_holds_a_token_back_and_masks_of_the_step_narrow_the_others():
    history = fi.TokenHistory.empty(2, 40, 2)
    fi.record_tokens(history, torch.tensor([[7], [-1]]))
    bias = {"bias_indptr": ints([0, 1, 2]), "bias_tokens": ints([9, 9]), "bias_values": torch.tensor([2.0, 2.0])}
    bias |= {"bias_until": ints([1, 1]), "history": history}
    found = fi.penalize_logits(torch.zeros(2, 40), fi.PenaltyParams(**bias))
    assert found[:, 9].tolist() == [2.0, -torch.inf] and found[:, :9].eq(0).all()
    masks = {"allowed": ints([[6, 0], [6, 0]]), "step_allowed": ints([[12, 0], [3, 0]])}
    found = fi.penalize_logits(torch.zeros(2, 40), fi.PenaltyParams(**masks))
    assert [row.isfinite().nonzero().ravel().tolist() for row in found] == [[2], [1]]


def test_draws_with_penalties_are_draws_from_penalised_logits():
    generator = torch.Generator().manual_seed(5)
    logits, num_rows = torch.randn(6, 40, generator=generator).bfloat16(), 6
    history = fi.TokenHistory.empty(num_rows, 40, 40)
    fi.record_tokens(history, torch.randint(0, 40, (num_rows, 12), generator=generator))
    penalties = fi.PenaltyParams(repetition=torch.full((6,), 1.4), frequency=torch.full((6,), 0.3), history=history)
    filters = fi.FilterParams(top_k=torch.full((6,), 5, dtype=torch.int32))
    for position in range(30):
        keys = fi.DrawKeys(torch.arange(6), torch.zeros(6, dtype=torch.int32), torch.full((6,), position))
        expected = fi.sample(fi.penalize_logits(logits, penalties), filters, keys)
        assert torch.equal(fi.sample(logits, filters, keys, penalties=penalties), expected)
    dense = fi.PenaltyParams(presence=torch.ones(6), output_counts=torch.ones(6, 40, dtype=torch.int32))
    with pytest.raises(fi.ArgumentError, match=r"^penalties\.history"):
        fi.sample(logits, filters, keys, penalties=dense)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("history.entries", {"entries": torch.zeros(2, 4, dtype=torch.int32)}),
        ("history.entries", {"entries": torch.zeros(2, 0, 2, dtype=torch.int32)}),
        ("history.entries.dtype", {"entries": torch.zeros(2, 4, 2)}),
        ("history.num_entries", {"num_entries": torch.zeros(3, dtype=torch.int32)}),
        ("history.num_output.dtype", {"num_output": torch.zeros(2, dtype=torch.int64)}),
        ("history.seen", {"seen": torch.zeros(3, 2, dtype=torch.int32)}),
    ],
)
def test_bad_histories_are_named(argument, changes):
    history = replace(fi.TokenHistory.empty(2, 40, 4), **changes)
    with pytest.raises(fi.ArgumentError) as caught:
        fi.record_tokens(history, torch.zeros(2, 1, dtype=torch.int64))
    assert caught.value.argument == argument
    with pytest.raises(fi.ArgumentError, match=rf"^penalties\.{argument}"):
        fi.penalize_logits(torch.zeros(2, 40), fi.PenaltyParams(presence=torch.ones(2), history=history))


def test_bad_records_are_named():
    history = fi.TokenHistory.empty(2, 40, 4)
    with pytest.raises(fi.ArgumentError, match=r"^tokens\.dtype"):
        fi.record_tokens(history, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(fi.ArgumentError, match="^tokens"):
        fi.record_tokens(history, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(fi.IndexCheckError, match=r"^slots\[1\]: 2 is outside its limit 1"):
        fi.record_tokens(history, torch.zeros(2, dtype=torch.int64), slots=torch.tensor([0, 2]))
    with pytest.raises(fi.ArgumentError, match=r"^penalties\.history"):
        fi.penalize_logits(torch.zeros(2, 40), fi.PenaltyParams(history=history))
