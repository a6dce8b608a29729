"""The scripts for serving engines, as far as they need no engine: workloads, comparisons, entry points, models' configs."""

import importlib
import json
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "engines"


@pytest.fixture
def script(monkeypatch):
    """Imports one of the scripts, which find each other beside themselves."""
    monkeypatch.syspath_prepend(str(FOLDER / "gpt_oss_attention"))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("workload", ["chat", "uniform", "fixed", "long", "prefix", "short", "sampled"])
def test_workloads_are_the_same_each_time(script, workload):
    requests_of = script("throughput").requests_of
    first = requests_of(workload, 16, 1000)
    assert first == requests_of(workload, 16, 1000) and len(first) == (1 if workload == "long" else 16)
    assert all(0 < num <= 2048 and 0 <= min(prompt) and max(prompt) < 1000 for prompt, num in first)
    assert (first[0][0][:8192] == first[-1][0][:8192]) == (workload in ("prefix", "long"))


def test_an_unknown_workload_is_an_error(script):
    with pytest.raises(ValueError, match="no workload 'chats'"):
        script("throughput").requests_of("chats", 2, 10)


def result(tmp_path, name, shift, backend="own", last=6):
    """A result whose log-probabilities are ``shift`` away from zero; of the second text the last token is ``last``."""
    values, tokens = [[shift, shift, shift], [shift, shift, shift]], [[1, 2, 3], [4, 5, last]]
    found = {"engine": "e", "model": "/m/llama", "backend": backend, "name": name, "prompt": values, "decode": values}
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(found | {"decode_tokens": tokens, "greedy": tokens}))
    return str(path)


def test_fi_is_held_against_the_engines_own(script, tmp_path, capsys):
    accuracy = script("accuracy")
    own = [result(tmp_path, "A", 0.0), result(tmp_path, "B", 0.02)]
    exact, rows = result(tmp_path, "exact", 0.015, backend="float32"), tmp_path / "rows.jsonl"
    assert accuracy.compare([result(tmp_path, "near", 0.01), *own, exact], str(rows)) == 0
    assert accuracy.compare([result(tmp_path, "far", 0.1), *own]) == 1
    assert (
        "far against A: mean 0.10000, largest 0.10000 of 6; greedy texts equal 2, tokens 6" in capsys.readouterr().out
    )
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 2 * (3 + 3) and found[0]["case"] == "llama prompt" and found[0]["mean"] == 0.01
    assert [row["mean"] for row in found if row["two"] == "exact"][:3] == [0.005, 0.015, 0.005]


