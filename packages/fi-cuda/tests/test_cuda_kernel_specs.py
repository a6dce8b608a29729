"""What the host decides for a kernel: vector widths, how threads share the work, what is served."""

import itertools
import subprocess
import sys

import pytest
import torch
from fi_core.contract import Target, check_entry
from fi_core.ops import OPERATIONS
from fi_core.registry import registry
from fi_cuda.entries import ENTRIES, SAMPLING_ENTRIES
from fi_cuda.kernels.append_kv import AppendShape, num_units, spec_for
from fi_cuda.kernels.merge_states import MergeStatesSpec
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.kernels.rows import vector_bytes
from fi_cuda.shipped import shipped_specs
from fi_cuda.toolchain import NO_CONTRACTION

pytestmark = pytest.mark.timeout(120)


def shape(**changes):
    plain = AppendShape(torch.bfloat16, "bf16", 128, 128, 16, "dense", 0, "none", False, 0, 8, 16, 16)
    return plain._replace(**changes)


# Vector widths


@pytest.mark.parametrize(
    ("dtype", "view", "width", "expected"),
    [
        (torch.bfloat16, lambda x: x, 64, 16),
        (torch.float32, lambda x: x, 64, 16),
        (torch.bfloat16, lambda x: x[:, :60], 60, 8),
        (torch.bfloat16, lambda x: x[:, :63], 63, 2),
        (torch.bfloat16, lambda x: x[:, 4:], 60, 8),
        (torch.bfloat16, lambda x: x[:, 1:33], 32, 2),
        (torch.float32, lambda x: x[:, 2:34], 32, 8),
        (torch.bfloat16, lambda x: x[:1, 2:34], 32, 4),
    ],
)
def test_vector_width_follows_base_strides_and_width(dtype, view, width, expected):
    tensor = view(torch.empty(4, 64, dtype=dtype))
    assert tensor.shape[-1] == width
    assert vector_bytes(tensor, multiple_of=width) == expected


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 8),
        ({"dtype": torch.float32, "kv_format": "fp32"}, 4),
        ({"kv_format": "fp8_e4m3"}, 8),
        ({"dtype": torch.float32, "kv_format": "fp8_e5m2"}, 4),
        ({"kv_format": "fp32"}, 4),  # a store is 16 bytes at most
        ({"kv_format": "fp8_e4m3", "stored_vector": 4}, 4),
        ({"vector": 2}, 1),
    ],
)
def test_elements_of_a_pack_fit_loads_and_stores(changes, count):
    assert spec_for(shape(**changes)).count == count


# How the threads of a token share its heads

HEADS = [(0, 1), (0, 8), (9, 3), (32, 8), (28, 4), (64, 8), (128, 1), (128, 128), (5, 200)]
DIMS = [(64, 64, 64), (128, 128, 128), (128, 128, 0), (192, 128, 64), (80, 80, 80), (512, 512, 2), (40, 24, 0)]


