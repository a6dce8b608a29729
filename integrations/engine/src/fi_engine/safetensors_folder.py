"""Llama-family models from a Hugging Face folder: config.json, safetensors (sharded or not), tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fi_core.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from .checkpoint import Checkpoint, Progress, positive_int, positive_number, token_id
from .config import ARCHITECTURES, ModelConfig
from .errors import ModelFileError
from .tokenizer import TextCodec


def open_folder(path: Path, progress: Progress) -> Checkpoint:
    """Open a model folder: configuration and tokeniser now, each tensor when it is read. Raises ModelFileError."""
    progress(f"reading {path.name}")
    raw = _json(path / "config.json")
    return Checkpoint(path, _config(path, raw), _Reader(path), _codec(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(path, "file", "does not exist") from None
    except ValueError as error:
        raise ModelFileError(path, "file", f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "file", "not a JSON object")
    return value


class _RawConfig:
    """config.json; errors name the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path / "config.json"
        self.values = values

    def get(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise ModelFileError(self.path, f"field {name}", "missing")
        return self.values[name]

    def count(self, name: str, default: int | None = None) -> int:
        return positive_int(self.path, name, self._given(name, default))

    def number(self, name: str, default: float | None = None) -> float:
        return positive_number(self.path, name, self._given(name, default))

    def _given(self, name: str, default: object) -> object:
        """The value, or ``default`` where it is absent or null."""
        return self.get(name) if default is None or self.values.get(name) is not None else default

    def require(self, name: str, expected: object) -> None:
        """Raise unless the field is absent or ``expected``: other values change the model in ways not served."""
        actual = self.values.get(name, expected)
        if actual != expected:
            raise ModelFileError(self.path, f"field {name}", f"{actual!r} is not served, {expected!r} is")


def _config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    raw = _RawConfig(path, values)
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        problem = f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        raise ModelFileError(raw.path, "field model_type", problem)
    raw.require("hidden_act", "silu")
    raw.require("attention_bias", False)
    raw.require("mlp_bias", False)
    raw.require("use_sliding_window", False)
    num_heads, hidden_size = raw.count("num_attention_heads"), raw.count("hidden_size")
    head_dim = raw.count("head_dim", hidden_size // num_heads)
    vocab_size = raw.count("vocab_size")
    return ModelConfig(
        architecture=architecture,
        num_layers=raw.count("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=raw.count("intermediate_size"),
        num_qo_heads=num_heads,
        num_kv_heads=raw.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position=raw.count("max_position_embeddings"),
        norm_eps=raw.number("rms_norm_eps"),
        rope=_rope(raw, head_dim),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_ids=_eos_ids(path, values, vocab_size),
    )


def _eos_ids(path: Path, values: Mapping[str, Any], vocab_size: int) -> frozenset[int]:
    source, generation = path / "config.json", path / "generation_config.json"
    found = values.get("eos_token_id")
    if generation.exists() and (stated := _json(generation).get("eos_token_id")) is not None:
        source, found = generation, stated
    if found is None:
        return frozenset()
    listed = found if isinstance(found, list) else [found]
    return frozenset(token_id(source, "eos_token_id", item, vocab_size) for item in listed)


def _rope(raw: _RawConfig, head_dim: int) -> RopeConfig:
    """From ``rope_parameters``, or from the older pair ``rope_theta`` and ``rope_scaling``."""
    values = raw.values
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta"),
        **(values.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    rotary_dim = int(head_dim * float(rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0))
    base = float(rope.get("rope_theta") or 10000.0)
    try:
        scaling = _scaling(kind, rope, raw.count("max_position_embeddings"))
    except KeyError as error:
        raise ModelFileError(raw.path, f"field rope scaling {error}", f"missing for type {kind!r}") from None
    if scaling is None and kind != "default":
        problem = f"{kind!r} is not one of default, linear, llama3, yarn"
        raise ModelFileError(raw.path, "field rope_type", problem)
    return RopeConfig(rotary_dim, base, "half", scaling)


def _scaling(
    kind: str, rope: Mapping[str, Any], max_position: int
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "linear":
        return LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return YarnScaling(
            float(rope["factor"]),
            int(rope.get("original_max_position_embeddings") or max_position),
            float(rope.get("beta_fast") or 32.0),
            float(rope.get("beta_slow") or 1.0),
            rope.get("attention_factor"),
        )
    return None


class _Reader:
    """Reads tensors from one or several safetensors files; opens each file at its first use."""

    def __init__(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        self._open: dict[Path, Any] = {}
        if index.exists():
            weight_map = _json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelFileError(index, "field weight_map", "missing")
            self._files = {name: path / file for name, file in weight_map.items()}
        else:
            single = path / "model.safetensors"
            self._files = dict.fromkeys(self._file(single).keys(), single)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise ModelFileError(path, "file", "does not exist") from None
            except SafetensorError as error:
                raise ModelFileError(path, "file", f"not a complete safetensors file ({error})") from error
        return self._open[path]

    def __call__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            tensor: Tensor = self._file(path).get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(path, f"tensor {name}", str(error)) from error
        if not tensor.is_floating_point():
            raise ModelFileError(path, f"tensor {name}", f"dtype {tensor.dtype} is not served (quantised weights)")
        return tensor


def _codec(path: Path) -> TextCodec | None:
    """The tokeniser of the folder, or None when it has no tokenizer.json (then prompts are token ids)."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    if "model" not in _json(file):
        raise ModelFileError(file, "field model", "missing")
    tokenizer = Tokenizer.from_file(str(file))
    settings = _json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    template_file = path / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    texts = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    specials = {name: text["content"] if isinstance(text, dict) else text for name, text in texts.items() if text}
    return TextCodec(tokenizer, prefix_ids=None, chat_template=template, special_texts=specials)
