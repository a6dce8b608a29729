"""fi_engine: a small continuous-batching engine for Llama-family models."""

from .config import EngineConfig, ModelConfig
from .engine import Engine, EngineStats, Prompt
from .errors import ModelFileError, RequestError, StepError
from .request import Chunk, RequestHandle, RequestOutput, SampleOutput, TokenLogprobs

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "ModelConfig",
    "ModelFileError",
    "Prompt",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "SampleOutput",
    "StepError",
    "TokenLogprobs",
]
