"""fi: one contract, many backends for the kernels of LLM inference.

Importing this package loads no backend and touches no GPU; plugins are discovered at the first use of the registry.
"""

from .contract import (
    EXACT,
    Anything,
    Between,
    Case,
    Condition,
    Cost,
    KernelEntry,
    OneOf,
    Operation,
    Request,
    Rule,
    SubsetOf,
    Target,
    Tolerance,
    Trial,
    target_of,
)
from .errors import (
    ArgumentError,
    CapacityError,
    FiError,
    IndexCheckError,
    LayoutError,
    PluginError,
    SettingsError,
    ShadowMismatchError,
    UnknownBackendError,
    UnsupportedError,
)
from .explain import backends, explain
from .hookspecs import BackendInfo, hookimpl
from .ops.add_rmsnorm import add_rmsnorm
from .ops.append_kv import append_kv
from .ops.attention import attention, lse_base2
from .ops.copy_pages import copy_pages
from .ops.filter_logits import filter_logits
from .ops.find_shared_prefixes import find_shared_prefixes
from .ops.gelu_mul import gelu_mul
from .ops.logprobs import logprobs
from .ops.merge_states import merge_states
from .ops.penalize_logits import penalize_logits
from .ops.record_tokens import record_tokens
from .ops.rmsnorm import rmsnorm
from .ops.rope import rope
from .ops.sample import sample
from .ops.silu_mul import silu_mul
from .ops.top_k import top_k
from .ops.verify_chain import verify_chain
from .ops.verify_tree import verify_tree
from .plan import Plan, plan
from .prefixes import SharedPrefixes
from .records import AttentionSpec, Batch, Capacity, KVCache, LayerArgs, PackedMask
from .registry import KernelRegistry, PluginStatus, Selection, use
from .rope import FusedRope, LinearScaling, Llama3Scaling, RopeConfig, RopeTable, YarnScaling
from .sampling import DrawKeys, FilterParams, LogprobsOut, PenaltyParams, TokenHistory
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "EXACT",
    "Anything",
    "ArgumentError",
    "AttentionSpec",
    "BackendInfo",
    "Batch",
    "Between",
    "Capacity",
    "CapacityError",
    "Case",
    "Condition",
    "Cost",
    "DrawKeys",
    "FiError",
    "FilterParams",
    "FusedRope",
    "IndexCheckError",
    "KVCache",
    "KernelEntry",
    "KernelRegistry",
    "LayerArgs",
    "LayoutError",
    "LinearScaling",
    "Llama3Scaling",
    "LogprobsOut",
    "OneOf",
    "Operation",
    "PackedMask",
    "PenaltyParams",
    "Plan",
    "PluginError",
    "PluginStatus",
    "Request",
    "RopeConfig",
    "RopeTable",
    "Rule",
    "Selection",
    "Settings",
    "SettingsError",
    "ShadowMismatchError",
    "SharedPrefixes",
    "SubsetOf",
    "Target",
    "TokenHistory",
    "Tolerance",
    "Trial",
    "UnknownBackendError",
    "UnsupportedError",
    "YarnScaling",
    "add_rmsnorm",
    "append_kv",
    "attention",
    "backends",
    "copy_pages",
    "explain",
    "filter_logits",
    "find_shared_prefixes",
    "gelu_mul",
    "hookimpl",
    "logprobs",
    "lse_base2",
    "merge_states",
    "penalize_logits",
    "plan",
    "record_tokens",
    "rmsnorm",
    "rope",
    "sample",
    "silu_mul",
    "target_of",
    "top_k",
    "use",
    "verify_chain",
    "verify_tree",
]
