"""What the specs of kernels on a cluster's row share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from fi_core.sampling import PenaltyParams
from torch import Tensor

from ...spec import KernelSpec, join_constants
from .geometry import NO_SEARCH, SHORT_LIST, SMALL_SEARCH, TOP_P_SEARCH, Geometry, Kept

# As fi/sampling/cluster_row.cuh and exchange.cuh have them.
_RANK_BINS, _LOCAL_TOKENS, _BRACKET_TOKENS, _COMPARED_TOKENS, _MESSAGES = 64, 1024, 512, 128, 9

# As fi/sampling/penalty_tables.cuh has them.
_ENTRIES, _BIASES = 512, 32


@dataclass(frozen=True)
class ClusterRowSpec(KernelSpec):
    """One element type, width of loads, and form of a row's cluster (``Geometry``)."""

    dtype: torch.dtype
    vector_bytes: int
    cluster_blocks: int
    block_threads: int
    warp_tokens: int
    resident_blocks: int

    contracts: ClassVar = False

    @property
    def blocks_per_multiprocessor(self) -> int:
        return self.resident_blocks

    @property
    def cluster_size(self) -> int:
        return self.cluster_blocks

    @property
    def num_threads(self) -> int:
        return self.block_threads

    @property
    def search(self) -> bool:
        """Whether the kernel looks for the last token that a filter keeps, which takes more shared memory."""
        return True

    @property
    def bracket(self) -> bool:
        """Whether it looks for the end of a kept mass with ``BracketSearch``."""
        return False

    @property
    def small_search(self) -> bool:
        """Whether ``PrefixSearch`` serves no more than the rows that ``BracketSearch`` cannot, in less shared memory."""
        return False

    @property
    def groups(self) -> bool:
        """Whether ``ShortList`` serves some of its rows, which needs the largest logits of groups of tokens."""
        return False

    @property
    def penalised(self) -> bool:
        """Whether penalties change the row while it is loaded, for which bits and lists lie where later a search does."""
        return False

    @property
    def weighed(self) -> bool:
        """Whether places past the vocabulary hold -inf, which has no mass, and not NaN, which no comparison takes."""
        return False

    @property
    def needs_smallest(self) -> bool:
        """Whether the kernel reads a row's smallest element."""
        return self.search

    @property
    def shared_bytes(self) -> int:
        warps, blocks = self.block_threads // 32, self.cluster_blocks
        exchanged = blocks * (8 + 8) + warps * (8 + 8 + 8) + 8 * _MESSAGES + 56
        beside = self._searched_bytes if self.search else 0
        if self.penalised:
            bits = 3 * 16 * -(-warps * self.warp_tokens // 128)
            beside = max(beside, 32 + 12 * _BIASES + 8 * _ENTRIES + bits)
        return 4 * warps * self.warp_tokens + 16 + exchanged + beside

    @property
    def _searched_bytes(self) -> int:
        """Of ``SearchShared``."""
        blocks, small, bins = self.cluster_blocks, self.small_search, 8 * _RANK_BINS
        columns, listed, local, histograms = (8, 64, 1, 1) if small else (32, 128, _LOCAL_TOKENS + 1, 2)
        prefix = max(bins * columns, 8 * blocks * listed) + histograms * max(bins * blocks, 4096) + 8 * local
        memory = max(prefix, 4 * _RANK_BINS * 32)
        memory = max(memory, 8 * _BRACKET_TOKENS + bins * blocks) if self.bracket else memory
        memory = -(-memory // 16) * 16
        memory += (
            max(4 * _RANK_BINS * blocks, 16 * _COMPARED_TOKENS) + 12 * _RANK_BINS if self.bracket else 12 * _RANK_BINS
        )
        return memory + (16 + 16 + 8 + 8) * blocks + 112

    def config_lines(self) -> list[str]:
        derived = (
            f"static constexpr int kSharedBytes = {self.shared_bytes};",
            f"static constexpr bool kSearch = {str(self.search).lower()};",
            f"static constexpr bool kGroups = {str(self.groups).lower()};",
            f"static constexpr bool kBracket = {str(self.bracket).lower()};",
            f"static constexpr bool kSmallSearch = {str(self.small_search).lower()};",
            f"static constexpr bool kPenalised = {str(self.penalised).lower()};",
            f"static constexpr bool kWeighed = {str(self.weighed).lower()};",
            f"static constexpr bool kSmallest = {str(self.needs_smallest).lower()};",
        )
        return join_constants([*super().config_lines(), *derived])


@dataclass(frozen=True)
class FilteringSpec(ClusterRowSpec):
    """Also which filters some row uses."""

    top_k: bool
    top_p: bool
    min_p: bool

    @property
    def search(self) -> bool:
        return self.top_k or self.top_p

    @property
    def groups(self) -> bool:
        return self.top_k

    @property
    def bracket(self) -> bool:
        return self.top_p

    @property
    def small_search(self) -> bool:
        return True

    @property
    def weighed(self) -> bool:
        return not self.penalised

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        vector: int,
        geometry: Geometry,
        filters: frozenset[str],
        *more: Any,
    ) -> Self:
        """The spec for a row's form and active filters."""
        used = ("top_k" in filters, "top_p" in filters, "min_p" in filters)
        return cls(dtype, vector, *geometry, *used, *more)


def kept_for(filters: frozenset[str]) -> Kept:
    """What a kernel with these filters keeps to look for the last token that they keep; min_p alone is a limit."""
    if "top_k" in filters:
        return SHORT_LIST
    if "typical_p" in filters:
        return SMALL_SEARCH
    return TOP_P_SEARCH if "top_p" in filters else NO_SEARCH


def address(tensor: Tensor | None) -> int:
    """Where a column begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


PENALTY_FIELDS = (
    *(
        (name, "pointer")
        for name in (
            "allowed",
            "step_allowed",
            "bias_indptr",
            "bias_tokens",
            "bias_values",
            "bias_until",
            "repetition",
            "frequency",
            "presence",
            "history_rows",
            "seen",
            "entries",
            "num_entries",
            "num_output",
        )
    ),
    ("allowed_stride", "int64"),
    ("step_allowed_stride", "int64"),
    ("seen_stride", "int64"),
    ("entry_stride", "int64"),
    ("capacity", "int32"),
)
"""Fields of ``Params`` that fi/sampling/penalties.cuh reads."""


def penalty_values(penalties: PenaltyParams) -> tuple[int, ...]:
    """The values of PENALTY_FIELDS."""
    history = penalties.history
    seen = entries = num_entries = num_output = None
    if history is not None:
        seen, entries, num_entries, num_output = history.tensors
    return (
        address(penalties.allowed),
        address(penalties.step_allowed),
        address(penalties.bias_indptr),
        address(penalties.bias_tokens),
        address(penalties.bias_values),
        address(penalties.bias_until),
        address(penalties.repetition),
        address(penalties.frequency),
        address(penalties.presence),
        address(penalties.rows),
        address(seen),
        address(entries),
        address(num_entries),
        address(num_output),
        stride(penalties.allowed),
        stride(penalties.step_allowed),
        stride(seen),
        stride(entries),
        0 if entries is None else entries.shape[1],
    )


def stride(tensor: Tensor | None) -> int:
    """Elements from one row of a table to the next; 0 for none."""
    return 0 if tensor is None else tensor.stride(0)
