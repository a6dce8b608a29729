"""The support matrix: what each installed backend declares, as a Markdown table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from .contract import KernelEntry, Operation, Target
from .errors import ArgumentError
from .registry import KernelRegistry, registry

BEGIN = "<!-- support-matrix:begin -->"
END = "<!-- support-matrix:end -->"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TARGETS = {"cuda": Target("cuda", (9, 0)), "cpu": Target("cpu")}

Changes = Mapping[str, Hashable]

ROWS: Mapping[str, Mapping[str, Changes]] = {
    "attention": {
        "decode": {},
        "prefill and mixed batches": {"max_q_len": 8192},
        "multi-query, group of 8 or more": {"group_size": 8},
        "head_dim 64": {"head_dim": 64, "head_dim_vo": 64},
        "head_dim 256": {"head_dim": 256, "head_dim_vo": 256},
        "pages of 1 token": {"page_size": 1},
        "pages of 64 tokens": {"page_size": 64},
        "HND pages": {"kv_layout": "HND"},
        "table as indptr and indices": {"table": "indptr"},
        "ragged KV": {"table": "ragged", "page_size": None, "max_q_len": 8192},
        "FP8 e4m3 KV": {"kv_format": "fp8_e4m3"},
        "sliding window": {"windowed": True},
        "soft cap": {"features": frozenset({"soft_cap"})},
        "sinks": {"features": frozenset({"sinks"})},
        "ALiBi": {"features": frozenset({"alibi"})},
        "custom mask": {"features": frozenset({"mask"}), "max_q_len": 64},
        "log-sum-exp output": {"features": frozenset({"lse"})},
        "not causal": {"causal": False, "max_q_len": 8192},
        "batch-invariant": {"batch_invariant": True},
        "shared prefixes": {"levels": True},
        "FP8 e4m3 queries and KV": {"q_format": "fp8_e4m3", "kv_format": "fp8_e4m3"},
        "RoPE fused, queries and unrotated keys": {"rope": "qk", "rope_pairs": "half", "rotary_dim": 128},
    },
    "append_kv": {
        "paged": {},
        "slots": {"addressing": "slots"},
        "ragged": {"addressing": "ragged", "page_size": None},
        "RoPE fused": {"rope": "half", "rope_source": "table"},
        "FP8 e4m3": {"kv_format": "fp8_e4m3"},
    },
    "copy_pages": {"on one device": {}, "pinned host memory": {"placement": "from_host"}},
    "rope": {"table": {}, "computed angles": {"source": "computed"}, "interleaved pairs": {"pairs": "interleaved"}},
    "rmsnorm": {"": {}, "FP8 e4m3 output": {"out_format": "fp8_e4m3"}},
    "add_rmsnorm": {"": {}, "FP8 e4m3 output": {"out_format": "fp8_e4m3"}},
    "sample": {
        "top-k, top-p": {},
        "min-p": {"filters": frozenset({"min_p"})},
        "typical-p": {"filters": frozenset({"typical_p"})},
        "joint filters": {"order": "joint"},
    },
    "verify_chain": {"draw and match": {}, "with draft probabilities": {"has_draft_probs": True}},
}
"""Rows of an operation: a label and the changes to its typical request; others have one row without a label."""


def support_matrix(current: KernelRegistry | None = None) -> str:
    """The table: a row an operation and feature, a column a backend (best priority first).

    A cell lists the dtypes for which some kernel of the backend declares that it serves the row's request ("yes" where
    the request has no dtype), on CUDA sm_90 or, for backends without CUDA, on the CPU; "-" is none.
    """
    current = registry() if current is None else current
    names = sorted(current.backends, key=lambda name: (-current.backends[name].priority, name))
    devices = {name: _device_of(current, name) for name in names}
    lines = [
        "| operation | " + " | ".join(f"{name} ({devices[name]})" if devices[name] else name for name in names) + " |"
    ]
    lines.append("|---" * (len(names) + 1) + "|")
    for operation in current.operations.values():
        for label, changes in ROWS.get(operation.name, {"": {}}).items():
            cells = [_cell(current, operation, name, devices[name], changes) for name in names]
            title = f"{operation.name}: {label}" if label else operation.name
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _device_of(current: KernelRegistry, backend: str) -> str | None:
    """The device type that the backend's column is about; None for a backend without kernels."""
    served = {device for entry in current.kernels() if entry.backend == backend for device in entry.devices}
    return next((device for device in _TARGETS if device in served), None)


def _cell(current: KernelRegistry, operation: Operation, backend: str, device: str | None, changes: Changes) -> str:
    entries = [entry for entry in current.kernels(operation.name) if entry.backend == backend]
    if device is None or not entries:
        return "-"
    if "dtype" not in operation.fields:
        return "yes" if _serves(entries, operation, device, changes) else "-"
    served = []
    for name, dtype in _DTYPES.items():
        values: dict[str, Hashable] = {"dtype": dtype}
        if "kv_format" in operation.fields:
            values["kv_format"] = name
        if _serves(entries, operation, device, {**values, **changes}):
            served.append(name)
    return " ".join(served) or "-"


def _serves(entries: Sequence[KernelEntry], operation: Operation, device: str, changes: Changes) -> bool:
    request = operation.request(_TARGETS[device], **{**operation.typical, **changes})
    return any(not entry.reject(request) for entry in entries)


def update_text(text: str, matrix: str) -> str:
    """``text`` with what stands between the markers replaced by ``matrix``; ArgumentError without both markers once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ArgumentError("text", f"the markers {BEGIN} and {END}, once and in this order", "a text without")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{matrix}\n{END}{rest.split(END)[1]}"
