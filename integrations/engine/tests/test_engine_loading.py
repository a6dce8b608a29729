"""Model files: what is read, and what a broken or foreign file says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fi_core.rope import LinearScaling, Llama3Scaling, YarnScaling
from fi_engine.checkpoint import Checkpoint, open_checkpoint
from fi_engine.config import EngineConfig
from fi_engine.errors import ModelFileError
from fi_engine.model import load_model
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, WIDTH, VOCAB = 32, 4, 2, 32, 5


def _quiet(line: str) -> None:
    assert line


def _write_gguf(path: Path, architecture: str = "llama", without: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """A one-layer random model in a GGUF file; returns its tensors."""
    generator = np.random.default_rng(3)
    kv_rows = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "rope_freqs.weight": (HIDDEN // HEADS // 2,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv_rows, HIDDEN),
        "blk.0.attn_v.weight": (kv_rows, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_up.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, WIDTH),
    }
    shapes |= changes.pop("shapes", {})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(changes.pop("heads", HEADS))
    writer.add_head_count_kv(changes.pop("kv_heads", KV_HEADS))
    if "epsilon" not in without:
        writer.add_layer_norm_rms_eps(changes.pop("epsilon", 1e-5))
    writer.add_tokenizer_model(changes.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(["a", "b", "ab", "<s>", "</s>"])
    writer.add_token_types([1, 1, 1, 3, 3])
    writer.add_token_merges(changes.pop("merges", ["a b"]))
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(changes.pop("eos", 4))
    add_bos = changes.pop("add_bos", True)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    assert not changes, changes
    tensors = {}
    for name, shape in shapes.items():
        if name not in without:
            tensors[name] = generator.uniform(0.5, 2.0, shape).astype(np.float32)
            writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _load(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint, torch.device("cpu"), torch.float32, 16, _quiet)


def test_gguf_reads_every_weight_and_the_tokeniser(tmp_path: Path) -> None:
    stored = _write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf", _quiet)
    model = _load(checkpoint)
    config = checkpoint.config
    assert (config.num_layers, config.vocab_size, config.head_dim) == (1, VOCAB, HIDDEN // HEADS)
    assert config.eos_ids == {4} and config.tied_embeddings and not config.qkv_bias and not config.qk_norm
    assert checkpoint.codec is not None
    assert checkpoint.codec.encode("abba</s>") == [3, 2, 1, 0, 4]
    layer = model.layers[0]
    assert torch.equal(layer.gate_up, _stack(stored, "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"))
    assert torch.equal(layer.down, _stack(stored, "blk.0.ffn_down.weight"))
    assert torch.equal(model.output, _stack(stored, "token_embd.weight"))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2).double() / 8) / _stack(stored, "rope_freqs.weight").double()
    torch.testing.assert_close(model.rope.inv_freq, frequencies.float())
    torch.testing.assert_close(model.rope.cos_sin[7, :4], (7 * frequencies).cos().float())


@pytest.mark.parametrize(
    ("pre", "stated", "begins"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)]
)
def test_gguf_prompts_begin_with_bos_as_the_file_or_its_family_says(
    tmp_path: Path, pre: str, stated: bool | None, begins: bool
) -> None:
    _write_gguf(tmp_path / "m.gguf", pre=pre, add_bos=stated)
    codec = open_checkpoint(tmp_path / "m.gguf", _quiet).codec
    assert codec is not None
    assert codec.encode("ab") == ([3, 2] if begins else [2])


def _stack(stored: dict[str, Any], *names: str) -> Tensor:
    return torch.cat([torch.tensor(stored[name]) for name in names])


def test_gguf_llama_rows_come_back_to_half_pairs(tmp_path: Path) -> None:
    stored = _write_gguf(tmp_path / "m.gguf")
    layer = _load(open_checkpoint(tmp_path / "m.gguf", _quiet)).layers[0]
    dim = HIDDEN // HEADS
    for head in range(HEADS):
        for pair in range(dim // 2):
            for side in range(2):
                expected = stored["blk.0.attn_q.weight"][head * dim + 2 * pair + side]
                assert torch.equal(layer.qkv[head * dim + side * dim // 2 + pair], torch.tensor(expected))


def test_gguf_cut_anywhere_names_file_and_place(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1500, 37), *range(1500, len(whole), 501), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: (metadata after|tensor )"):
            open_checkpoint(cut, _quiet)
    with pytest.raises(ModelFileError, match=r"tensor blk\.0\.ffn_down\.weight: cut short"):
        open_checkpoint(cut, _quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "field general.architecture: 'mamba' is not one of llama, qwen2, qwen3"),
        ({"without": ["epsilon"]}, "field llama.attention.layer_norm_rms_epsilon: missing"),
        ({"without": ["token_embd.weight"]}, "tensor token_embd.weight: missing"),
        ({"tokenizer": "llama"}, "field tokenizer.ggml.model: 'llama' is not served"),
        ({"pre": "falcon"}, "field tokenizer.ggml.pre: 'falcon' is not one of"),
        ({"heads": 0}, "field llama.attention.head_count: 0 is not a positive int"),
        ({"kv_heads": [2, 2]}, "field llama.attention.head_count_kv: [2, 2] is not a positive int"),
        ({"epsilon": -1.0}, "field llama.attention.layer_norm_rms_epsilon: -1.0 is not a positive number"),
        ({"eos": 2**32 - 1}, "field tokenizer.ggml.eos_token_id: 4294967295 is not a token from 0 to 4"),
        ({"merges": ["b a"]}, "field tokenizer.ggml.merges: ('b', 'a') does not merge"),
    ],
)
def test_gguf_not_served_names_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(tmp_path / "m.gguf", _quiet)
    assert message in str(caught.value) and "m.gguf" in str(caught.value)


def test_missing_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "a.gguf", without=["blk.0.ffn_up.weight"])
    with pytest.raises(ModelFileError, match=r"a\.gguf: tensor model\.layers\.0\.mlp\.up_proj\.weight: missing"):
        _load(open_checkpoint(tmp_path / "a.gguf", _quiet))
    _write_gguf(tmp_path / "b.gguf", shapes={"blk.0.ffn_up.weight": (WIDTH, HIDDEN + 1)})
    with pytest.raises(ModelFileError, match=r"up_proj\.weight: shape \(32, 33\), expected \(32, 32\)"):
        _load(open_checkpoint(tmp_path / "b.gguf", _quiet))


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent.gguf", "does not exist"),
        (tmp_path, "config.json: file: does not exist"),
        (Path(__file__), "neither a .gguf file nor a folder"),
    ):
        with pytest.raises(ModelFileError, match=message):
            open_checkpoint(path, _quiet)


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(model_type="mamba"), "field model_type: 'mamba'"),
        (lambda raw: raw.pop("hidden_size"), "field hidden_size: missing"),
        (lambda raw: raw.update(num_attention_heads=0), "field num_attention_heads: 0 is not a positive int"),
        (lambda raw: raw.update(vocab_size="320"), "field vocab_size: '320' is not a positive int"),
        (lambda raw: raw.update(rms_norm_eps=None), "field rms_norm_eps: missing"),
        (lambda raw: raw.update(rms_norm_eps=0.0), "field rms_norm_eps: 0.0 is not a positive number"),
        (lambda raw: raw.update(eos_token_id=[2, 320]), "field eos_token_id: 320 is not a token from 0 to 319"),
        (lambda raw: raw.update(hidden_act="gelu"), "field hidden_act: 'gelu' is not served"),
        (lambda raw: raw.update(use_sliding_window=True), "field use_sliding_window: True"),
        (lambda raw: raw.update(rope_parameters={"rope_type": "dynamic"}), "field rope_type: 'dynamic'"),
        (lambda raw: raw.update(rope_parameters={"rope_type": "linear"}), "'factor': missing for type 'linear'"),
    ],
)
def test_folder_not_served_names_the_field(tiny: Any, tmp_path: Path, change: Change, message: str) -> None:
    raw = json.loads((tiny[0] / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(tmp_path, _quiet)
    assert message in str(caught.value)


def test_folder_with_a_cut_shard_names_it(tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny[0], tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=shard.name):
        _load(open_checkpoint(tmp_path, _quiet))
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"{shard.name}: file: does not exist"):
        _load(open_checkpoint(tmp_path, _quiet))


def test_rope_of_older_and_newer_configs(tiny: Any, tmp_path: Path) -> None:
    raw = json.loads((tiny[0] / "config.json").read_text())
    raw.pop("rope_parameters")
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for scaling, expected in (
        (None, None),
        ({"type": "linear", "factor": 2.0}, LinearScaling(2.0)),
        ({"rope_type": "llama3", **llama3}, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}, YarnScaling(4.0, 512, 16.0, 1.0, None)),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 5e5, "rope_scaling": scaling}))
        (tmp_path / "model.safetensors").write_bytes(_empty_safetensors())
        rope = open_checkpoint(tmp_path, _quiet).config.rope
        assert (rope.base, rope.scaling) == (5e5, expected)


def _empty_safetensors() -> bytes:
    header = b"{}      "
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "values", [{"max_batch": 0}, {"page_size": 2.5}, {"cuda_graphs": 1}, {"max_batch": 8, "max_step_tokens": 4}]
)
def test_engine_config_names_the_bad_value(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config.{list(values)[-1]}"):
        EngineConfig(**values)
