"""Headers of pure arithmetic, compiled for the host: random numbers, targets, column limits and mask bits."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import fi_scheduler
import numpy as np
import pytest
import torch
from fi_core.random import philox4x32, random_bits, scale_bits, scale_fraction
from fi_core.records import AttentionSpec, Batch, KVCache, PackedMask, ResolvedLayer
from fi_core.reference.attention import oracle
from fi_core.sampling import DrawKeys
from fi_cuda.compile import INCLUDE_FOLDER

pytestmark = pytest.mark.timeout(120)

FOLDERS = (INCLUDE_FOLDER, Path(fi_scheduler.__file__).parent / "include")

# The partition's header is there because both define the same macro.
SOURCE = """
#include "fi/pipeline/cursor.cuh"
#include "fi/random/philox.cuh"
#include "fi/softmax/columns.cuh"
#include "fi/scheduler/partition.cuh"
using namespace fi;

extern "C" void philox(const unsigned* counter, const unsigned* key, unsigned* out) {
  const PhiloxWords block = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int idx = 0; idx < 4; ++idx) out[idx] = block.word[idx];
}

extern "C" void bits_and_target(int64 seed, int64 position, int sample, unsigned purpose, int64 total, int64* out) {
  const RandomBits bits = random_bits(seed, position, sample, static_cast<Purpose>(purpose));
  out[0] = bits.hi;
  out[1] = bits.lo;
  out[2] = scale_bits(bits, total);
}

extern "C" int64 target(unsigned hi, unsigned lo, int64 total) { return scale_bits({hi, lo}, total); }
extern "C" int64 share(unsigned fraction, int64 total) { return scale_fraction(fraction, total); }

extern "C" void limits(int first, int last, int kv_len, int causal, int window, int* out) {
  const ColumnRule rule = {causal != 0, window};
  const ColumnLimits found[3] = {
      rule.limits(first, kv_len), rule.seen_by_any(first, last, kv_len), rule.seen_by_all(first, last, kv_len)};
  for (int idx = 0; idx < 3; ++idx) {
    out[2 * idx] = found[idx].low;
    out[2 * idx + 1] = found[idx].high;
  }
}

extern "C" void seen(const unsigned char* mask, int only_new, int q_len, int kv_len, int causal, int window, char* out) {
  const ColumnRule rule = {causal != 0, window};
  for (int q_idx = 0; q_idx < q_len; ++q_idx) {
    const ColumnLimits limits = rule.limits(query_position(q_idx, q_len, kv_len), kv_len);
    for (int column = 0; column < kv_len; ++column) {
      bool visible = limits.contains(column);
      if (visible && mask) visible = packed_mask_row(mask, only_new, q_idx, q_len, kv_len).visible(column);
      out[q_idx * kv_len + column] = visible;
    }
  }
}

extern "C" int contains(int low, int high, int column) { return ColumnLimits{low, high}.contains(column); }

template <int kStages>
static void walk(int producer, int num_steps, int* out) {
  RingCursor<kStages> cursor = producer ? RingCursor<kStages>::producer() : RingCursor<kStages>::consumer();
  for (int step = 0; step < num_steps; ++step, cursor.advance()) {
    out[2 * step] = cursor.stage;
    out[2 * step + 1] = static_cast<int>(cursor.parity);
  }
}
extern "C" void walk_1(int producer, int num_steps, int* out) { walk<1>(producer, num_steps, out); }
extern "C" void walk_3(int producer, int num_steps, int* out) { walk<3>(producer, num_steps, out); }
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    compiler = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    folder = tmp_path_factory.mktemp("headers")
    (folder / "headers.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [
        compiler,
        *flags,
        "-shared",
        "-fPIC",
        *(f"-I{folder}" for folder in FOLDERS),
        "headers.cpp",
        "-o",
        "headers.so",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "headers.so"))
    library.target.restype = library.share.restype = ctypes.c_longlong
    library.target.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_longlong]
    library.share.argtypes = [ctypes.c_uint, ctypes.c_longlong]
    longs, word = [ctypes.c_longlong] * 2, ctypes.c_uint
    library.bits_and_target.argtypes = [*longs, ctypes.c_int, word, ctypes.c_longlong, ctypes.c_void_p]
    return library


# Random numbers


def philox(headers, counter, key):
    found = (ctypes.c_uint * 4)()
    headers.philox((ctypes.c_uint * 4)(*counter), (ctypes.c_uint * 2)(*key), found)
    return tuple(found)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(headers, counter, key, expected):
    assert philox(headers, counter, key) == expected


def test_philox_equals_the_tensor_form(headers):
    words = np.random.default_rng(3).integers(0, 2**32, (200, 6))
    columns = [torch.from_numpy(column.copy()) for column in words.T]
    expected = torch.stack(philox4x32(tuple(columns[:4]), tuple(columns[4:])), dim=1).tolist()
    assert [list(philox(headers, row[:4].tolist(), row[4:].tolist())) for row in words] == expected


@pytest.mark.parametrize("purpose", [0, 1, 2])
def test_bits_and_targets_of_keys_equal_the_tensor_form(headers, purpose):
    generator = np.random.default_rng(purpose)
    extremes = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    seed = torch.tensor([*extremes, *generator.integers(-(2**63), 2**63, 100).tolist()])
    position = torch.tensor([*reversed(extremes), *generator.integers(0, 2**40, 100).tolist()])
    sample = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 5, 6, 7, *range(100)], dtype=torch.int32)
    total = torch.tensor(
        [0, 1, 2**52 - 1, 2**31, 2**31 - 1, 3, 2**51, 2**32, *generator.integers(0, 2**52, 100).tolist()]
    )
    bits = random_bits(DrawKeys(seed, sample, position), purpose)
    expected = torch.stack([*bits, scale_bits(bits, total)], dim=1).tolist()
    for row, numbers in enumerate(zip(seed.tolist(), position.tolist(), sample.tolist(), total.tolist(), strict=True)):
        found = (ctypes.c_longlong * 3)()
        headers.bits_and_target(*numbers[:3], purpose, numbers[3], found)
        assert list(found) == expected[row]


