"""How many blocks and threads hold a row of logits, and how many tokens a warp of them."""

from __future__ import annotations

from typing import NamedTuple

_GRANULE = 8
"""A warp's part of a row is a multiple of it, so that parts begin at multiples of 16 bytes in any dtype."""

_MAX_SLICE_BYTES = 196608


class Geometry(NamedTuple):
    """``cluster_size`` blocks of ``num_threads`` threads hold a row, each warp ``warp_tokens`` tokens of it; as many as
    ``resident_blocks`` blocks are to fit on a multiprocessor, which caps the registers."""

    cluster_size: int
    num_threads: int
    warp_tokens: int
    resident_blocks: int

    @property
    def slice_bytes(self) -> int:
        """Shared memory for a block's part of the row."""
        return 4 * self.num_threads // 32 * self.warp_tokens


def geometry(vocab_size: int, cluster_size: int, num_threads: int, resident_blocks: int = 1) -> Geometry:
    """The least parts that hold ``vocab_size`` tokens."""
    warps = cluster_size * num_threads // 32
    tokens = -(-vocab_size // warps)
    return Geometry(cluster_size, num_threads, -(-tokens // _GRANULE) * _GRANULE, resident_blocks)


def geometry_for(vocab_size: int, num_rows: int, rows_held: int = 1) -> Geometry:
    """What measured best on an H100 (docs/kernels/sampling.md) for ``num_rows`` clusters that hold ``rows_held`` rows each."""
    cluster_size = 16 if num_rows <= 8 else 8
    while cluster_size > 1 and vocab_size <= cluster_size * 2048:
        cluster_size //= 2
    threads, resident = (512, 1) if num_rows <= 32 else (256, 3)
    found = geometry(vocab_size, cluster_size, threads, resident)
    while rows_held * found.slice_bytes > _MAX_SLICE_BYTES:
        cluster_size *= 2
        found = geometry(vocab_size, cluster_size, threads, resident)
    return found
