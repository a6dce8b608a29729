"""What a model file offers, whatever its format: a configuration, named tensors and a tokeniser."""

from __future__ import annotations

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
