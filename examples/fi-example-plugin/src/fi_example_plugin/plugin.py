"""What fi sees of this backend: its name, and exactly which requests its one kernel serves."""

import importlib
import os

import torch
from fi_core.contract import Between, KernelEntry, OneOf, SubsetOf
from fi_core.hookspecs import BackendInfo, hookimpl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)

RULES = {
    "dtype": OneOf(*FLOATS),  # Triton's interpreter rounds bfloat16 wrongly
    "kv_format": OneOf("fp16", "bf16", "fp32"),
    "head_dim": OneOf(64),
    "head_dim_vo": OneOf(64),
    "group_size": Between(1),
    "page_size": Between(1, 256),
    "kv_layout": OneOf("NHD", "HND"),
    "table": OneOf("dense"),
    "causal": OneOf(True, False),  # one query token stands at the end: both are the same
    "windowed": OneOf(False),
    "features": SubsetOf(),
    "batch_invariant": OneOf(True, False),  # one program a request and head, whatever else is in the batch
    "max_q_len": OneOf(1),
    "levels": OneOf(False),
    "q_format": OneOf("same"),
    "rope": OneOf("none"),
    "rope_pairs": OneOf("none"),
    "rotary_dim": OneOf(0),
}


@hookimpl
def fi_backend():
    return BackendInfo("example", "0.1.0", "decode attention for head dim 64", priority=10)


@hookimpl
def fi_register_kernels(registry):
    devices = ("cpu", "cuda") if INTERPRETED else ("cuda",)
    registry.add(KernelEntry("attention", "decode_d64", "example", RULES, load=load, devices=devices))


def load():
    return importlib.import_module("fi_example_plugin.decode").DecodeKernel()
