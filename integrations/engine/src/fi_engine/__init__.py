"""fi_engine: a small continuous-batching engine for Llama-family models."""

from .beam import Beam, beam_search
from .config import EngineConfig, ModelConfig
from .engine import Engine, Prompt
from .errors import ModelFileError, RequestError, StepError
from .request import Chunk, RequestHandle, RequestOutput, SampleOutput, TokenLogprobs
from .stats import EngineStats

__version__ = "0.1.0"

__all__ = [
    "Beam",
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
    "beam_search",
]
