"""What ``KernelEntry.load()`` returns, per operation.

Public functions check arguments, allocate missing outputs and pick the kernel; implementations receive checked tensors
and write every output they are given. Unless said otherwise tensors are on one device, any strides are legal as long as
the last dim is contiguous, and floating tensors have the request's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .records import AttentionSpec, Batch, Capacity, KVCache, ResolvedLayer
from .rope import RopeTable
from .sampling import DrawKeys, FilterParams, LogprobsOut, PenaltyParams, TokenHistory


class AttentionState(Protocol):
    """A kernel's part of a plan: work lists and workspace for one (spec, capacity, device)."""

    @property
    def workspace(self) -> Sequence[Tensor]:
        """Tensors that ``run`` writes besides its outputs."""
        ...

    def update(self, batch: Batch) -> None:
        """Plan ``batch`` (its tensors on the plan's device, or on the CPU: then one copy is made). Stream-ordered; with
        device tensors free of host synchronisation and legal in CUDA-graph capture. Keeps references to the batch's
        tensors: ``run`` reads their contents, so they may change as long as the lengths are planned again."""
        ...

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        """Attend. q [T, Hq, D]; out [T, Hq, Dv]; lse float32 [T, Hq] natural log, or None. Rows of a request whose
        query sees no key get out = 0 and lse = -inf (with sinks: lse = sink). Rows past q_indptr[B] are untouched."""
        ...

    def describe(self) -> Sequence[str]:
        """Lines for ``fi explain``: tile kinds, workers, planner, workspace bytes."""
        ...


class AttentionKernel(Protocol):
    """Protocol of ``attention``."""

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        """Bytes of device memory a plan will take, from capacities alone."""
        ...

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> AttentionState: ...


class AppendKV(Protocol):
    """Protocol of ``append_kv``: writes k [T, Hkv, D] and v [T, Hkv, Dv] into ``kv`` at the batch's positions."""

    def __call__(
        self, k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None
    ) -> None:
        """Token i of request b goes to position kv_lens[b] - q_len + i (or to ``batch.slot_mapping``; slots below 0 and
        tokens past q_indptr[B] are skipped). With ``rope`` K is rotated at that position, and ``q`` [T, Hq, D], if
        given, is rotated in place. FP8 formats divide by the scale, round to nearest even and saturate."""
        ...


class CopyPages(Protocol):
    """Protocol of ``copy_pages``: page ``source_pages[i]`` of ``source`` to page ``target_pages[i]`` of ``target``, K and V."""

    def __call__(self, source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
        """The ids are int64 or int32 [N] on the CUDA device, if there is one; a pair with an id below 0 is skipped. Every
        bit is kept. The caches may be one; their strides differ, also between K and V, and need not be multiples of 16
        bytes, nor need the addresses. With placement "from_host" or "to_host" one cache is in pinned host memory, which
        the device reaches by its address (unified addressing)."""
        ...


class FindSharedPrefixes(Protocol):
    """Protocol of ``find_shared_prefixes``: levels of ``batch`` (table "dense" or "indptr")."""

    def __call__(
        self, batch: Batch, page_size: int, max_depth: int, min_saved_tokens: int, nodes: Tensor, order: Tensor
    ) -> None:
        """``nodes`` and ``order`` are those of the reference, rows behind the nodes found 0. Of a request the table's first
        (kv_len - q_len) // page_size entries count; an entry below 0 is equal to none."""
        ...


class MergeStates(Protocol):
    """Protocol of ``merge_states``: o [N, T, H, D], lse float32 [N, T, H] -> o_out [T, H, D], lse_out float32 [T, H]."""

    def __call__(self, o: Tensor, lse: Tensor, o_out: Tensor, lse_out: Tensor) -> None: ...


class Rope(Protocol):
    """Protocol of ``rope``: q [T, Hq, D] and k [T, Hk, D] (or None), positions int32 or int64 [T]; outputs may alias inputs."""

    def __call__(
        self, q: Tensor, k: Tensor | None, positions: Tensor, rope: RopeTable, q_out: Tensor, k_out: Tensor | None
    ) -> None: ...


class RMSNorm(Protocol):
    """Protocol of ``rmsnorm``: out = x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dim; out may alias x.

    ``scale`` None: out has x's dtype. Else (a float, or a float32 tensor of one element on x's device) out is
    float8_e4m3fn or float8_e5m2 and holds the norm, in the arithmetic dtype, divided by the scale as IEEE division rounds
    it, saturated to the largest finite value, and rounded to nearest even; NaN stays NaN."""

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, weight_bias: float, scale: float | Tensor | None, out: Tensor
    ) -> None: ...


