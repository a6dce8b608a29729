"""What fi sees of this backend: its name, and exactly which requests its one kernel serves."""

import importlib

import torch
from fi_core.contract import Between, KernelEntry, OneOf
from fi_core.hookspecs import BackendInfo, hookimpl

RULES = {
    "dtype": OneOf(torch.bfloat16, torch.float16, torch.float32),
    "hidden_size": Between(32, 512, multiple_of=32),
    "out_format": OneOf("same"),
}


@hookimpl
def fi_backend():
    return BackendInfo("example_cuda", "0.1.0", "RMSNorm of short rows, a warp to a row", priority=10)


@hookimpl
def fi_register_kernels(registry):
    limits = {"devices": ("cuda",), "min_capability": (8, 0)}
    registry.add(KernelEntry("rmsnorm", "warp_rmsnorm", "example_cuda", RULES, load=load, **limits))


def load():
    return importlib.import_module("fi_example_cuda_plugin.norm").rmsnorm
