"""Serving: scheduling does not change answers, bad requests fail alone, and no page leaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fi_core.errors import ArgumentError, CapacityError
from fi_engine import Engine, EngineConfig, RequestError, StepError
from fi_sampling import DEFAULT_OPS, LogitsOp, ProcessorError, SamplingParams, Step, logits_op, pipeline_of

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
SHARED = [(7 * i) % 320 for i in range(40)]
PROMPTS = [SHARED + [n, 3 * n + 1, 5] for n in range(4)] + [
    [n * 11 % 320 for n in range(1, 2 + 9 * k)] for k in range(4)
]


@pytest.fixture
def engines(tiny_loaded: Any) -> Iterator[Any]:
    """Makes engines of a tiny model; at the end each must be idle."""
    made: list[Engine] = []

    def make(**config: Any) -> Engine:
        made.append(tiny_loaded.engine(**{"max_batch": 8, "max_model_len": 128, "num_pages": 200, **config}))
        return made[-1]

    yield make
    for engine in made:
        assert engine.num_unfinished == 0 and engine.step() == []


def _greedy(oracle: Any, prompt: Sequence[int], generated: Sequence[int]) -> list[int]:
    choices: list[int] = oracle([*prompt, *generated[:-1]])[len(prompt) - 1 :].argmax(dim=-1).tolist()
    return choices


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 3, "max_step_tokens": 7},
        {"prefix_cache": False},
        {"num_pages": 9},
        {"page_size": 1, "num_pages": 400},
        {"cuda_graphs": False},
    ],
    ids=["plain", "alone", "chunked", "unshared", "preempted", "page1", "direct"],
)
def test_greedy_tokens_equal_transformers(tiny: Any, engines: Any, config: dict[str, Any]) -> None:
    engine = engines(**config)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        assert output.error is None and len(output.token_ids) == NUM_TOKENS
        assert list(output.token_ids) == _greedy(tiny[1], prompt, output.token_ids)
    assert (engine.stats.num_preemptions > 0) == ("num_pages" in config and config["num_pages"] < 20)


def test_prefixes_are_shared_and_counted(engines: Any) -> None:
    engine = engines()
    first, *others = (engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS[:4])
    assert first.num_cached_tokens == 0
    assert [output.num_cached_tokens for output in others] == [32, 32, 32]
    assert engine.stats.num_cached_tokens == 96


def test_same_seed_same_tokens_alone_and_batched(engines: Any) -> None:
    engine = engines()
    params = [
        SamplingParams(temperature=0.5 + seed / 4, top_k=seed * 10, top_p=0.9, seed=seed, max_tokens=NUM_TOKENS)
        for seed in range(8)
    ]
    alone = []
    for prompt, choice in zip(PROMPTS, params, strict=True):
        handle = engine.submit(prompt, choice)
        list(engine.stream([handle]))
        alone.append(handle.token_ids)
    together = engines(num_pages=9)
    handles = [together.submit(prompt, choice) for prompt, choice in zip(PROMPTS, params, strict=True)]
    list(together.stream(handles))
    assert [handle.token_ids for handle in handles] == alone
    assert together.stats.num_preemptions > 0


def test_samples_of_one_prompt_differ_and_unseeded_requests_too(engines: Any) -> None:
    (output,) = engines().generate([PROMPTS[0]], SamplingParams(seed=1, n=4, max_tokens=NUM_TOKENS))
    assert len({sample.token_ids for sample in output.outputs}) == 4
    outputs = engines().generate([PROMPTS[0]] * 2, SamplingParams(max_tokens=NUM_TOKENS))
    assert outputs[0].token_ids != outputs[1].token_ids


def test_penalties_and_bias_take_effect_and_survive_preemption(engines: Any) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, frequency_penalty=2.0, repetition_penalty=50.0, logit_bias={9: -100.0}
    )
    free = engines().generate(PROMPTS, params)
    tight = engines(num_pages=9).generate(PROMPTS, params)
    assert [output.token_ids for output in free] == [output.token_ids for output in tight]
    for output in free:
        assert 9 not in output.token_ids
        assert len(set(output.token_ids)) == NUM_TOKENS
    allowed = SamplingParams(max_tokens=NUM_TOKENS, allowed_token_ids=(3, 4), seed=2)
    assert set(engines().generate([[1, 2]], allowed)[0].token_ids) == {3, 4}


def test_logprobs_are_those_of_the_logits(tiny: Any, engines: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3)
    plain, output = engines().generate([PROMPTS[0]], GREEDY) + engines().generate([PROMPTS[0]], params)
    assert plain.logprobs == () and len(output.logprobs) == 4
    logits = tiny[1]([*PROMPTS[0], *output.token_ids[:-1]])[len(PROMPTS[0]) - 1 :]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, token, found in zip(expected, output.token_ids, output.logprobs, strict=True):
        assert found.chosen == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_stop_tokens_end_a_request(engines: Any) -> None:
    engine = engines()
    (whole,) = engine.generate([PROMPTS[5]], GREEDY)
    stop = whole.token_ids[5]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, stop_token_ids=(stop,))
    (output,) = engine.generate([PROMPTS[5]], params)
    assert output.finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def test_higher_priority_runs_first(engines: Any) -> None:
    engine = engines(max_batch=1)
    low, high = (engine.submit(PROMPTS[n], GREEDY, priority=n) for n in (0, 1))
    finished = [chunk.request for chunk in engine.stream([low, high]) if chunk.finish_reason]
    assert finished == [high, low]


def test_abort_waiting_and_running(engines: Any) -> None:
    engine = engines(max_batch=2)
    handles = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:4]]
    for _ in range(3):
        engine.step()
    engine.abort(handles[0])
    engine.abort(handles[3])
    engine.abort(handles[3])
    engine.check_integrity()
    list(engine.stream(handles))
    assert [handle.finish_reason for handle in handles] == ["abort", "length", "length", "abort"]
    assert 0 < len(handles[0].token_ids) < NUM_TOKENS and handles[3].token_ids == []
    other = engines()
    foreign = other.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(ArgumentError, match="another"):
        engine.abort(foreign)
    list(other.stream([foreign]))


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([1] * 128, {}, CapacityError, "prompt: expected at most 127 tokens"),
        ([], {}, ArgumentError, "prompt: expected at least one token"),
        ([1, 320], {}, ArgumentError, "prompt"),
        ([1, -1], {}, ArgumentError, "prompt"),
        ("text", {}, ArgumentError, "no tokenizer.json"),
        ([1], {"stop": ("a",)}, ArgumentError, "params.stop"),
        ([1], {"logit_bias": {320: 1.0}}, ArgumentError, "logit_bias"),
        ([1], {"allowed_token_ids": (999,)}, ArgumentError, "allowed_token_ids"),
        ([1], {"logprobs": 321}, ArgumentError, "logprobs"),
    ],
)
def test_a_bad_request_fails_alone(
    engines: Any, prompt: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = engines()
    running = engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    with pytest.raises(error, match=message):
        engine.submit(prompt, SamplingParams(**params))
    if not params:
        bad, good = engine.generate([prompt, PROMPTS[1]], GREEDY)
        assert bad.finish_reason == "error" and isinstance(bad.error, error) and bad.token_ids == ()
        assert good.finish_reason == "length"
    list(engine.stream([running]))
    assert len(running.token_ids) == NUM_TOKENS


def test_a_request_beyond_the_whole_pool_is_refused(engines: Any) -> None:
    engine = engines(num_pages=3)
    with pytest.raises(CapacityError, match="3 pages of 16 tokens"):
        engine.submit(PROMPTS[0], GREEDY)
    (output,) = engine.generate([PROMPTS[4]], GREEDY)
    assert len(output.token_ids) == NUM_TOKENS


def test_answers_end_at_the_longest_length(engines: Any) -> None:
    (output,) = engines(max_model_len=48).generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=None))
    assert (len(output.token_ids), output.finish_reason) == (5, "length")


def test_nan_logits_end_one_request_and_leave_the_others(tiny_loaded: Any, engines: Any) -> None:
    expected = [output.token_ids for output in engines().generate(PROMPTS[4:7], GREEDY)]
    model = tiny_loaded.model
    embedding = model.embedding.clone()
    embedding[319] = float("nan")
    poisoned = replace(tiny_loaded, model=replace(model, embedding=embedding, output=model.output.clone()))
    engine = poisoned.engine(max_batch=8, max_model_len=128, num_pages=200)
    bad, *good = engine.generate([[1, 2, 319], *PROMPTS[4:7]], GREEDY)
    assert isinstance(bad.error, RequestError) and "position 2 are NaN" in str(bad.error)
    assert (bad.finish_reason, bad.token_ids) == ("error", ())
    assert [output.token_ids for output in good] == expected


def test_a_step_that_raises_ends_its_requests_and_leaves_those_that_wait(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = engines().generate([PROMPTS[2]], GREEDY)
    engine = engines(max_batch=2)
    handles = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:3]]
    engine.step()
    pipeline = engine._runner.sampling.pipeline

    def raising(*arguments: Any) -> Any:
        raise ProcessorError("logits operation 'theirs' raised KeyError")

    monkeypatch.setattr(engine._runner.sampling, "pipeline", raising)
    chunks = engine.step()
    assert [(chunk.request, chunk.finish_reason) for chunk in chunks] == [(handle, "error") for handle in handles[:2]]
    assert all("'theirs'" in str(handle.error) for handle in handles[:2])
    engine.check_integrity()
    engine._runner.sampling.pipeline = pipeline
    list(engine.stream(handles))
    assert tuple(handles[2].token_ids) == expected.token_ids


def test_a_model_longer_than_trained_is_refused(tiny_loaded: Any) -> None:
    with pytest.raises(ArgumentError, match="config.max_model_len: expected at most the model's 512"):
        tiny_loaded.engine(max_model_len=513)


def test_a_step_that_is_cut_short_ends_its_requests_alone(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = engines().generate([PROMPTS[2]], GREEDY)
    engine = engines(max_batch=2)
    waiting = engine.submit(PROMPTS[2], GREEDY, priority=-1)
    run = engine._runner.run

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner, "run", interrupted)
    handles = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[4:6]]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [handle.finish_reason for handle in (*handles, waiting)] == ["error", "error", None]
    assert isinstance(handles[0].error, StepError) and "cut short by KeyboardInterrupt" in str(handles[0].error)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[4:6], GREEDY)
    assert engine.num_unfinished == 1
    engine.check_integrity()
    engine._runner.run = run
    list(engine.stream([waiting]))
    assert tuple(waiting.token_ids) == expected.token_ids


def test_tables_that_cannot_be_made_end_the_step_only(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()
    add = engine._runner.sampling.add

    def full(*arguments: Any, **options: Any) -> int:
        raise torch.OutOfMemoryError("no memory for the histories")

    monkeypatch.setattr(engine._runner.sampling, "add", full)
    handle = engine.submit(PROMPTS[0], GREEDY)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert handle.finish_reason == "error" and "no memory" in str(handle.error)
    engine._runner.sampling.add = add
    assert [output.finish_reason for output in engine.generate(PROMPTS, GREEDY)] == ["length"] * len(PROMPTS)


def test_handles_and_prompts_of_a_wrong_kind_are_refused(engines: Any) -> None:
    engine, other = engines(), engines()
    foreign = other.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(ArgumentError, match="another"):
        next(engine.stream([foreign]))
    list(other.stream([foreign]))
    assert list(engine.stream([foreign])) == []
    with pytest.raises(ArgumentError, match="prompts: expected a sequence of prompts"):
        engine.generate("text", GREEDY)
    for prompt in (None, 5, {"role": "user", "content": "a"}, b"ab"):
        with pytest.raises(ArgumentError, match="prompt: expected text, token ids or the messages of a chat"):
            engine.submit(prompt, GREEDY)
    for priority in (None, "high", 0.5):
        with pytest.raises(ArgumentError, match="priority: expected an int"):
            engine.submit([1], GREEDY, priority=priority)


def test_graphs_of_few_kinds_of_batches_are_kept(engines: Any) -> None:
    engine = engines()
    for number in range(12):
        (output,) = engine.generate([PROMPTS[4]], replace(GREEDY, logprobs=number))
        assert [len(entry.top) for entry in output.logprobs] == [number] * NUM_TOKENS
    kept = list(engine._runner._graphs)
    assert len(kept) == 8
    engine.generate([PROMPTS[4]], replace(GREEDY, logprobs=4))
    assert list(engine._runner._graphs) == [*kept[1:], kept[0]]


def test_tokens_that_a_request_computed_itself_do_not_count_as_cached(tiny: Any, engines: Any) -> None:
    engine = engines(max_batch=2, max_step_tokens=8, num_pages=4)
    short = replace(GREEDY, max_tokens=4)
    low = engine.submit(PROMPTS[0], short)
    for _ in range(3):
        engine.step()
    others = [engine.submit(prompt, short, priority=1) for prompt in (list(range(200, 217)), list(range(100, 105)))]
    list(engine.stream([low, *others]))
    assert (engine.stats.num_preemptions, engine.stats.num_cached_tokens) == (1, 16)
    assert low.num_cached_tokens == 0 and low.token_ids == _greedy(tiny[1], PROMPTS[0], low.token_ids)


def test_operations_of_ones_own_run_in_the_engine(tiny_loaded: Any) -> None:
    @logits_op("no_even_tokens")
    def no_even_tokens(logits: torch.Tensor, step: Step) -> torch.Tensor:
        even = torch.arange(logits.shape[1], device=logits.device) % 2 == 0
        return logits.masked_fill(even, float("-inf"))

    @logits_op("picky")
    def picky(logits: torch.Tensor, step: Step) -> torch.Tensor:
        if logits.shape[0] > 1:
            raise KeyError("one at a time")
        return logits

    def engine(op: LogitsOp) -> Engine:
        config = EngineConfig(max_batch=2, max_model_len=128, num_pages=40)
        return Engine(tiny_loaded.model, None, config, pipeline_of((op, *DEFAULT_OPS)))

    outputs = engine(no_even_tokens).generate(PROMPTS[:4], replace(GREEDY, repetition_penalty=1.2))
    assert all(token % 2 for output in outputs for token in output.token_ids)
    careful = engine(picky)
    failed = careful.generate(PROMPTS[4:6], GREEDY)
    assert [output.finish_reason for output in failed] == ["error", "error"]
    assert isinstance(failed[0].error, ProcessorError) and "'picky' raised KeyError" in str(failed[0].error)
    assert [careful.generate([prompt], GREEDY)[0].finish_reason for prompt in PROMPTS[4:6]] == ["length", "length"]
