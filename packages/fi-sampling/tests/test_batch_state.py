"""SamplingState: every parameter has an effect, and a request's tokens do not depend on its slot or batch."""

import dataclasses

import fi_core as fi
import pytest
import torch
from fi_sampling import (
    DEFAULT_OPS,
    PipelineTypeError,
    SamplingLimits,
    SamplingParams,
    SamplingState,
    StopChecker,
    logits_op,
    pipeline_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB_SIZE = 90


def noise(*shape, seed=0):
    return torch.randn(*shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def state_of(*params, capacity=6, prompt_ids=(1, 2, 3), **options):
    state = SamplingState(capacity, VOCAB_SIZE, **options)
    for slot, item in enumerate(params):
        state.add(slot, item, prompt_ids)
    return state


def rows(*values):
    return torch.tensor(values, dtype=torch.int64)


def generate(params, logits, prompt_ids=(1, 2, 3), state=None, slot=0, **options):
    """Tokens of one request over given logits [steps, V], feeding its own tokens back into the counts."""
    state = state or SamplingState(3, VOCAB_SIZE, **options)
    state.add(slot, params, prompt_ids)
    tokens = []
    for index, line in enumerate(logits):
        result = state.sample(line.unsqueeze(0), rows(slot), rows(len(prompt_ids) + index))
        state.record(rows(slot), result.tokens)
        tokens.append(int(result.tokens))
    return tokens


BASE = SamplingParams(seed=11, max_tokens=None)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.3}, {}),
        ({"top_k": 2}, {}),
        ({"top_p": 0.3}, {}),
        ({"min_p": 0.4}, {}),
        ({"typical_p": 0.2}, {}),
        ({"repetition_penalty": 3.0}, {}),
        ({"presence_penalty": 2.0}, {}),
        ({"frequency_penalty": 2.0}, {}),
        ({"logit_bias": {7: 50.0}}, {}),
        ({"allowed_token_ids": (4, 5, 70)}, {}),
        ({"seed": 12}, {}),
        ({"min_tokens": 40, "stop_token_ids": (3, 8)}, {}),
        ({"min_tokens": 40}, {"eos_token_ids": (3, 8)}),
    ],
    ids=str,
)
def test_every_parameter_of_a_draw_has_an_effect(changes, options):
    logits = noise(40)
    logits[:, [3, 8]] += 2.0
    base = generate(BASE, logits, **options)
    assert base == generate(BASE, logits, **options)
    assert generate(dataclasses.replace(BASE, **changes), logits, **options) != base


def test_the_effects_are_those_of_the_names():
    logits = noise(60)
    assert generate(dataclasses.replace(BASE, temperature=0.0), logits) == logits.argmax(1).tolist()
    assert set(generate(dataclasses.replace(BASE, allowed_token_ids=(4, 5, 70)), logits)) <= {4, 5, 70}
    assert generate(dataclasses.replace(BASE, top_k=1), logits) == logits.argmax(1).tolist()
    same = noise(1).expand(60, -1)
    greedy = dataclasses.replace(BASE, temperature=0.0, frequency_penalty=2.0)
    assert len(set(generate(greedy, same))) > 5
    assert generate(dataclasses.replace(BASE, logit_bias={7: 100.0}), logits) == [7] * 60
    assert generate(dataclasses.replace(BASE, top_k=-1), logits) == generate(BASE, logits)


def test_min_tokens_ends_and_ignore_eos_lifts_it():
    logits = torch.zeros(6, VOCAB_SIZE)
    logits[:, 9], logits[:, 5] = 60.0, 30.0
    params = dataclasses.replace(BASE, min_tokens=4)
    assert generate(params, logits, eos_token_ids=(9,)) == [5, 5, 5, 5, 9, 9]
    assert generate(dataclasses.replace(params, ignore_eos=True), logits, eos_token_ids=(9,)) == [9] * 6
    biased = dataclasses.replace(params, logit_bias={9: -40.0})
    assert generate(biased, logits, eos_token_ids=(9,)) == [5] * 6


