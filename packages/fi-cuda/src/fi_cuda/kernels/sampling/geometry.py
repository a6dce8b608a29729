"""How many blocks and threads hold a row of logits, and how many tokens a warp of them."""

from __future__ import annotations

from typing import NamedTuple

_GRANULE = 8
"""A warp's part of a row is a multiple of it, so that parts begin at multiples of 16 bytes in any dtype."""

_ROUND, _MOST_FILLING = 128, 0.03
"""Likewise, so that a warp's loops, four tokens a thread, have no partial rounds, and what share it may grow for that."""

_MAX_CLUSTER = 16
_FEW_ROWS, _SOME_ROWS = 8, 32
_SIXES, _EIGHTS = 21, 15
"""Clusters of six and of eight blocks, one a multiprocessor, that a Hopper GPU holds, as its parts of 16 or 18
multiprocessors are filled each by itself."""
_MOST_OF_SIX = 128 * 1024
"""Shared memory that their slices may take."""

_MULTIPROCESSOR_BYTES, _RESERVED_BYTES = 228 * 1024, 1024
"""Shared memory of a Hopper multiprocessor, and what each of its blocks takes besides its own."""

_ONE_BLOCK_BYTES = 160 * 1024


class Kept(NamedTuple):
    """Most of the shared memory that a kernel keeps beside its part of a row, in blocks of a cluster of up to 8 and of 16;
    as many as ``most_blocks`` on a multiprocessor leave it enough registers, three with ``threads_of_three``. Where many rows
    share multiprocessors, a cluster has ``least_cluster`` blocks or more; ``sixes``: whether clusters of six are faster than of
    eight. ``pairs_from``: from how many rows on two larger blocks are; ``grouped``: whether a warp's groups of tokens count, 1, 2
    or 4 and up to 256 in all; ``searched``: whether warps exchange with a block of the cluster each."""

    bytes: int
    bytes_of_16: int
    most_blocks: int = 3
    threads_of_three: int = 512
    least_cluster: int = 1
    sixes: bool = False
    pairs_from: int = 2**31
    grouped: bool = False
    searched: bool = True

    def without_pairs(self) -> Kept:
        """Of kernels to which pairs bring nothing, or that keep too much beside their slices for them."""
        return self._replace(pairs_from=2**31)


NO_SEARCH = Kept(2 * 1024, 2 * 1024, threads_of_three=256, sixes=True, searched=False)
NO_SEARCH_PENALISED = Kept(11 * 1024, 11 * 1024, threads_of_three=256, sixes=True, searched=False)
"""With three bits of each token and the first entries of lists beside it."""

SMALL_SEARCH = Kept(12 * 1024, 23 * 1024, threads_of_three=256)
"""Of kernels whose ``ClusterRowSpec.small_search`` holds."""

SHORT_LIST = SMALL_SEARCH._replace(least_cluster=4, sixes=True, pairs_from=33, grouped=True)
"""With top_k: fewer warps have too few groups of tokens for a usual k, and the general search is three times as slow."""

TOP_P_SEARCH = SMALL_SEARCH._replace(sixes=True, pairs_from=129)
"""With top_p and without top_k."""

SEARCH = Kept(36 * 1024, 44 * 1024, most_blocks=2)


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


def geometry(vocab_size: int, cluster_size: int, num_threads: int, most_filling: float = _MOST_FILLING) -> Geometry:
    """The least parts that hold ``vocab_size`` tokens, one block a multiprocessor; whole rounds if parts grow by no more than
    the share ``most_filling``."""
    warps = cluster_size * num_threads // 32
    tokens = -(-vocab_size // warps)
    rounded, whole = (-(-tokens // granule) * granule for granule in (_GRANULE, _ROUND))
    return Geometry(cluster_size, num_threads, whole if whole <= (1 + most_filling) * tokens else rounded, 1)


def geometry_for(vocab_size: int, num_rows: int, rows_held: int = 1, kept: Kept = SEARCH) -> Geometry:
    """What measured best (docs/kernels/sampling.md) for ``num_rows`` clusters that hold ``rows_held`` rows each.

    Few rows are spread over as many multiprocessors as a cluster may have; of many, two or three blocks of different rows share
    one, so that one row is read while another is searched.
    """
    threads = 128 if vocab_size <= 1024 else 256 if vocab_size <= 4096 else 512
    if vocab_size <= 4096:
        return geometry(vocab_size, 1, threads)
    if num_rows > _SOME_ROWS:
        shared = _shared_multiprocessors(vocab_size, rows_held, kept, threads)
        pair = _pair(vocab_size, rows_held, kept) if num_rows >= kept.pairs_from else None
        # Where as many rows are held at a time.
        if pair is not None and 2 * shared.cluster_size >= shared.resident_blocks * pair.cluster_size:
            return pair
        return shared
    cluster_size = _MAX_CLUSTER if num_rows <= _FEW_ROWS else _MAX_CLUSTER // 2
    if kept.sixes and _FEW_ROWS < num_rows <= _SIXES and vocab_size > _MAX_CLUSTER // 2 * 2048:
        six = geometry(vocab_size, 6, threads)
        if six.slice_bytes <= _MOST_OF_SIX and _resident(six, rows_held, kept) > 0:
            return six
    while cluster_size > 1 and vocab_size <= cluster_size * 2048:
        cluster_size //= 2
    while True:
        found = geometry(vocab_size, cluster_size, threads)
        if cluster_size == _MAX_CLUSTER or rows_held * found.slice_bytes <= _ONE_BLOCK_BYTES:
            # Those that find no multiprocessor of their own share one.
            sharing = num_rows > _EIGHTS and cluster_size == 8 and _resident(found, rows_held, kept) > 1
            return found._replace(resident_blocks=2 if sharing else 1)
        cluster_size *= 2


def _shared_multiprocessors(vocab_size: int, rows_held: int, kept: Kept, threads: int) -> Geometry:
    """The smallest cluster of which two blocks fit on a multiprocessor; three, if they do with partial rounds."""
    cluster_size = kept.least_cluster
    while True:
        for filling in (_MOST_FILLING, 0.0):
            form = geometry(vocab_size, cluster_size, kept.threads_of_three, filling)
            if kept.searched and cluster_size > form.num_threads // 32:
                continue
            if _resident(form, rows_held, kept) == 3:
                return form._replace(resident_blocks=3)
        form = geometry(vocab_size, cluster_size, threads)
        resident = _resident(form, rows_held, kept)
        if resident > 1 or cluster_size == _MAX_CLUSTER:
            return form._replace(resident_blocks=max(resident, 1))
        cluster_size *= 2


def _pair(vocab_size: int, rows_held: int, kept: Kept) -> Geometry | None:
    """Of the smallest cluster of which two blocks fit on a multiprocessor."""
    for cluster_size in range(kept.least_cluster, 9):
        # 12 warps in up to 5 blocks have 240 groups, in more 192 at most, as 8 warps have.
        threads = 256 if kept.grouped and cluster_size > 5 else 384
        for filling in (_MOST_FILLING, 0.0):
            form = geometry(vocab_size, cluster_size, threads, filling)
            if _resident(form, rows_held, kept) >= 2:
                return form._replace(resident_blocks=2)
    return None


def _resident(form: Geometry, rows_held: int, kept: Kept) -> int:
    beside = kept.bytes if form.cluster_size < _MAX_CLUSTER else kept.bytes_of_16
    fitting = _MULTIPROCESSOR_BYTES // (rows_held * form.slice_bytes + beside + _RESERVED_BYTES)
    return min(fitting, kept.most_blocks)