@pytest.mark.parametrize(("heads", "dims"), list(itertools.product(HEADS, DIMS)))
@pytest.mark.parametrize("vector", [2, 16])
@pytest.mark.parametrize("few_tokens", [False, True])
def test_every_pack_of_every_head_has_one_thread(heads, dims, vector, few_tokens):
    num_q_heads, num_kv_heads = heads
    head_dim, head_dim_vo, rotary_dim = dims
    if rotary_dim == 0:
        num_q_heads = 0
    count_fits = (rotary_dim // 2 | head_dim | head_dim_vo | (head_dim - rotary_dim)) * 2
    vector = min(vector, count_fits & -count_fits)
    spec = spec_for(
        shape(
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            rotary_dim=rotary_dim,
            pairs="half" if rotary_dim else "none",
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            vector=vector,
            few_tokens=few_tokens,
        )
    )
    assert spec.threads_per_token % 32 == 0
    assert spec.tokens_per_block * spec.threads_per_token == spec.num_threads <= 1024
    assert bool(spec.q_rounds) == bool(num_q_heads)
    if few_tokens:
        assert spec.tokens_per_block == 1 and max(spec.q_rounds, spec.k_rounds, spec.v_rounds) <= 2
    slices = spec.num_slices(num_q_heads, num_kv_heads)
    for bit, num_heads, dim, rotated, rounds in (
        (0, num_q_heads, head_dim, rotary_dim, spec.q_rounds),
        (1, num_kv_heads, head_dim, rotary_dim, spec.k_rounds),
        (2, num_kv_heads, head_dim_vo, head_dim_vo if spec.values_first else 0, spec.v_rounds),
    ):
        units = num_units(dim, rotated, spec.count)
        lanes = spec.threads_per_token // units
        assert lanes >= 1
        # As fi/kv/heads.cuh: head = (slice * rounds + round) * lanes + lane.
        served = [
            (part * rounds + turn) * lanes + lane
            for part in range(slices)
            for turn in range(rounds)
            for lane in range(lanes)
        ]
        assert sorted(head for head in served if head < num_heads) == list(range(num_heads))
        if spec.whole >> bit & 1:
            assert sorted(served) == list(range(num_heads)) and lanes * units == spec.threads_per_token
            assert bit or rotary_dim == head_dim


def test_tensors_whose_threads_all_have_work_need_no_check_of_heads():
    def whole(**changes):
        return spec_for(shape(**changes)).whole

    rope = {"rotary_dim": 128, "pairs": "half"}
    assert whole() == 0b110
    assert whole(**rope) == 0b110
    assert whole(num_q_heads=32, **rope) == 0b111
    assert whole(num_q_heads=28, num_kv_heads=4, **rope) & 1 == 0
    # Three heads for a power of 2 of lanes; dims behind the rotated ones, which q keeps.
    assert whole(num_kv_heads=3) == 0
    assert whole(num_q_heads=32, rotary_dim=64, pairs="half") & 1 == 0
    # 128 threads are 8 heads of V, and 16 of K.
    assert whole(few_tokens=True, **rope) == 0b100


@pytest.mark.parametrize(
    ("changes", "streaming"),
    [
        ({}, True),
        ({"few_tokens": True}, False),
        ({"kv_format": "fp8_e4m3"}, False),
        ({"dtype": torch.float32, "kv_format": "fp32"}, False),
        ({"stored_vector": 8}, False),  # streams are 16 bytes wide
        ({"dtype": torch.float32}, False),
    ],
)
def test_much_that_is_stored_16_bytes_at_a_time_leaves_l2_first(changes, streaming):
    assert spec_for(shape(**changes)).streaming == streaming


@pytest.mark.parametrize(
    ("width", "vector", "many", "few"),
    [
        (128, 16, 16, 16),
        (256, 16, 32, 32),
        (576, 16, 64, 64),
        (1024, 16, 64, 64),
        (2048, 16, 128, 128),
        (4096, 16, 128, 256),
        (5120, 16, 256, 512),
        (8192, 16, 256, 512),
        (16384, 16, 512, 512),
        (4096, 2, 512, 512),
        (1, 2, 1, 1),
    ],
)
def test_threads_of_a_row_follow_its_packs(width, vector, many, few):
    for add, many_rows, threads in ((False, True, many), (False, False, few), (True, False, few)):
        spec = RmsNormSpec(torch.bfloat16, torch.bfloat16, width, vector, add, many_rows)
        assert spec.threads_per_row == threads
        assert spec.num_threads == max(128, threads)


def test_merge_has_a_thread_for_each_pack():
    spec = MergeStatesSpec(torch.bfloat16, 80, 16)
    assert [spec.num_blocks(rows) for rows in (0, 1, 12, 13, 128)] == [0, 1, 1, 2, 10]
    assert spec.num_blocks(2**31) == 2**31 * 10 // 128


# What is served


def test_entries_declare_every_field_of_their_operation():
    operations = {operation.name: operation for operation in OPERATIONS}
    for entry in (*ENTRIES, *SAMPLING_ENTRIES):
        check_entry(entry, operations)
    assert len({entry.op for entry in ENTRIES}) == len(ENTRIES) == 8
    # Two kernels draw: one for rows alone, one from columns, with penalties and typical_p.
    assert len({entry.op for entry in SAMPLING_ENTRIES}) == len(SAMPLING_ENTRIES) - 1 == 8


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.op)
def test_entry_serves_every_conformance_case_but_float64(entry):
    operation = next(operation for operation in OPERATIONS if operation.name == entry.op)
    served = 0
    for case in operation.cases():
        reasons = entry.reject(operation.request(Target("cuda", (9, 0)), **case.values))
        assert bool(reasons) == (case.values.get("dtype") == torch.float64), (case.name, reasons)
        served += not reasons
    assert served > 5
    typical = operation.request(Target("cuda", (9, 0)), **operation.typical)
    assert not entry.reject(typical)
    assert entry.reject(operation.request(Target("cpu"), **operation.typical))
    assert entry.reject(operation.request(Target("cuda", (7, 5)), **operation.typical))


