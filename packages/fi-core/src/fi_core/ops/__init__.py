"""The operations of fi: one module each, holding the contract and the public function."""

from __future__ import annotations

from . import (
    add_rmsnorm,
    append_kv,
    attention,
    copy_pages,
    filter_logits,
    find_shared_prefixes,
    gelu_mul,
    logprobs,
    merge_states,
    penalize_logits,
    record_tokens,
    rmsnorm,
    rope,
    sample,
    silu_mul,
    top_k,
    verify_chain,
    verify_tree,
)

OPERATIONS = tuple(
    module.OPERATION
    for module in (
        attention,
        append_kv,
        copy_pages,
        find_shared_prefixes,
        merge_states,
        rope,
        rmsnorm,
        add_rmsnorm,
        silu_mul,
        gelu_mul,
        sample,
        filter_logits,
        top_k,
        logprobs,
        penalize_logits,
        record_tokens,
        verify_chain,
        verify_tree,
    )
)
"""Every operation's contract, in the order that the support matrix shows them."""
