"""A real model: greedy answers equal a plain cache-free forward, however the requests are scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fi_engine.request import RequestOutput
from fi_sampling import SamplingParams

pytestmark = pytest.mark.model

NUM_TOKENS = 64
SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers in one or two short sentences."}
CHATS = ("Why is the sky blue?", "Name three fruits.", "How do I boil an egg?", "Tell me a story about a fox.")
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never caught a single fish. "
    "Every morning he rowed out before sunrise, and every evening he came back with an empty net. One day",
    "1, 2, 3, 4,",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
Prompts = Sequence[Sequence[int]]


@pytest.fixture(scope="session")
def prompts(smol: Any) -> Prompts:
    chats = [smol.codec.encode_chat([SYSTEM, {"role": "user", "content": question}]) for question in CHATS]
    return [*chats, *(smol.codec.encode(text) for text in TEXTS)]


@pytest.fixture(scope="session")
def expected(smol: Any, smol_oracle: Any, prompts: Prompts) -> list[tuple[int, ...]]:
    """Tokens of a batched run, each proven to be the oracle's greedy choice after all tokens before it."""
    outputs = _run(smol.endless().engine(), prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = smol_oracle([*prompt, *output.token_ids[:-1]])
        greedy = logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
        assert list(output.token_ids) == greedy
        assert len(output.token_ids) == NUM_TOKENS and output.finish_reason == "length"
    return [output.token_ids for output in outputs]


def _run(engine: Any, prompts: Prompts) -> list[RequestOutput]:
    outputs: list[RequestOutput] = engine.generate(prompts, GREEDY)
    return outputs


def _tokens(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def test_alone(smol: Any, prompts: Prompts, expected: list[tuple[int, ...]]) -> None:
    engine = smol.endless().engine(max_batch=1)
    assert [_run(engine, [prompt])[0].token_ids for prompt in prompts] == expected


def test_chunked_prefill(smol: Any, prompts: Prompts, expected: list[tuple[int, ...]]) -> None:
    engine = smol.endless().engine(max_batch=8, max_step_tokens=11)
    assert _tokens(_run(engine, prompts)) == expected
    assert engine.stats.num_steps > NUM_TOKENS + 10


def test_without_prefix_sharing(smol: Any, prompts: Prompts, expected: list[tuple[int, ...]]) -> None:
    outputs = _run(smol.endless().engine(prefix_cache=False), prompts)
    assert _tokens(outputs) == expected
    assert not any(output.num_cached_tokens for output in outputs)


def test_with_prefix_sharing(smol: Any, prompts: Prompts, expected: list[tuple[int, ...]]) -> None:
    engine = smol.endless().engine()
    first = _run(engine, prompts[:1])
    outputs = first + _run(engine, prompts[1:])
    assert _tokens(outputs) == expected
    assert all(output.num_cached_tokens >= 16 for output in outputs[1:4])


def test_preemption(smol: Any, prompts: Prompts, expected: list[tuple[int, ...]]) -> None:
    engine = smol.endless().engine(num_pages=26, max_model_len=256)
    assert _tokens(_run(engine, prompts)) == expected
    assert engine.stats.num_preemptions > 0


def test_the_capital_of_france(smol: Any) -> None:
    (output,) = smol.engine().generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=8))
    assert output.text.startswith(" Paris")


def test_a_chat_ends_at_the_end_token(smol: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = smol.engine().generate([messages], GREEDY)
    assert output.finish_reason == "stop" and "Paris" in output.text and "<|im_end|>" not in output.text


def test_stop_strings_end_the_text_before_them(smol: Any) -> None:
    engine = smol.engine()
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, stop=("answer", "never"))
    handle = engine.submit("The capital of France is", params)
    shown = "".join(chunk.text for chunk in engine.stream([handle]))
    assert handle.finish_reason == "stop"
    assert shown == handle.text == " Paris.\n\nThe "