def test_decode_steps_are_compared_up_to_the_first_token_that_differs(script, tmp_path):
    accuracy = script("accuracy")
    one, two = (
        json.loads(Path(result(tmp_path, name, 0.0, last=last)).read_text()) for name, last in (("a", 6), ("b", 7))
    )
    assert accuracy.difference(one, two, "prompt")[2] == 6 and accuracy.difference(one, two, "decode")[2] == 5
    row = accuracy.pair_of(one, two, "decode")
    assert row["equal_texts"] == 1 and row["equal_tokens"] == 5 and row["texts"] == 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_decode_steps_of_the_torch_models_are_their_prefill(script, monkeypatch, kind):
    """With attention in float64; and a distance is 0 to itself alone."""
    rounding, spread = script("rounding"), script("spread")
    for module in (rounding, spread):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    small = {"HIDDEN": 64, "INNER": 64, "LAYERS": 2, "VOCAB": 50, "NUM_PROMPTS": 3, "NUM_NEW": 4}
    for name, value in small.items():
        monkeypatch.setattr(spread, name, value)

    def exact(layer, step):
        return rounding.exact(layer, step).bfloat16()

    def scaled(layer, step):
        return exact(layer, step) * 1.05

    model = spread.model_of(kind, 0)
    found = [by(model, spread.Requests.drawn(model, 0), exact) for by in (spread.by_prefill, spread.by_decode)]
    torch.testing.assert_close(found[0][:, 1:], found[1], rtol=0, atol=0.05)
    assert found[0].shape == (3, 4) and found[0].isfinite().all()
    monkeypatch.setattr(spread, "RUNNERS", {"fi": exact, "A": exact, "B": scaled})
    row = spread.distances(kind, 0, "prompt")
    assert row["fi, A"] == 0 and row["fi, B"] == row["A, B"] > 0
    assert list(spread.summaries([row]))[0]["fi, B over theirs"] == 1


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_the_reference_attends_in_float32(script, kind):
    """Against attention by hand of the last query."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    options, module = SimpleNamespace(kv=None, q=None), SimpleNamespace(layer_idx=1)
    attention = script("reference").attention_of(kind, options)
    out, _ = attention(
        module, query, key, value, None, 0.3, softcap=2.0, sliding_window=None if kind == "gpt_oss" else 3
    )
    first = 0 if kind == "gpt_oss" else 2
    for head in range(4):
        logits = 2.0 * torch.tanh(key[0, head // 2, first:] @ query[0, head, -1] * 0.3 / 2.0)
        if kind == "gpt_oss":
            logits = torch.cat([logits, script("fi_gpt_oss_attention").sinks_of(1, 4)[head, None]])
        weights = logits.softmax(dim=0)[: 5 - first]
        torch.testing.assert_close(out[0, -1, head], weights @ value[0, head // 2, first:])


def test_the_reference_rounds_as_a_cache_does(script):
    rounded = script("reference").rounded
    assert rounded(torch.tensor([1.06, 1000.0]), "e4m3").tolist() == [1.0, 448.0]
    assert rounded(torch.tensor([1.06]), None).tolist() == pytest.approx([1.06])


def test_processes_measure_in_turns(script, tmp_path):
    """Two in threads: neither begins before both are ready, and their turns do not overlap."""
    turns, marks = script("turns").Turns(str(tmp_path), 2), []

    def measure(name, delay):
        time.sleep(delay)
        turns.wait(name)
        marks.append(len(list(tmp_path.glob("ready.*"))))
        with turns.turn():
            marks.append(name)
            time.sleep(0.05)
            marks.append(name)

    threads = [threading.Thread(target=measure, args=arguments) for arguments in (("a", 0.0), ("b", 0.3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [mark for mark in marks if isinstance(mark, str)]
    assert [mark for mark in marks if mark == 2] == [2, 2] and names[0] == names[1] and names[2] == names[3]


def test_without_a_folder_a_turn_begins_at_once(script):
    turns = script("turns").Turns(None, 3)
    turns.wait("a")
    with turns.turn():
        pass


def test_load_that_fills_a_cache(script):
    module = script("pressure")
    requests = module.requests_of(21, 1000)
    assert requests == module.requests_of(21, 1000) and all(32 <= num <= 160 for _, num in requests)
    assert [number for number in range(21) if module.is_aborted(number)] == [3, 10, 17]


def test_gaps_of_an_answer(script):
    gaps_of = script("engines").gaps_of
    best = [[(-0.1, 1, None)], [(-0.5, 7, None), (-0.75, 2, None)], [(-0.2, 3, None)]]
    assert gaps_of([1, 7, 3], [1, 7, 3], best) == [0.0, 0.0, 0.0]
    assert gaps_of([1, 2, 3], [1, 7, 9], best) == [0.0, 0.25]
    assert gaps_of([1, 4, 3], [1, 7, 9], best) == [0.0, float("inf")]


class StepByStep:
    """Like vLLM's LLMEngine: a step gives every running request its next token."""

    def __init__(self):
        self.left, self.made, self.added = {}, {}, []

    def add_request(self, name, prompt, num):
        self.left[name], self.made[name] = num, []
        self.added.append((time.perf_counter(), prompt["prompt_token_ids"]))

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        time.sleep(0.002)
        outputs = []
        for name in list(self.left):
            self.made[name].append(0)
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=self.made[name])]))
        return outputs


def test_requests_arrive_one_by_one(script):
    engine = object.__new__(script("engines").VllmEngine)
    inner = StepByStep()
    engine.engine = SimpleNamespace(llm_engine=inner)
    engine._params = lambda max_tokens: max_tokens
    begin = time.perf_counter()
    (first, further), (second, none) = engine.serve([([1], 5), ([2], 1)], [0.0, 0.05])
    assert [prompt for _, prompt in inner.added] == [[1], [2]] and inner.added[1][0] - begin >= 0.05
    assert first >= 0.002 and further >= 0.002 and second >= 0.002 and none == 0.0