def test_targets_and_shares_are_exact(headers):
    halves = [0, 1, 2, 2**30, 2**31 - 2, 2**31 - 1, *np.random.default_rng(5).integers(0, 2**31, 20).tolist()]
    totals = [
        0,
        1,
        2**31 - 1,
        2**31,
        2**32 + 1,
        2**51,
        2**52 - 1,
        *np.random.default_rng(6).integers(0, 2**52, 20).tolist(),
    ]
    for total in totals:
        for hi in halves:
            assert (
                headers.share(hi, total) == (hi * total) >> 31 == int(scale_fraction(*map(torch.tensor, (hi, total))))
            )
            for lo in halves:
                assert headers.target(hi, lo, total) == ((hi << 31 | lo) * total) >> 62


# Columns


def visible(kv_len, position, causal, window):
    return [
        column
        for column in range(kv_len)
        if (not causal or column <= position) and (window is None or column > position - window)
    ]


RULES = [(causal, window) for causal in (False, True) for window in (None, 1, 3, 8, 2**31 - 1)]


@pytest.mark.parametrize(("causal", "window"), RULES)
def test_limits_of_queries_and_tiles_are_exact(headers, causal, window):
    for kv_len in range(10):
        for first in range(-4, kv_len):
            for last in range(first, kv_len):
                found = (ctypes.c_int * 6)()
                headers.limits(first, last, kv_len, causal, -1 if window is None else window, found)
                own, any_sees, all_see = (set(range(*found[idx : idx + 2])) for idx in (0, 2, 4))
                rows = [set(visible(kv_len, position, causal, window)) for position in range(first, last + 1)]
                assert own == rows[0] and found[0] <= found[1]
                # Neighbours' columns overlap or touch, so nothing between them is visited in vain.
                assert any_sees == set().union(*rows)
                assert all_see == set.intersection(*rows)


def test_contains_at_the_ends_of_the_integers(headers):
    for low, high in ((0, 0), (0, 5), (3, 2**31 - 1), (2, 2)):
        for column in (-1, 0, 1, 2, 3, 4, 5, 2**31 - 2, 2**31 - 1):
            assert headers.contains(low, high, column) == (low <= column < high)


def reference_sees(q_len, kv_len, causal, window, mask):
    """bool [q_len, kv_len] of fi_core's reference: with equal logits, what a one-hot value row adds to shows itself."""
    width = max(kv_len, 1)
    spec = AttentionSpec(
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=8,
        head_dim_vo=width,
        dtype=torch.float32,
        kv_format="fp32",
        page_size=None,
        table="ragged",
        causal=causal,
        windows=(window,),
        features=frozenset({"mask"} if mask else ()),
    )
    batch = Batch(
        torch.tensor([0, q_len], dtype=torch.int32),
        torch.tensor([kv_len], dtype=torch.int32),
        kv_indptr=torch.zeros(2, dtype=torch.int32),
        mask=mask,
    )
    values = torch.eye(width).view(width, 1, width)
    layer = ResolvedLayer(1.0, None, window, None, None)
    out, _ = oracle(spec, batch, torch.zeros(q_len, 1, 8), KVCache(torch.zeros(width, 1, 8), values), layer)
    return out[:, 0, :kv_len] > 0


@pytest.mark.parametrize(("causal", "window"), RULES)
@pytest.mark.parametrize("columns", [None, "kv", "new"])
def test_queries_see_what_the_reference_lets_them_see(headers, causal, window, columns):
    generator = np.random.default_rng(11)
    for q_len, kv_len in ((1, 0), (1, 1), (3, 2), (5, 5), (4, 17), (9, 21), (12, 3)):
        if columns == "new" and q_len > kv_len:
            continue
        mask, bits = None, None
        if columns is not None:
            width = (kv_len if columns == "kv" else q_len) + 7 >> 3
            bits = torch.from_numpy(generator.integers(0, 256, q_len * width, dtype=np.uint8))
            mask = PackedMask(bits, torch.tensor([0, bits.numel()]), columns)
        found = np.zeros((q_len, kv_len), dtype=np.int8)
        pointer = None if bits is None or not bits.numel() else ctypes.c_void_p(bits.data_ptr())
        arguments = (q_len, kv_len, causal, -1 if window is None else window)
        headers.seen(pointer, columns == "new", *arguments, found.ctypes.data_as(ctypes.c_void_p))
        expected = reference_sees(q_len, kv_len, causal, window, mask)
        assert found.astype(bool).tolist() == expected.tolist(), (q_len, kv_len)


# Ring


@pytest.mark.parametrize("stages", [1, 3])
def test_cursors_go_round_and_change_parity(headers, stages):
    for producer in (0, 1):
        found = (ctypes.c_int * 20)()
        getattr(headers, f"walk_{stages}")(producer, 10, found)
        expected = [(step % stages, (step // stages + producer) % 2) for step in range(10)]
        assert [tuple(found[2 * step : 2 * step + 2]) for step in range(10)] == expected