@pytest.mark.parametrize("entry", SAMPLING_ENTRIES, ids=lambda entry: entry.name)
def test_sampling_serves_every_conformance_case_but_float64_and_typical_p(entry):
    operation = next(operation for operation in OPERATIONS if operation.name == entry.op)
    served = 0
    for case in operation.cases():
        reasons = entry.reject(operation.request(Target("cuda", (9, 0)), **case.values))
        outside = case.values.get("dtype") == torch.float64
        outside |= "typical_p" in case.values.get("filters", ()) and entry.name != "sample_columns"
        if entry.name == "sample":
            outside |= bool(case.values["penalties"] or case.values["slots"])
        assert bool(reasons) == outside, (case.name, reasons)
        served += not reasons
    assert served > 5
    typical = operation.request(Target("cuda", (9, 0)), **operation.typical)
    assert not entry.reject(typical)
    assert entry.reject(operation.request(Target("cuda", (8, 9)), **operation.typical))


def test_entries_import_no_kernel_and_load_the_right_function():
    check = (
        "import sys, fi_cuda.entries as e; assert {m for m in sys.modules if 'fi_cuda' in m} == {'fi_cuda', 'fi_cuda.entries'};"
        "print(' '.join(entry.load().__name__ for entry in (*e.ENTRIES, *e.SAMPLING_ENTRIES)))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.split() == [entry.name for entry in (*ENTRIES, *SAMPLING_ENTRIES)]


FROM_AMPERE_ON = {
    "append_kv",
    "copy_pages",
    "merge_states",
    "rope",
    "rmsnorm",
    "add_rmsnorm",
    "silu_mul",
    "gelu_mul",
}
"""What uses nothing of Hopper that its headers do not leave out elsewhere."""


@pytest.mark.parametrize("name", [operation.name for operation in OPERATIONS])
def test_hopper_gets_these_kernels_and_older_gpus_what_they_can_run(name):
    operation = registry().operations[name]
    kernels = [entry for entry in registry().kernels(name) if entry.backend == "cuda"]
    if not kernels:
        return
    typical = operation.typical
    assert registry().select(operation.request(Target("cuda", (9, 0)), **typical)).entry.backend == "cuda"
    for older in ((8, 0), (7, 5)):
        found = registry().select(operation.request(Target("cuda", older), **typical))
        if older == (8, 0) and name in FROM_AMPERE_ON:
            assert found.entry.backend == "cuda"
            continue
        assert found.entry.backend != "cuda"
        reasons = dict(found.rejected)
        least = "sm_80" if name in FROM_AMPERE_ON else "sm_90"
        capability = f"capability: cuda sm_{older[0]}{older[1]} is below {least}"
        assert all(capability in reasons[entry.full_name] for entry in kernels)
        assert capability in str(found)


def test_no_kernel_that_samples_may_join_products_and_sums():
    # Their float decisions are taken at several places, and the emulated kernels, which join none, are to decide alike.
    sampling = [
        spec for spec in shipped_specs() if any(name.startswith("fi/sampling/") for name in spec.source().headers())
    ]
    assert {spec.stem for spec in sampling} >= {"sample", "filter_logits", "top_k", "verify", "penalize_logits"}
    assert all(spec.source().text.startswith(NO_CONTRACTION) for spec in sampling)