def test_a_round_reports_latencies_where_requests_arrive(script):
    throughput = script("throughput")
    calls = []
    engine = SimpleNamespace(
        forget=lambda: calls.append("forget"),
        generate=lambda prompts, nums, **sampling: calls.append((prompts, nums, sampling)),
        serve=lambda requests, arrivals: [(arrival, 0.001) for arrival in arrivals],
    )
    found = throughput.measure(engine, "sampled", [([1], 2)])
    assert set(found) == {"seconds"} and calls == ["forget", ([[1]], [2], throughput.SAMPLING["sampled"])]
    found = throughput.measure(engine, "chat@4", [([1], 2)] * 9)
    assert found["further_token"]["p50_ms"] == 1.0 and calls[-1] == "forget"
    arrivals = throughput.arrivals_of(400, 4.0)
    assert arrivals == sorted(arrivals) and 80 < arrivals[-1] < 120 and arrivals == throughput.arrivals_of(400, 4.0)


def test_a_cache_is_emptied_when_the_last_step_has_ended(script):
    answers = iter([False, False, True])
    script("engines").until(lambda: next(answers), "an end")
    with pytest.raises(TimeoutError, match="waited 0.1 s for an end"):
        script("engines").until(lambda: False, "an end", patience=0.1)


def test_attention_of_one_layer_is_computed_exactly(script, monkeypatch):
    rounding = script("rounding")
    monkeypatch.setattr(rounding, "DEVICE", torch.device("cpu"))
    kind = rounding.Kind("small", 16, window=3, sinks=True, num_heads=2, num_kv_heads=1)
    step = rounding.step_of(kind, [2], [6])
    found = rounding.exact(kind, step)
    pages = step.table[0].long()
    keys, values = (each[pages].flatten(0, 1)[3:6, 0].double() for each in (step.keys, step.values))
    weights = torch.cat([keys @ step.q[1, 1].double() / 4, torch.tensor([3.0])]).softmax(0)[:3]
    torch.testing.assert_close(found[1, 1], weights @ values)
    rows = rounding.report("a", "b", {"one": found, "two": found + 1}, found)
    assert rows[0]["rmse"] == 0.0 and rows[1]["rmse"] == pytest.approx(1) and rows[2]["differing"] == 1.0


def test_options_of_engines(script):
    engine_options = script("engines").engine_options
    assert engine_options(['{"a": 1, "b": 2}', '{"b": null}']) == {"a": 1, "b": None}
    with pytest.raises(ValueError, match="a JSON object"):
        engine_options(["[1]"])


def test_folders_of_entry_points(script, tmp_path):
    module = script("dist_info")
    for adapter in module.ADAPTERS:
        module.write(module.ROOT / adapter, tmp_path)
    found = {path.name: (path / "entry_points.txt").read_text() for path in tmp_path.iterdir()}
    assert "[vllm.general_plugins]\nfi = fi_vllm:register" in found["fi_vllm-0.1.0.dist-info"]
    assert "[sglang.srt.plugins]\nfi = fi_sglang:register" in found["fi_sglang-0.1.0.dist-info"]


@pytest.mark.parametrize(("kind", "head_dim"), [("llama", 128), ("qwen3", 128), ("gemma2", 256), ("gpt_oss", 64)])
def test_configs(script, kind, head_dim):
    config = script("models").config_of(kind, "small")
    assert config.head_dim == head_dim and config.num_attention_heads == 8 and config.num_key_value_heads == 2
    if kind == "gemma2":
        assert config.attn_logit_softcapping and config.sliding_window == 128


def test_percentiles(script):
    found = script("throughput").percentiles(torch.linspace(0.0, 0.1, 101).tolist())
    assert found == {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}


def test_the_job_is_a_valid_script():
    subprocess.run(["bash", "-n", str(FOLDER / "job.sh")], check=True)
