"""What the CUDA kernels serve; importing this imports no kernel and touches no driver."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fi_core.contract import Anything, Between, Condition, KernelEntry, OneOf, Request, Rule, SubsetOf
from fi_core.ops.sampling_arguments import MAX_VOCAB
from fi_core.records import ATTENTION_FEATURES, KV_FORMATS, Q_FORMATS, format_of
from fi_core.sampling import FILTERS, PENALTIES

BACKEND = "cuda"
MIN_CAPABILITY = (8, 0)
BARRIER_CAPABILITY = (9, 0)  # of barriers in shared memory that copies complete
WARPGROUP_CAPABILITY = (9, 0)  # of warpgroups' matrix products, which no other architecture has

_MAX_NORM_WIDTH = 16384  # a row stays in the registers of one block
_MAX_ROPE_DIM = 1024  # a head's units are threads of one block
_MAX_APPEND_DIM = 512  # likewise
_MAX_COPY_DIM = 1024  # blocks of a page are the rows of a grid, of which there are 65535
_MAX_WIDTH = 2**26

_FLOATS: Mapping[str, Rule] = {"dtype": OneOf(torch.float32, torch.float16, torch.bfloat16)}
_NORM: Mapping[str, Rule] = {
    **_FLOATS,
    "hidden_size": Between(1, _MAX_NORM_WIDTH),
    "out_format": OneOf("same", "fp8_e4m3", "fp8_e5m2"),
}

_RULES: Mapping[str, Mapping[str, Rule]] = {
    "rmsnorm": _NORM,
    "add_rmsnorm": _NORM,
    "silu_mul": {**_FLOATS, "width": Between(1, _MAX_WIDTH)},
    "gelu_mul": {**_FLOATS, "width": Between(1, _MAX_WIDTH), "approximate": OneOf("none", "tanh")},
    "rope": {
        **_FLOATS,
        "head_dim": Between(2, _MAX_ROPE_DIM),
        "rotary_dim": Between(2, _MAX_ROPE_DIM, multiple_of=2),
        "pairs": OneOf("half", "interleaved"),
        "source": OneOf("table", "computed"),
    },
    "append_kv": {
        **_FLOATS,
        "kv_format": OneOf(*KV_FORMATS),
        "head_dim": Between(1, _MAX_APPEND_DIM),
        "head_dim_vo": Between(1, _MAX_APPEND_DIM),
        "page_size": Anything(),  # the contract's own limits: 1 to 256, or None with a ragged cache
        "kv_layout": OneOf("NHD", "HND"),
        "addressing": OneOf("dense", "indptr", "ragged", "slots"),
        "rope": OneOf("none", "half", "interleaved"),
        "rope_source": OneOf("none", "table", "computed"),
    },
    "copy_pages": {
        "kv_format": OneOf(*KV_FORMATS),
        "head_dim": Between(1, _MAX_COPY_DIM),
        "head_dim_vo": Between(1, _MAX_COPY_DIM),
        "page_size": Anything(),  # the contract's own limits
        "kv_layout": OneOf("NHD", "HND"),
        "placement": OneOf("device", "from_host", "to_host"),
    },
    "merge_states": {**_FLOATS, "head_dim": Between(1, _MAX_WIDTH)},
}

_STEMS = {"add_rmsnorm": "rmsnorm", "silu_mul": "gated_activation", "gelu_mul": "gated_activation"}


def _loader(op: str) -> Callable[[], Any]:
    def load() -> Any:
        return getattr(importlib.import_module(f"fi_cuda.kernels.{_STEMS.get(op, op)}"), op)

    return load


ENTRIES: list[KernelEntry] = [
    KernelEntry(op, op, BACKEND, rules, _loader(op), devices=("cuda",), min_capability=MIN_CAPABILITY)
    for op, rules in _RULES.items()
]
"""One kernel for each operation."""

_MAX_GROUP = 1024  # the scheduler's own limit
MAX_SHORT_QUERY = 16
"""New tokens of a request up to which plans are of short queries."""
_HEAD_DIM = Between(
    16, 256, multiple_of=16
)  # rows are moved in units of 16 bytes and multiplied in units of 16 elements

_SHORT_QUERIES: Mapping[str, Rule] = {
    "dtype": OneOf(torch.float16, torch.bfloat16),
    "kv_format": OneOf("fp16", "bf16", "fp8_e4m3", "fp8_e5m2"),
    "head_dim": _HEAD_DIM,
    "head_dim_vo": _HEAD_DIM,
    "group_size": Between(1, _MAX_GROUP),
    "page_size": Anything(),
    "kv_layout": OneOf("NHD", "HND"),
    "table": OneOf("dense", "indptr", "ragged"),
    "causal": Anything(),
    "windowed": Anything(),
    "features": SubsetOf(*ATTENTION_FEATURES),
    "batch_invariant": Anything(),
    "max_q_len": Between(1, MAX_SHORT_QUERY),
    "levels": OneOf(False),
    "q_format": OneOf(*Q_FORMATS),
    "rope": OneOf("none", "q", "qk"),
    "rope_pairs": OneOf("none", "half", "interleaved"),
    "rotary_dim": Between(0, multiple_of=16),  # steps of the product rotate as a whole
}

_MAX_LONG_GROUP = 64  # a token's query heads of a KV head lie in the rows of one warpgroup

_LONG_QUERIES: Mapping[str, Rule] = {
    **_SHORT_QUERIES,
    "group_size": Between(1, _MAX_LONG_GROUP),
    "max_q_len": Between(MAX_SHORT_QUERY + 1),
    "q_format": OneOf("same"),
    "rope": OneOf("none"),
    "rope_pairs": OneOf("none"),
    "rotary_dim": Between(0, 0),
}
_APART_QUERIES: Mapping[str, Rule] = {**_SHORT_QUERIES, "group_size": Between(1, _MAX_LONG_GROUP)}
_LONG_FP8_QUERIES: Mapping[str, Rule] = {
    **_LONG_QUERIES,
    "kv_format": OneOf("fp8_e4m3"),
    "head_dim": Between(32, 256, multiple_of=32),  # elements of the inner dim of one product
    "q_format": OneOf("fp8_e4m3"),
}
_LONG_ROTATED_QUERIES: Mapping[str, Rule] = {
    **_LONG_QUERIES,
    **{name: _SHORT_QUERIES[name] for name in ("rope_pairs", "rotary_dim")},
    "rope": OneOf("q"),
}

_LEVELS: Mapping[str, Rule] = {
    "levels": OneOf(True),
    "table": OneOf("dense", "indptr"),
    "batch_invariant": OneOf(False),
}
_SHARED_PREFIXES: Mapping[str, Rule] = {**_LONG_QUERIES, "max_q_len": Between(1)}
_SHARED_FP8_PREFIXES: Mapping[str, Rule] = {**_LONG_FP8_QUERIES, "max_q_len": Between(1)}
_SHARED_ROTATED_PREFIXES: Mapping[str, Rule] = {**_LONG_ROTATED_QUERIES, "max_q_len": Between(1)}


def _same_or_fp8(request: Request) -> bool:
    return request["kv_format"] in (format_of(request["dtype"]), "fp8_e4m3", "fp8_e5m2")


def _pairs_in_lanes(request: Request) -> bool:
    return request["rope_pairs"] != "half" or int(request["rotary_dim"]) % 32 == 0


_PAIRS_IN_LANES = Condition("a rotary_dim that 32 divides with rope_pairs 'half'", _pairs_in_lanes)
_SHORT_PAIRS_IN_LANES = Condition(
    f"a rotary_dim that 32 divides with rope_pairs 'half' and at most {MAX_SHORT_QUERY} new tokens",
    lambda request: request["max_q_len"] > MAX_SHORT_QUERY or _pairs_in_lanes(request),
)


def _on_hopper(request: Request) -> bool:
    capability = request.target.capability
    return capability is None or capability[0] == WARPGROUP_CAPABILITY[0]


def _sampling_loader(name: str) -> Callable[[], Any]:
    module = _SAMPLING_MODULES.get(name, name)
    return lambda: getattr(importlib.import_module(f"fi_cuda.kernels.sampling.{module}"), name)


_MAX_TOP_K = 2048  # they are sorted in the shared memory of one block

_VOCABULARY: Mapping[str, Rule] = {**_FLOATS, "vocab_size": Between(1, MAX_VOCAB)}
_FILTERING: Mapping[str, Rule] = {
    **_VOCABULARY,
    "filters": SubsetOf("top_k", "top_p", "min_p"),
    "order": OneOf("sequential", "joint"),
}

_SAMPLING_RULES: Mapping[str, Mapping[str, Rule]] = {
    "sample": {**_FILTERING, "penalties": SubsetOf(), "slots": OneOf(False)},
    "sample_columns": {
        **_FILTERING,
        "filters": SubsetOf(*FILTERS),
        "penalties": SubsetOf(*PENALTIES),
        "slots": OneOf(False, True),
    },
    "filter_logits": {**_FILTERING, "kind": OneOf("logits", "probs")},
    "top_k": {**_VOCABULARY, "k": Between(1, _MAX_TOP_K)},
    "logprobs": {**_VOCABULARY, "top_n": Between(0, _MAX_TOP_K)},
    "penalize_logits": {**_VOCABULARY, "parts": SubsetOf(*PENALTIES), "counts": OneOf("none", "dense", "sparse")},
    "record_tokens": {"capacity": Between(1)},
    "verify_chain": {
        "vocab_size": Between(1, MAX_VOCAB),
        "num_draft": Anything(),
        "has_draft_probs": OneOf(False, True),
    },
    "verify_tree": {"vocab_size": Between(1, MAX_VOCAB), "num_draft": Anything()},
}

_SAMPLING_OPERATIONS = {"sample_columns": "sample"}
"""Of kernels that are not named like it."""

_SAMPLING_MODULES = {"sample_columns": "sample", "logprobs": "top_k", "verify_chain": "verify", "verify_tree": "verify"}

_MAX_TWO_ROWS = 2**18  # of which a cluster holds two


def _rows_fit(request: Request) -> bool:
    return not request["has_draft_probs"] or int(request["vocab_size"]) <= _MAX_TWO_ROWS


_SAMPLING_CONDITIONS = {
    "verify_chain": (Condition(f"a vocabulary of at most {_MAX_TWO_ROWS} with draft probabilities", _rows_fit),)
}

SAMPLING_ENTRIES: list[KernelEntry] = [
    KernelEntry(
        _SAMPLING_OPERATIONS.get(name, name),
        name,
        BACKEND,
        rules,
        _sampling_loader(name),
        devices=("cuda",),
        min_capability=BARRIER_CAPABILITY,
        conditions=(Condition("a Hopper GPU", _on_hopper), *_SAMPLING_CONDITIONS.get(name, ())),
    )
    for name, rules in _SAMPLING_RULES.items()
]
"""Kernels of sampling: a row of logits lies in the shared memory of a cluster of blocks."""


def _load_attention_decode() -> Any:
    return importlib.import_module("fi_cuda.kernels.attention.mixed_state").attention_short


def _load_attention_prefill() -> Any:
    return importlib.import_module("fi_cuda.kernels.attention.mixed_state").attention_mixed


def _load_attention_prefix() -> Any:
    return importlib.import_module("fi_cuda.kernels.attention.prefix_state").attention_prefix


def _load_attention_apart() -> Any:
    return importlib.import_module("fi_cuda.kernels.attention.prefix_state").attention_apart


LONG_ATTENTION_ENTRIES: list[KernelEntry] = [
    KernelEntry(
        "attention",
        name,
        BACKEND,
        rules,
        _load_attention_prefill,
        devices=("cuda",),
        min_capability=WARPGROUP_CAPABILITY,
        conditions=(
            Condition("a Hopper GPU", _on_hopper),
            Condition("K and V in q's dtype or in FP8", _same_or_fp8),
        ),
    )
    for name, rules in (
        ("attention_prefill", _LONG_QUERIES),
        ("attention_prefill_fp8", _LONG_FP8_QUERIES),
        ("attention_prefill_rotated", _LONG_ROTATED_QUERIES),
    )
]
"""Kernels of attention whose plans have the prefill kernel."""


def _levels_entry(name: str, rules: Mapping[str, Rule], load: Callable[[], Any], *more: Condition) -> KernelEntry:
    conditions = (
        Condition("a Hopper GPU", _on_hopper),
        Condition("K and V in q's dtype or in FP8", _same_or_fp8),
        *more,
    )
    rules, least = {**rules, **_LEVELS}, WARPGROUP_CAPABILITY
    return KernelEntry("attention", name, BACKEND, rules, load, ("cuda",), min_capability=least, conditions=conditions)


_PREFIX_ENTRIES = [
    _levels_entry("attention_prefix", _SHARED_PREFIXES, _load_attention_prefix),
    _levels_entry("attention_prefix_fp8", _SHARED_FP8_PREFIXES, _load_attention_prefix),
    _levels_entry("attention_prefix_rotated", _SHARED_ROTATED_PREFIXES, _load_attention_prefix, _SHORT_PAIRS_IN_LANES),
]
_NOT_PREFIX = Condition(
    "what no kernel for levels serves", lambda request: all(e.reject(request) for e in _PREFIX_ENTRIES)
)

ATTENTION_ENTRIES: list[KernelEntry] = [
    KernelEntry(
        "attention",
        "attention_decode",
        BACKEND,
        _SHORT_QUERIES,
        _load_attention_decode,
        devices=("cuda",),
        min_capability=BARRIER_CAPABILITY,
        conditions=(Condition("K and V in q's dtype or in FP8", _same_or_fp8), _PAIRS_IN_LANES),
    ),
    *LONG_ATTENTION_ENTRIES,
    *_PREFIX_ENTRIES,
    # Levels are accepted, and requests read their keys each for itself.
    _levels_entry("attention_prefix_apart", _APART_QUERIES, _load_attention_apart, _PAIRS_IN_LANES, _NOT_PREFIX),
]
"""Kernels of attention, each for some lengths of queries."""
