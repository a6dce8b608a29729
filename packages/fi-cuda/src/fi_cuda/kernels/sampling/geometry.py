"""How many blocks and threads hold a row of logits, and how many tokens a warp of them."""

from __future__ import annotations

from typing import NamedTuple

_ROUND_TOKENS = 128
"""What a warp's 32 lanes take at once, four tokens each; a warp's part of a row is a multiple of it."""


class Geometry(NamedTuple):
    """``cluster_size`` blocks of ``num_threads`` threads hold a row, each warp ``warp_tokens`` tokens of it."""

    cluster_size: int
    num_threads: int
    warp_tokens: int

    @property
    def block_tokens(self) -> int:
        return self.num_threads // 32 * self.warp_tokens

    @property
    def slice_bytes(self) -> int:
        """Shared memory for a block's part of the row."""
        return 4 * self.block_tokens


def geometry(vocab_size: int, cluster_size: int, num_threads: int) -> Geometry:
    """The least parts that hold ``vocab_size`` tokens."""
    warps = cluster_size * num_threads // 32
    tokens = -(-vocab_size // warps)
    return Geometry(cluster_size, num_threads, -(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS)


def geometry_for(vocab_size: int, num_rows: int) -> Geometry:
    """What measured best on an H100 (docs/kernels/sampling.md)."""
    cluster_size = 16 if num_rows <= 8 else 8
    while cluster_size > 1 and vocab_size <= cluster_size * 2048:
        cluster_size //= 2
    threads = 512 if num_rows <= 32 else 256
    found = geometry(vocab_size, cluster_size, threads)
    while found.slice_bytes > _MAX_SLICE_BYTES:
        cluster_size *= 2
        found = geometry(vocab_size, cluster_size, threads)
    return found


_MAX_SLICE_BYTES = 196608
