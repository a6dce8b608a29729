"""What a model file offers, whatever its format: a configuration, named tensors and a tokeniser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .config import ModelConfig
from .errors import ModelFileError
from .tokenizer import TextCodec

Progress = Callable[[str], None]
"""Receives short lines on long work, such as loading."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened model.

    ``read(name)`` gives a tensor by its Hugging Face name (``model.layers.0.self_attn.q_proj.weight``), CPU, floating,
    rows of q and k in the order that RoPE on half pairs wants; it raises KeyError for an unknown name. ``codec`` is None
    when the checkpoint has no tokeniser. ``rope_divisors`` float32 [rotary_dim / 2] divide the RoPE frequencies.
    """

    path: Path
    config: ModelConfig
    read: Callable[[str], Tensor]
    codec: TextCodec | None
    rope_divisors: Tensor | None = None

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; raises ModelFileError unless it is there and has ``shape``."""
        try:
            found = self.read(name)
        except KeyError:
            raise ModelFileError(self.path, f"tensor {name}", "missing") from None
        if tuple(found.shape) != shape:
            raise ModelFileError(self.path, f"tensor {name}", f"shape {tuple(found.shape)}, expected {shape}")
        return found


def positive_int(path: Path, field: str, value: object) -> int:
    """``value`` of a field of the file; raises ModelFileError unless it is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelFileError(path, f"field {field}", f"{value!r} is not a positive int")
    return value


def positive_number(path: Path, field: str, value: object) -> float:
    """``value`` of a field of the file; raises ModelFileError unless it is a positive finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelFileError(path, f"field {field}", f"{value!r} is not a positive number")
    return float(value)


def token_id(path: Path, field: str, value: object, vocab_size: int) -> int:
    """``value`` of a field of the file; raises ModelFileError unless it is a token of the vocabulary."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ModelFileError(path, f"field {field}", f"{value!r} is not a token from 0 to {vocab_size - 1}")
    return value


def open_checkpoint(path: str | Path, progress: Progress) -> Checkpoint:
    """Open a ``.gguf`` file, or a folder with config.json and safetensors; raises ModelFileError."""
    from .gguf_file import open_gguf
    from .safetensors_folder import open_folder

    path = Path(path)
    if path.is_dir():
        return open_folder(path, progress)
    if not path.exists():
        raise ModelFileError(path, "file", "does not exist")
    if path.suffix != ".gguf":
        raise ModelFileError(path, "file", "is neither a .gguf file nor a folder with config.json and safetensors")
    return open_gguf(path, progress)
