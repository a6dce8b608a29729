"""Specialisations of the sampling kernels that are compiled ahead of time as a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .aot import AotSpec

_FILTER_TYPES = {"top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32", "typical_p": "*fp32"}
_KEYS = {"seed_ptr": "*i64", "sample_ptr": "*i32", "position_ptr": "*i64"}


def _integers(*names: str) -> dict[str, str]:
    """32-bit arguments divisible by 16, as sizes and strides of real vocabularies are."""
    return dict.fromkeys(names, "i32:16")


def _filter_pointers(filters: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """Argument types of the filters in use, and None for the others."""
    used = {f"{name}_ptr": kind for name, kind in _FILTER_TYPES.items() if name in filters}
    return used, {f"{name}_ptr": None for name in _FILTER_TYPES if name not in filters}


def _sample(dtype: str, filters: tuple[str, ...], joint: bool = False) -> AotSpec:
    used, absent = _filter_pointers(filters)
    arguments = {"logits_ptr": f"*{dtype}", "temperature_ptr": "*fp32", **used, **_KEYS}
    arguments |= {
        "tokens_ptr": "*i64",
        "candidates_ptr": "*i32",
        **_integers("logits_stride", "vocab_size", "capacity"),
    }
    constants = {
        "rows_ptr": None,
        "slots_ptr": None,
        **absent,
        "JOINT": joint,
        "FILTERED": bool(filters),
        "BLOCK": 1024,
    }
    name = "_".join(("sample", dtype, *filters, *(("joint",) if joint else ())))
    return AotSpec(name, "fi_triton.sampling.sample:sample_kernel", arguments, constants, num_warps=16)


def _filter_logits(filters: tuple[str, ...], probs: bool, joint: bool) -> AotSpec:
    used, absent = _filter_pointers(filters)
    arguments = {"logits_ptr": "*fp32", "temperature_ptr": "*fp32", **used, "out_ptr": "*fp32", "no_list_ptr": "*i32"}
    arguments |= _integers("logits_stride", "out_stride", "vocab_size")
    name = f"filter_logits_{'probs' if probs else 'logits'}_{'joint' if joint else 'sequential'}"
    constants = {**absent, "JOINT": joint, "PROBS": probs, "BLOCK": 1024}
    return AotSpec(name, "fi_triton.sampling.filter_logits:filter_logits_kernel", arguments, constants, num_warps=16)


def _top_k(dtype: str, k: int, one_token: bool = False) -> AotSpec:
    """``one_token``: a vocabulary of 1, whose sizes Triton turns into constants."""
    arguments = {"logits_ptr": f"*{dtype}", "values_ptr": "*fp32", "indices_ptr": "*i64", "candidates_ptr": "*i32"}
    constants: dict[str, Any] = {"K": k, "BLOCK": 1024}
    sizes = ("logits_stride", "values_stride", "indices_stride", "vocab_size", "capacity", "k")
    if one_token:
        constants |= dict.fromkeys(sizes, 1)
    else:
        arguments |= _integers(*sizes)
    name = f"top_k_{dtype}_{k}"
    return AotSpec(name, "fi_triton.sampling.top_k:top_k_kernel", arguments, constants, num_warps=16)


def _logprobs(dtype: str) -> AotSpec:
    arguments = {"logits_ptr": f"*{dtype}", "tokens_ptr": "*i64", "chosen_ptr": "*fp32", "values_ptr": "*fp32"}
    arguments |= {**_integers("logits_stride", "vocab_size"), "values_stride": "i32", "top_n": "i32"}
    constants = {"TOP_N": 32, "BLOCK": 1024}
    return AotSpec(
        f"logprobs_{dtype}", "fi_triton.sampling.logprobs:logprobs_kernel", arguments, constants, num_warps=16
    )


def _penalize(dtype: str) -> AotSpec:
    pointers = ["slots", "allowed", "step_allowed", "bias_indptr", "bias_tokens", "bias_until", "output", "seen"]
    pointers += ["num_entries", "num_output", "rows"]
    arguments = {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **{f"{name}_ptr": "*i32" for name in pointers}}
    arguments |= {f"{name}_ptr": "*fp32" for name in ("bias_values", "repetition", "frequency", "presence")}
    arguments["slots_ptr"] = "*i64"
    strides = (f"{name}_stride" for name in ("logits", "out", "output"))
    arguments |= {**_integers(*strides, "vocab_size", "capacity")}
    arguments |= {f"{name}_stride": "i32" for name in ("allowed", "step_allowed", "seen")}
    constants = {"prompt_ptr": None, "prompt_stride": 0, "COUNTS_BY_ROW": True, "BLOCK": 1024}
    return AotSpec(
        f"penalize_logits_{dtype}", "fi_triton.sampling.penalize_logits:penalize_kernel", arguments, constants
    )


def _spread_entries() -> AotSpec:
    names = ("entries", "num_entries", "rows", "counts")
    arguments = {**{f"{name}_ptr": "*i32" for name in names}, "slots_ptr": "*i64"}
    arguments |= _integers("entries_stride", "vocab_size", "capacity")
    kernel = "fi_triton.sampling.penalize_logits:spread_entries_kernel"
    return AotSpec("spread_entries", kernel, arguments, {"BLOCK": 1024})


def _record_tokens(one_token: bool = False) -> AotSpec:
    """``one_token``: a vocabulary of 1 and a token a row, sizes that Triton turns into constants."""
    names = ("seen", "entries", "num_entries", "num_output")
    arguments = {"tokens_ptr": "*i64", "slots_ptr": "*i64", **{f"{name}_ptr": "*i32" for name in names}}
    arguments |= {**_integers("entries_stride", "capacity"), "tokens_stride": "i32"}
    constants: dict[str, Any] = {"BLOCK": 1024}
    if one_token:
        constants |= dict.fromkeys(("seen_stride", "seen_words", "num_tokens"), 1)
    else:
        arguments |= dict.fromkeys(("seen_stride", "seen_words", "num_tokens"), "i32")
    kernel = "fi_triton.sampling.record_tokens:record_kernel"
    return AotSpec("record_tokens_one" if one_token else "record_tokens", kernel, arguments, constants)


def _verify_chain(has_draft_probs: bool) -> AotSpec:
    arguments = {
        "draft_ptr": "*i64",
        "target_probs_ptr": "*fp32",
        **_KEYS,
        "tokens_ptr": "*i64",
        "num_accepted_ptr": "*i32",
    }
    arguments |= _integers("target_probs_stride_b", "target_probs_stride_n", "vocab_size")
    arguments |= {"tokens_stride": "i32", "num_draft": "i32"}
    constants: dict[str, Any] = {"BLOCK": 1024, "draft_stride": 1}
    if has_draft_probs:
        arguments |= {"draft_probs_ptr": "*fp32", **_integers("draft_probs_stride_b", "draft_probs_stride_n")}
    else:
        constants |= {"draft_probs_ptr": None, "draft_probs_stride_b": 0, "draft_probs_stride_n": 0}
    name = "verify_chain_with_draft_probs" if has_draft_probs else "verify_chain"
    return AotSpec(name, "fi_triton.sampling.verify:verify_chain_kernel", arguments, constants, num_warps=16)


def _verify_tree() -> AotSpec:
    arguments = {"draft_ptr": "*i64", "parents_ptr": "*i32", "target_probs_ptr": "*fp32", **_KEYS, "tokens_ptr": "*i64"}
    arguments |= {"path_ptr": "*i32", "num_accepted_ptr": "*i32"}
    arguments |= _integers("target_probs_stride_b", "target_probs_stride_n", "vocab_size")
    arguments |= dict.fromkeys(("draft_stride", "parents_stride", "tokens_stride", "path_stride", "num_draft"), "i32")
    kernel = "fi_triton.sampling.verify:verify_tree_kernel"
    return AotSpec("verify_tree", kernel, arguments, {"NODES": 64, "BLOCK": 1024}, num_warps=16)


def _specs() -> Iterator[AotSpec]:
    for dtype in ("fp32", "bf16", "fp16"):
        yield _sample(dtype, ())
        yield _sample(dtype, ("top_k", "top_p"))
        yield _top_k(dtype, 64)
        yield _logprobs(dtype)
        yield _penalize(dtype)
    for joint in (False, True):
        yield _sample("fp32", tuple(_FILTER_TYPES), joint)
        yield _filter_logits(tuple(_FILTER_TYPES), True, joint)
        yield _filter_logits(tuple(_FILTER_TYPES), False, joint)
    yield _top_k("fp32", 2048)
    yield _top_k("fp32", 1, one_token=True)
    yield _spread_entries()
    yield _record_tokens()
    yield _record_tokens(one_token=True)
    yield _verify_chain(False)
    yield _verify_chain(True)
    yield _verify_tree()


AOT_SPECS = list(_specs())
