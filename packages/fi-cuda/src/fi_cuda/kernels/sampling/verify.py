"""verify_chain and verify_tree: spec and bindings of ``fi/kernels/verify.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import DrawKeys
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import kernel_for
from ..rows import vector_bytes
from .forms import ClusterRowSpec, address
from .geometry import NO_SEARCH, Geometry, geometry_for


@dataclass(frozen=True)
class VerifySpec(ClusterRowSpec):
    """``tree``: nodes have parents; ``proposals``: the drafts' distributions are given (chains only)."""

    tree: bool
    proposals: bool

    stem: ClassVar = "verify"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("draft_tokens", "pointer"),
            ("parents", "pointer"),
            ("draft_probs", "pointer"),
            ("target_probs", "pointer"),
            ("seed", "pointer"),
            ("sample", "pointer"),
            ("position", "pointer"),
            ("tokens", "output"),
            ("path", "output"),
            ("num_accepted", "output"),
            ("draft_stride", "int64"),
            ("parents_stride", "int64"),
            ("draft_probs_stride", "int64"),
            ("draft_probs_step", "int64"),
            ("target_stride", "int64"),
            ("target_step", "int64"),
            ("num_draft", "int32"),
            ("vocab_size", "int32"),
        )
    )

    @property
    def search(self) -> bool:
        return False

    @property
    def needs_smallest(self) -> bool:
        return True

    @property
    def shared_bytes(self) -> int:
        slice_bytes = 4 * self.block_threads // 32 * self.warp_tokens if self.proposals else 0
        return -(-super().shared_bytes // 16) * 16 + slice_bytes


@lru_cache(maxsize=1024)
def _bound(device: torch.device, vector: int, geometry: Geometry, tree: bool, proposals: bool) -> LaunchableKernel:
    return kernel_for(VerifySpec(torch.float32, vector, *geometry, tree, proposals), device)


def verify_form(vocab_size: int, num_requests: int, proposals: bool) -> Geometry:
    """How the rows of a verification lie in clusters; ``proposals``: of the draft model too, beside the target's."""
    return geometry_for(vocab_size, num_requests, rows_held=2 if proposals else 1, kept=NO_SEARCH)


def _launch(
    draft_tokens: Tensor,
    parents: Tensor | None,
    probs: tuple[Tensor | None, Tensor],
    keys: DrawKeys,
    outputs: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    draft_probs, target_probs = probs
    num_requests, num_draft = draft_tokens.shape
    device, vocab_size = target_probs.device, target_probs.shape[2]
    form = verify_form(vocab_size, num_requests, draft_probs is not None)
    rows = (target_probs, draft_probs) if draft_probs is not None else (target_probs,)
    vector = vector_bytes(*rows, multiple_of=vocab_size)
    draft_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    _bound(device, vector, form, parents is not None, draft_probs is not None).launch(
        device,
        num_requests * form.cluster_size,
        1,
        draft_tokens.data_ptr(),
        address(parents),
        address(draft_probs),
        target_probs.data_ptr(),
        keys.seed.data_ptr(),
        keys.sample.data_ptr(),
        keys.position.data_ptr(),
        outputs[0].data_ptr(),
        address(outputs[1]),
        outputs[2].data_ptr(),
        draft_tokens.stride(0),
        0 if parents is None else parents.stride(0),
        *draft_strides,
        *target_probs.stride()[:2],
        num_draft,
        vocab_size,
    )


def verify_chain(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyChain`` protocol of fi-core; each draw reads one row of target_probs (and draft_probs) once."""
    _launch(draft_tokens, None, (draft_probs, target_probs), keys, (tokens, None, num_accepted))


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    keys: DrawKeys,
    tokens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
) -> None:
    """The ``VerifyTree`` protocol of fi-core; each accepted node reads one row of target_probs once."""
    _launch(draft_tokens, parents, (None, target_probs), keys, (tokens, path, num_accepted))
