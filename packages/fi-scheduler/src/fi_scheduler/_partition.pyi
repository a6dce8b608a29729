from .partition.records import Int32Array, Int64Array

SOURCE_DIGEST: str

def measure(q_indptr: Int32Array, kv_lens: Int32Array, packed: Int64Array) -> tuple[bool, int, int, int]: ...
def partition(
    q_indptr: Int32Array,
    kv_lens: Int32Array,
    packed: Int64Array,
    worker_indptr: Int32Array,
    items: Int32Array,
    merges: Int32Array,
) -> tuple[bool, int, int]: ...
def partition_by_seek(
    q_indptr: Int32Array,
    kv_lens: Int32Array,
    packed: Int64Array,
    worker_indptr: Int32Array,
    items: Int32Array,
    merges: Int32Array,
) -> tuple[bool, int, int]: ...