def test_samples_of_a_prompt_differ():
    params = dataclasses.replace(BASE, n=3)
    state = SamplingState(3, VOCAB_SIZE)
    for sample in range(3):
        assert state.add(sample, params, (1,), sample=sample) == 11
    logits = noise(1).expand(3, -1).contiguous()
    steps = [state.sample(logits, rows(0, 1, 2), rows(i, i, i)).tokens.tolist() for i in range(20)]
    assert len({tuple(column) for column in zip(*steps, strict=True)}) == 3
    with pytest.raises(fi.ArgumentError, match=r"^sample:"):
        state_of().add(0, params, (1,), sample=3)


MIXED = [
    SamplingParams(seed=1, temperature=0.0),
    SamplingParams(seed=2, temperature=0.8, top_k=20, top_p=0.9),
    SamplingParams(seed=3, frequency_penalty=1.0, presence_penalty=0.5, logit_bias={3: 2.0, 8: -4.0}),
    SamplingParams(seed=4, allowed_token_ids=tuple(range(0, VOCAB_SIZE, 2)), min_p=0.05),
    SamplingParams(seed=5, repetition_penalty=1.4, typical_p=0.8, min_tokens=6, stop_token_ids=(2, 4)),
    SamplingParams(seed=6),
]


def test_tokens_do_not_depend_on_slot_or_batch():
    logits = noise(8, len(MIXED))
    alone = [generate(params, logits[:, index]) for index, params in enumerate(MIXED)]
    state = SamplingState(10, VOCAB_SIZE)
    slots = [7, 0, 9, 3, 2, 5]
    for slot, params in zip(slots, MIXED, strict=True):
        state.add(slot, params, (1, 2, 3))
    together = []
    for index in range(8):
        order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(index))
        batch = torch.cat([logits[index, order], torch.full((2, VOCAB_SIZE), torch.nan)])
        at = torch.cat([rows(*slots)[order], rows(-1, -1)])
        result = state.sample(batch, at, torch.full((8,), 3 + index))
        state.record(at, result.tokens)
        assert result.tokens[6:].tolist() == [-1, -1]
        together.append(result.tokens[:6][order.argsort()].tolist())
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_a_request_resumes_with_its_history():
    params, logits = MIXED[4], noise(10)
    tokens = generate(params, logits)
    state = SamplingState(2, VOCAB_SIZE)
    state.add(1, params, (1, 2, 3), output_ids=tokens[:4])
    resumed = []
    for index in range(4, 10):
        result = state.sample(logits[index : index + 1], rows(1), rows(3 + index))
        state.record(rows(1), result.tokens)
        resumed.append(int(result.tokens))
    assert resumed == tokens[4:]


def test_a_reused_slot_keeps_nothing():
    logits = noise(8)
    state = SamplingState(1, VOCAB_SIZE)
    for params in (*MIXED, *reversed(MIXED)):
        assert generate(params, logits, state=state) == generate(params, logits)
        state.remove(0)
    assert state.active == frozenset()


def test_active_features_decide_the_calls(monkeypatch):
    calls = []
    for name in ("penalize_logits", "sample", "filter_logits", "logprobs", "record_tokens"):
        real = getattr(fi, name)
        monkeypatch.setattr(fi, name, lambda *a, _real=real, _name=name, **k: (calls.append(_name), _real(*a, **k))[1])

    def run(*slots):
        calls.clear()
        result = state.sample(noise(len(slots)), rows(*slots), rows(*slots))
        state.record(rows(*slots), result.tokens)
        return calls

    state = state_of(SamplingParams(temperature=0.5, top_p=0.9))
    assert run(0) == ["sample"] and state.active == {"temperature", "top_p"}
    assert state.columns.history is None and state.columns.allowed is None
    assert state.explain() == "reference.sample (temperature, top_p, draw)"
    state.add(1, SamplingParams(presence_penalty=1.0, logprobs=2, logit_bias={3: 1.0}), (1,))
    assert run(0, 1) == ["sample", "logprobs", "record_tokens"]
    assert state.explain().splitlines() == [
        "reference.sample (bias, presence, temperature, top_p, draw)",
        "reference.logprobs",
        "reference.record_tokens (after the draw)",
    ]
    state.remove(1)
    assert run(0) == ["sample"]


