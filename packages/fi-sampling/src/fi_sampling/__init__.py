"""fi_sampling: what a serving engine puts around ``fi_core.sample``.

Request parameters, device columns that turn them into few operation calls, an extensible typed pipeline, stop strings
and speculative verification. Kernels live behind ``fi_core``'s operations.
"""

from .builtin import BUILTIN_OPS, BUILTIN_RULES, DEFAULT_OPS
from .columns import SamplingLimits
from .params import SamplingParams
from .pipeline import FusionRule, Kind, LogitsOp, Pipeline, PipelineTypeError, ProcessorError, Step, logits_op
from .plugins import fusion_rules, logits_ops, pipeline_of
from .speculative import ChainVerdict, TreeVerdict, verify_chain, verify_tree
from .state import SampleResult, SamplingState
from .stop import StopChecker, StopEvent

__version__ = "0.1.0"

__all__ = [
    "BUILTIN_OPS",
    "BUILTIN_RULES",
    "DEFAULT_OPS",
    "ChainVerdict",
    "FusionRule",
    "Kind",
    "LogitsOp",
    "Pipeline",
    "PipelineTypeError",
    "ProcessorError",
    "SampleResult",
    "SamplingLimits",
    "SamplingParams",
    "SamplingState",
    "Step",
    "StopChecker",
    "StopEvent",
    "TreeVerdict",
    "fusion_rules",
    "logits_op",
    "logits_ops",
    "pipeline_of",
    "verify_chain",
    "verify_tree",
]
