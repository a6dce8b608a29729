"""The scripts for serving engines, as far as they need no engine: workloads, comparisons, entry points, models' configs."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "engines"


@pytest.fixture
def script(monkeypatch):
    """Imports one of the scripts, which find each other beside themselves."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("workload", ["chat", "uniform", "long", "prefix", "short"])
def test_workloads_are_the_same_each_time(script, workload):
    requests_of = script("throughput").requests_of
    first = requests_of(workload, 16, 1000)
    assert first == requests_of(workload, 16, 1000) and len(first) == (2 if workload == "long" else 16)
    assert all(0 < num <= 2048 and 0 <= min(prompt) and max(prompt) < 1000 for prompt, num in first)
    assert (first[0][0][:8192] == first[1][0][:8192]) == (workload in ("prefix",))


def test_an_unknown_workload_is_an_error(script):
    with pytest.raises(ValueError, match="no workload 'chats'"):
        script("throughput").requests_of("chats", 2, 10)


def result(tmp_path, name, shift):
    """A result whose log-probabilities are ``shift`` away from zero; the second request stopped early."""
    values = [[shift, shift, shift], [shift]]
    greedy = [[1, 2, 3], [4, 5, 6]]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"backend": name, "prompt": values, "decode": values, "greedy": greedy}))
    return str(path)


def test_fi_is_held_against_the_engines_own(script, tmp_path, capsys):
    accuracy = script("accuracy")
    own = [result(tmp_path, "A", 0.0), result(tmp_path, "B", 0.02)]
    assert accuracy.compare([result(tmp_path, "near", 0.01), *own]) == 0
    assert accuracy.compare([result(tmp_path, "far", 0.1), *own]) == 1
    assert "far against A: mean 0.10000, largest 0.10000 of 4; greedy equal 2/2" in capsys.readouterr().out


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
    found = script("online").percentiles(torch.linspace(0.0, 0.1, 101).tolist())
    assert found == {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}


def test_the_job_is_a_valid_script():
    subprocess.run(["bash", "-n", str(FOLDER / "job.sh")], check=True)