class Launches(TorchDispatchMode):
    """Names of the torch operators that run; views launch nothing."""

    VIEWS = frozenset(
        {"view", "unbind", "slice", "select", "alias", "detach", "empty", "unsqueeze", "_unsafe_view", "split"}
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_launches_its_operations_and_nothing_else(monkeypatch):
    """Whatever the batch's parameters are, parameters stay in their columns: no gather, no copy, no loop over rows."""
    state = state_of(*MIXED, dataclasses.replace(BASE, logprobs=None), capacity=12)
    slots, logits = rows(3, -1, 0, 5, 2, 1, 4), noise(7)
    mask = torch.full((7, 3), -1, dtype=torch.int32)
    ran = []
    monkeypatch.setattr(fi, "sample", lambda logits, *a, **k: (ran.append("sample"), logits.new_zeros(7).long())[1])
    monkeypatch.setattr(fi, "record_tokens", lambda *a, **k: ran.append("record_tokens"))
    positions = torch.arange(7)
    with Launches() as launches:
        result = state.sample(logits, slots, positions, allowed=mask)
        state.record(slots, result.tokens)
    assert ran == ["sample", "record_tokens"]
    assert set(launches.names) <= {"new_zeros", "_to_copy"}  # of the stand-in above


def test_logprobs_are_of_the_given_logits():
    state = state_of(SamplingParams(logprobs=3, logit_bias={5: 100.0}), SamplingParams(logprobs=0))
    logits = noise(2)
    result = state.sample(logits, rows(0, 1), rows(0, 0))
    logs = logits.double().log_softmax(1)
    assert result.tokens[0] == 5 and result.logprobs.values.shape == (2, 3)
    torch.testing.assert_close(
        result.logprobs.chosen.double(), logs.gather(1, result.tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(result.logprobs.indices, logs.topk(3, dim=1).indices)
    assert state_of(SamplingParams()).sample(logits[:1], rows(0), rows(0)).logprobs is None


def test_masks_of_a_step_apply_on_top_of_the_requests():
    state = state_of(dataclasses.replace(BASE, allowed_token_ids=(4, 5, 70)), BASE)
    mask = torch.zeros(2, 3, dtype=torch.int32)
    mask[:, 0] = (1 << 5) | (1 << 6)
    for index in range(20):
        tokens = state.sample(noise(2, seed=index), rows(0, 1), rows(0, 0), allowed=mask).tokens
        assert tokens[0] == 5 and int(tokens[1]) in (5, 6)


def test_seeds_are_drawn_when_not_given():
    seeds = iter([5, 6])
    state = SamplingState(4, VOCAB_SIZE, seed_source=lambda: next(seeds))
    assert [
        state.add(0, SamplingParams(), ()),
        state.add(1, SamplingParams(seed=9), ()),
        state.add(2, SamplingParams(), ()),
    ] == [5, 9, 6]
    other = SamplingState(4, VOCAB_SIZE)
    assert other.add(0, SamplingParams(), ()) != other.add(1, SamplingParams(), ())


def test_own_pipelines_and_order():
    @logits_op("no_low")
    def no_low(logits, step):
        return torch.cat([torch.full_like(logits[:, :60], -torch.inf), logits[:, 60:]], dim=1)

    assert min(generate(BASE, noise(30), pipeline=pipeline_of([no_low, *DEFAULT_OPS]))) >= 60
    with pytest.raises(PipelineTypeError, match="ends in tokens, not probs"):
        SamplingState(1, VOCAB_SIZE, pipeline=pipeline_of(["softmax"]))
    params = dataclasses.replace(BASE, top_k=3, top_p=0.35)
    flat = torch.zeros(60, VOCAB_SIZE)
    flat[:, :3] = 3.0
    assert set(generate(params, flat, order="joint")) == {0, 1, 2}
    assert set(generate(params, flat)) == {0, 1}


def test_stop_fields_reach_the_checker():
    params = SamplingParams(stop="x", max_tokens=3)
    assert StopChecker(params).push(1, "ax").reason == "stop"


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("capacity", lambda state: SamplingState(0, VOCAB_SIZE)),
        ("limits.max_distinct", lambda state: SamplingLimits(max_distinct=0)),
        ("eos_token_ids", lambda state: SamplingState(1, VOCAB_SIZE, eos_token_ids=(VOCAB_SIZE,))),
        ("order", lambda state: SamplingState(1, VOCAB_SIZE, order="both")),
        ("slot", lambda state: state.add(6, BASE, ())),
        ("slot", lambda state: state.add(0, BASE, ())),
        ("slot", lambda state: state.remove(4)),
        ("prompt_ids", lambda state: state.add(1, BASE, (VOCAB_SIZE,))),
        ("output_ids", lambda state: state.add(1, BASE, (), output_ids=(-1,))),
        ("params.logit_bias", lambda state: state.add(1, SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), ())),
        ("params.logit_bias", lambda state: state.add(1, SamplingParams(logit_bias=dict.fromkeys(range(40), 1.0)), ())),
        ("params.allowed_token_ids", lambda state: state.add(1, SamplingParams(allowed_token_ids=(500,)), ())),
        ("params.stop_token_ids", lambda state: state.add(1, SamplingParams(stop_token_ids=(500,)), ())),
        ("params.logprobs", lambda state: state.add(1, SamplingParams(logprobs=500), ())),
        ("logits", lambda state: state.sample(noise(2), rows(0), rows(0))),
        ("slots", lambda state: state.sample(noise(1), rows(0).int(), rows(0))),
        ("positions", lambda state: state.sample(noise(1), rows(0), rows(0).float())),
        ("tokens", lambda state: state.record(rows(0), rows(1, 2))),
    ],
)
def test_bad_arguments_are_named(argument, call):
    state = state_of(BASE)
    with pytest.raises(fi.ArgumentError) as caught:
        call(state)
    assert caught.value.argument == argument
    assert state.active == frozenset()


