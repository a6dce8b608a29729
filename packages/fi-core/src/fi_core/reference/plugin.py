"""The reference backend's plugin: every operation, on every device, all that the contracts allow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..contract import Anything, Between, KernelEntry, OneOf, Rule, SubsetOf
from ..hookspecs import BackendInfo, hookimpl
from ..ops.arguments import FLOAT_DTYPES
from ..ops.quantised_output import OUT_FORMATS
from ..ops.sampling_arguments import MAX_VOCAB
from ..records import ATTENTION_FEATURES, KV_FORMATS, Q_FORMATS
from ..registry import KernelRegistry
from ..sampling import FILTERS, PENALTIES

NAME = "reference"

_FLOATS = OneOf(*FLOAT_DTYPES)
_SIZE = Between(1)
_KV: dict[str, Rule] = {
    "dtype": _FLOATS,
    "kv_format": OneOf(*KV_FORMATS),
    "head_dim": _SIZE,
    "head_dim_vo": _SIZE,
    "page_size": Anything(),
    "kv_layout": OneOf("NHD", "HND"),
}
_VOCABULARY = Between(1, MAX_VOCAB)
_LOGITS: dict[str, Rule] = {"dtype": _FLOATS, "vocab_size": _VOCABULARY}
_FILTERED: dict[str, Rule] = {**_LOGITS, "filters": SubsetOf(*FILTERS), "order": OneOf("sequential", "joint")}

RULES: Mapping[str, Mapping[str, Rule]] = {
    "attention": {
        **_KV,
        "group_size": _SIZE,
        "table": OneOf("dense", "indptr", "ragged"),
        "causal": OneOf(False, True),
        "windowed": OneOf(False, True),
        "features": SubsetOf(*sorted(ATTENTION_FEATURES)),
        "batch_invariant": OneOf(False, True),
        "max_q_len": _SIZE,
        "levels": OneOf(False, True),
        "q_format": OneOf(*Q_FORMATS),
        "rope": OneOf("none", "q", "qk"),
        "rope_pairs": OneOf("none", "half", "interleaved"),
        "rotary_dim": Between(0, multiple_of=2),
    },
    "append_kv": {
        **_KV,
        "addressing": OneOf("dense", "indptr", "ragged", "slots"),
        "rope": OneOf("none", "half", "interleaved"),
        "rope_source": OneOf("none", "table", "computed"),
    },
    "copy_pages": {
        **{name: rule for name, rule in _KV.items() if name != "dtype"},
        "placement": OneOf("device", "from_host", "to_host"),
    },
    "find_shared_prefixes": {"table": OneOf("dense", "indptr"), "max_depth": Between(1, 8)},
    "merge_states": {"dtype": _FLOATS, "head_dim": _SIZE},
    "rope": {
        "dtype": _FLOATS,
        "head_dim": _SIZE,
        "rotary_dim": Between(2, multiple_of=2),
        "pairs": OneOf("half", "interleaved"),
        "source": OneOf("table", "computed"),
    },
    "rmsnorm": {"dtype": _FLOATS, "hidden_size": _SIZE, "out_format": OneOf(*OUT_FORMATS)},
    "add_rmsnorm": {"dtype": _FLOATS, "hidden_size": _SIZE, "out_format": OneOf(*OUT_FORMATS)},
    "silu_mul": {"dtype": _FLOATS, "width": _SIZE},
    "gelu_mul": {"dtype": _FLOATS, "width": _SIZE, "approximate": OneOf("none", "tanh")},
    "sample": {**_FILTERED, "penalties": SubsetOf(*PENALTIES), "slots": OneOf(False, True)},
    "filter_logits": {**_FILTERED, "kind": OneOf("logits", "probs")},
    "top_k": {**_LOGITS, "k": _SIZE},
    "logprobs": {**_LOGITS, "top_n": Between(0)},
    "penalize_logits": {**_LOGITS, "parts": SubsetOf(*PENALTIES), "counts": OneOf("none", "dense", "sparse")},
    "record_tokens": {"capacity": _SIZE},
    "verify_chain": {"vocab_size": _VOCABULARY, "num_draft": Between(0), "has_draft_probs": OneOf(False, True)},
    "verify_tree": {"vocab_size": _VOCABULARY, "num_draft": _SIZE},
}
"""What each operation's contract allows; the reference serves all of it."""

_MODULES = {
    "attention": "attention",
    "append_kv": "append_kv",
    "copy_pages": "copy_pages",
    "find_shared_prefixes": "prefixes",
    "merge_states": "merge_states",
    "rope": "rope",
    "rmsnorm": "norms",
    "add_rmsnorm": "norms",
    "silu_mul": "activations",
    "gelu_mul": "activations",
}


def load(op: str) -> Any:
    """The reference implementation of an operation."""
    module = importlib.import_module(f"fi_core.reference.{_MODULES.get(op, 'sampling')}")
    return module.load_kernel() if op == "attention" else getattr(module, op)


@hookimpl
def fi_backend() -> BackendInfo:
    from .. import __version__

    return BackendInfo(NAME, __version__, "torch reference for every operation, on any device", priority=0)


@hookimpl
def fi_register_kernels(registry: KernelRegistry) -> None:
    for op, rules in RULES.items():
        devices = ("cpu", "cuda")
        registry.add(KernelEntry(op, op, NAME, rules, partial(load, op), devices))