class AddRMSNorm(Protocol):
    """Protocol of ``add_rmsnorm``: residual += x in place, then out = rmsnorm(residual), also with its ``scale``; out
    may alias x."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        scale: float | Tensor | None,
        out: Tensor,
    ) -> None: ...


class GatedActivation(Protocol):
    """Protocol of ``silu_mul`` and ``gelu_mul``: x [..., 2 * width] -> out [..., width] = act(x[..., :width]) * x[..., width:].

    ``approximate`` is "none" or "tanh" for gelu_mul and "none" for silu_mul.
    """

    def __call__(self, x: Tensor, approximate: str, out: Tensor) -> None: ...


class Sample(Protocol):
    """Protocol of ``sample``: logits [R, V] -> tokens int64 [N] (row ``rows[n]`` of logits, or n; row ``slots[n]`` of the
    parameters, or n), -1 for an unusable row."""

    def __call__(
        self,
        logits: Tensor,
        filters: FilterParams,
        keys: DrawKeys,
        rows: Tensor | None,
        tokens: Tensor,
        penalties: PenaltyParams,
        slots: Tensor | None,
    ) -> None: ...


class FilterLogits(Protocol):
    """Protocol of ``filter_logits``: out float32 [N, V]: masked, temperature-scaled logits or renormalised probabilities."""

    def __call__(self, logits: Tensor, filters: FilterParams, kind: str, out: Tensor) -> None: ...


class TopK(Protocol):
    """Protocol of ``top_k``: the k largest of logits [N, V] into values float32 [N, k] and indices int64 [N, k], descending,
    ties by lowest index."""

    def __call__(self, logits: Tensor, values: Tensor, indices: Tensor) -> None: ...


class Logprobs(Protocol):
    """Protocol of ``logprobs``: log-softmax of logits [N, V] at ``tokens`` int64 [N], and the top n of each row."""

    def __call__(self, logits: Tensor, tokens: Tensor, out: LogprobsOut) -> None: ...


class PenalizeLogits(Protocol):
    """Protocol of ``penalize_logits``: out [N, V] (may alias logits) after penalties, bias and the allowed-token bitmask."""

    def __call__(self, logits: Tensor, penalties: PenaltyParams, out: Tensor, slots: Tensor | None) -> None: ...


class RecordTokens(Protocol):
    """Protocol of ``record_tokens``: tokens int64 [N, k] into rows ``slots[n]`` (or n) of ``history``, in place."""

    def __call__(self, history: TokenHistory, tokens: Tensor, slots: Tensor | None) -> None: ...


class VerifyChain(Protocol):
    """Protocol of ``verify_chain``; shapes are documented at ``fi_core.verify_chain``."""

    def __call__(
        self,
        draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        keys: DrawKeys,
        tokens: Tensor,
        num_accepted: Tensor,
    ) -> None: ...


class VerifyTree(Protocol):
    """Protocol of ``verify_tree``; shapes are documented at ``fi_core.verify_tree``."""

    def __call__(
        self,
        draft_tokens: Tensor,
        parents: Tensor,
        target_probs: Tensor,
        keys: DrawKeys,
        tokens: Tensor,
        path: Tensor,
        num_accepted: Tensor,
    ) -> None: ...