def test_a_request_that_never_reaches_min_tokens_draws_no_stop_token():
    state = SamplingState(1, 8)
    state.add(0, SamplingParams(temperature=0.0, min_tokens=2**40, max_tokens=None, stop_token_ids=(3,)), ())
    logits = torch.zeros(1, 8)
    logits[0, 3] = 9.0
    assert state.sample(logits, torch.tensor([0]), torch.tensor([5])).tokens.tolist() == [0]


def test_output_beyond_max_distinct_stops_its_own_request_alone():
    state = SamplingState(2, 8, limits=SamplingLimits(max_distinct=3))
    counted = SamplingParams(temperature=0.0, frequency_penalty=2.0, max_tokens=None)
    state.add(0, counted, ())
    state.add(1, SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=None), ())
    slots, drawn = torch.tensor([0, 1]), []
    for position in range(6):
        tokens = state.sample(torch.ones(2, 8), slots, torch.full((2,), position)).tokens
        state.record(slots, tokens)
        drawn.append(tokens.tolist())
    assert [first for first, _ in drawn] == [0, 1, 2, 3, -1, -1]
    assert [second for _, second in drawn] == [0, 1, 2, 3, 4, 5]
    state.remove(0)
    state.add(0, counted, (), output_ids=(0, 1, 2, 3))
    assert state.sample(torch.ones(2, 8), slots, slots).tokens[0] == -1


def test_the_signature_says_what_a_graph_depends_on():
    state = SamplingState(3, 8)
    assert state.signature == (frozenset(), 0)
    state.add(0, SamplingParams(top_k=2, logprobs=4), ())
    state.add(1, SamplingParams(logprobs=6), ())
    assert state.signature == ({"top_k", "logprobs"}, 6)
    state.remove(1)
    state.add(1, SamplingParams(temperature=1.0, seed=3), ())
    assert state.signature == ({"top_k", "logprobs"}, 4)
