"""The engine on a GPU: decode steps replay CUDA graphs and answer as steps without graphs do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fi_engine import Engine, EngineConfig
from fi_sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.model]

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "def fibonacci(n):\n"]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_known_answers(model_path: Path, cuda_graphs: bool) -> None:
    engine = Engine.from_path(model_path, device="cuda", config=EngineConfig(cuda_graphs=cuda_graphs))
    assert engine.model.dtype == torch.bfloat16
    params = SamplingParams(temperature=0.0, max_tokens=24)
    paris, numbers, code = engine.generate(PROMPTS, params)
    assert paris.text.startswith(" Paris")
    assert numbers.text.startswith(" 5, 6, 7")
    assert "return" in code.text
    alone = engine.generate([PROMPTS[1]], params)[0]
    assert alone.text.startswith(" 5, 6, 7")
    assert engine.stats.num_decode_steps > 40


def test_sampled_requests_with_penalties_draw_the_same_again(model_path: Path) -> None:
    engine = Engine.from_path(model_path, device="cuda")
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, frequency_penalty=0.5, seed=11, max_tokens=24)
    first, again = (engine.generate(PROMPTS, params) for _ in range(2))
    assert [output.token_ids for output in first] == [output.token_ids for output in again]


def test_forks_go_the_way_of_their_origin_through_copied_pages(model_path: Path) -> None:
    engine = Engine.from_path(model_path, device="cuda")
    origin = engine.submit(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    for _ in range(9):
        engine.step()
    fork = engine.fork(origin)
    list(engine.stream([origin, fork]))
    assert origin.token_ids == fork.token_ids and len(fork.token_ids) == 40
    engine.check_integrity()


def test_many_kinds_of_batches_keep_few_graphs(model_path: Path) -> None:
    engine = Engine.from_path(model_path, device="cuda", config=EngineConfig(max_batch=1))
    texts = set()
    for number in range(10):
        params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=number)
        (output,) = engine.generate(PROMPTS[1:2], params)
        texts.add(output.text)
        assert [len(entry.top) for entry in output.logprobs] == [number] * 8
    assert len(texts) == 1 and len(engine._runner._graphs) == 8
