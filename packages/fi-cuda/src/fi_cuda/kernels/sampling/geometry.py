"""How many blocks and threads hold a row of logits, and how many tokens a warp of them."""

from __future__ import annotations

from typing import NamedTuple

_GRANULE = 8
"""A warp's part of a row is a multiple of it, so that parts begin at multiples of 16 bytes in any dtype."""

_ROUND, _MOST_FILLING = 128, 0.03
"""Likewise, so that a warp's loops, four tokens a thread, have no partial rounds, and what share it may grow for that."""

_MAX_CLUSTER = 16
_FEW_ROWS, _SOME_ROWS = 8, 32
_TWO_BLOCKS_BYTES = 80 * 1024
"""Slices of rows up to which two blocks fit on a multiprocessor, whatever else the kernels keep."""

_TWO_SEARCHES_BYTES = 79 * 1024
_EXCHANGED_BYTES = 1024
"""The same of kernels that search, less what they exchange with each block of the cluster."""

_ONE_BLOCK_BYTES = 160 * 1024
_THREE_BLOCKS_BYTES = 72 * 1024
"""Likewise three blocks, of kernels that keep little else."""


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


def geometry(vocab_size: int, cluster_size: int, num_threads: int) -> Geometry:
    """The least parts that hold ``vocab_size`` tokens, one block a multiprocessor."""
    warps = cluster_size * num_threads // 32
    tokens = -(-vocab_size // warps)
    rounded, whole = (-(-tokens // granule) * granule for granule in (_GRANULE, _ROUND))
    fits = whole <= (1 + _MOST_FILLING) * tokens
    return Geometry(cluster_size, num_threads, whole if fits else rounded, 1)


def geometry_for(vocab_size: int, num_rows: int, rows_held: int = 1, search: bool = True) -> Geometry:
    """What measured best on an H100 (docs/kernels/sampling.md) for ``num_rows`` clusters that hold ``rows_held`` rows each;
    ``search``: of a kernel that looks for the last token that a filter keeps.

    Few rows are spread over as many multiprocessors as a cluster may have; of many, two or three blocks of different rows share
    one, so that one row is read while another is searched.
    """
    threads = 128 if vocab_size <= 1024 else 256 if vocab_size <= 4096 else 512
    if vocab_size <= 4096:
        return geometry(vocab_size, 1, threads)
    many = num_rows > _SOME_ROWS
    cluster_size = 1 if many else _MAX_CLUSTER if num_rows <= _FEW_ROWS else _MAX_CLUSTER // 2
    if not many:
        while cluster_size > 1 and vocab_size <= cluster_size * 2048:
            cluster_size //= 2
    while True:
        two_blocks = _TWO_SEARCHES_BYTES - _EXCHANGED_BYTES * cluster_size if search else _TWO_BLOCKS_BYTES
        found = geometry(vocab_size, cluster_size, threads)
        held = rows_held * found.slice_bytes
        if cluster_size == _MAX_CLUSTER or held <= (two_blocks if many else _ONE_BLOCK_BYTES):
            break
        cluster_size *= 2
    resident = 1 if not many or held > two_blocks else 2 if search or held > _THREE_BLOCKS_BYTES else 3
    return found._replace(resident_blocks=resident)
