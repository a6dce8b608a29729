"""Merge partial attention states over disjoint key sets: the contract and the public function.

Source: the associative merge of (output, log-sum-exp) pairs, as in FlashAttention (Dao et al., 2022, section 3.1) and
cascade inference (Ye et al., 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import library
from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from .arguments import check_float, check_last_dim
from .caches import check_strides


def _cases() -> Iterator[Case]:
    from .cases.merge_states import cases

    return cases()


OPERATION = Operation(
    name="merge_states",
    summary="combine attention outputs over disjoint sets of keys by their log-sum-exp",
    fields={"dtype": "dtype of o", "head_dim": "width of a head of o"},
    typical={"dtype": torch.bfloat16, "head_dim": 128},
    cases=_cases,
)

_dispatch = Dispatcher("merge_states", "dtype", "head_dim")


def _run(o: Tensor, lse: Tensor, o_out: Tensor, lse_out: Tensor) -> None:
    _dispatch(o.device, o.dtype, o.shape[-1])(o, lse, o_out, lse_out)


_OP = library.register("merge_states(Tensor o, Tensor lse, Tensor(a!) o_out, Tensor(b!) lse_out) -> ()", _run)


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge N partial states: ``o`` [N, T, H, D] and natural-log ``lse`` float32 [N, T, H] to (o [T, H, D], lse [T, H]).

    o_out = sum_n exp(lse_n - lse_out) o_n with lse_out = log(sum_n exp(lse_n)). A state with lse = -inf saw no key and
    adds nothing, whatever its o holds; if all did, o_out = 0 and lse_out = -inf. N may be 0 or 1. ``o`` is float32,
    float16, bfloat16 or float64 with a contiguous last dim and other strides multiples of 16 bytes. Raises ArgumentError.
    """
    if o.dim() != 4:
        raise ArgumentError("o", "[N, T, H, D]", list(o.shape))
    check_float("o", o)
    if lse.dtype != torch.float32 or lse.shape != o.shape[:3] or lse.device != o.device:
        expected = f"float32 {list(o.shape[:3])} on {o.device}"
        raise ArgumentError("lse", expected, f"{lse.dtype} {list(lse.shape)} on {lse.device}")
    check_last_dim("lse", lse)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_strides("o", o)
    o_out = torch.empty(o.shape[1:], dtype=o.dtype, device=o.device)
    lse_out = torch.empty(lse.shape[1:], dtype=torch.float32, device=o.device)
    (_OP if compiling else _run)(o, lse, o_out, lse_out)
    return o_out, lse_out


def merge_states_cost(num_states: int, num_tokens: int, num_heads: int, head_dim: int, element_bytes: int) -> Cost:
    """Fewest bytes (every state read once, the result written once) and FLOPs (a multiply-add an element)."""
    rows = num_tokens * num_heads
    num_bytes = (num_states + 1) * rows * (head_dim * element_bytes + 4)
    return Cost(num_bytes, 2 * num_states * rows * head_dim)
