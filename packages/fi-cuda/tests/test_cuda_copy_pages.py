"""copy_pages: how a page becomes rows of packs, the packed struct, and that the header's index maths covers every byte."""

from __future__ import annotations

import struct

import pytest
import torch
from fi_core.ops.cases.copy_pages import cases
from fi_core.records import KVCache
from fi_cuda.kernels import copy_pages as module
from fi_cuda.kernels.copy_pages import CopyPagesSpec, copy_pages, page_form
from fi_cuda.params import KINDS


@pytest.mark.parametrize(
    ("shape", "source", "target", "expected"),
    [
        ((16, 8, 128), (1024, 128), (1024, 128), (1, 16384, 1, (0, 0), (0, 0))),
        ((16, 8, 128), (1024, 128), (2048, 128), (16, 1024, 1, (1024, 0), (2048, 0))),
        ((16, 8, 128), (1024, 128), (1152, 144), (128, 128, 8, (1024, 128), (1152, 144))),
        ((16, 1, 128), (128, 7), (128, 999), (1, 2048, 1, (0, 0), (0, 0))),
        ((1, 8, 128), (5, 128), (7, 128), (1, 1024, 1, (0, 0), (0, 0))),
        ((1, 8, 128), (5, 128), (7, 256), (8, 128, 8, (5, 128), (7, 256))),
        ((1, 1, 80), (1, 2), (3, 4), (1, 80, 1, (0, 0), (0, 0))),
    ],
)
def test_a_page_has_as_few_rows_as_its_strides_allow(shape, source, target, expected):
    assert tuple(page_form(shape, source, target)) == expected


class Emulated:
    """Stands in for the kernel of a spec: runs the header's index maths in Python on the launched addresses."""

    def __init__(self, monkeypatch):
        self.launches = 0
        monkeypatch.setattr(module, "_bound", self.bound)

    def bound(self, device, index, vector, flat, streaming):
        self.spec = CopyPagesSpec(index, vector, flat, streaming)
        return self

    def launch(self, device, grid_x, grid_y, *values):
        self.launches += 1
        codes = [code for _, kind in self.spec.layout.fields for code in KINDS[kind][1]]
        numbers = struct.unpack("@" + "".join(codes) + "0P", self.spec.layout.packer.pack(*values))
        names = []
        for name, kind in self.spec.layout.fields:
            names += [f"{name}.outer", f"{name}.inner"] if kind == "rows" else [name]
        self.values = dict(zip(names, numbers, strict=True))
        self.grid = (grid_x, grid_y)

    def replay(self, memory, ids):
        """Copy in ``memory`` (address -> its tensor's bytes), for int lists of (source, target) ids."""
        params, size, seen = self.values, self.spec.vector_bytes, set()
        num_packs = params["k_packs"] + params["v_packs"]
        per_block = 2 * self.spec.num_threads
        assert self.grid == (len(ids), -(-num_packs // per_block))
        for source, target in ids:
            for pack in range(num_packs if min(source, target) >= 0 else 0):
                part, place = ("k", pack) if pack < params["k_packs"] else ("v", pack - params["k_packs"])
                row, column = (0, place) if self.spec.flat else divmod(place, params[f"{part}_width"])
                outer, inner = (row, 0) if params[f"{part}_inner"] == 1 else divmod(row, params[f"{part}_inner"])
                at = []
                for side, page in (("source", source), ("target", target)):
                    name = f"{side}_{part}"
                    offset = page * params[f"{name}_page_stride"] + column
                    offset += outer * params[f"{name}_strides.outer"] + inner * params[f"{name}_strides.inner"]
                    at.append((params[name], offset * size))
                assert all((address + offset) % size == 0 for address, offset in at)
                assert (target, part, at[1]) not in seen
                seen.add((target, part, at[1]))
                values = memory[at[0][0]][at[0][1] : at[0][1] + size]
                memory[at[1][0]][at[1][1] : at[1][1] + size] = values


def storage_from(tensor):
    """The bytes of a tensor's storage from its first element on, as a writable view."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole[tensor.storage_offset() * tensor.element_size() :]


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if "large" not in case.tags and case.values["page_size"] <= 16],
    ids=lambda case: case.name,
)
def test_every_byte_of_a_page_is_copied_once(monkeypatch, case):
    emulated = Emulated(monkeypatch)

    def call(source, target, source_pages, target_pages):
        copy_pages(source, target, source_pages, target_pages)
        tensors = (source.k, source.v, target.k, target.v)
        pairs = list(zip(source_pages.tolist(), target_pages.tolist(), strict=True))
        emulated.replay({tensor.data_ptr(): storage_from(tensor) for tensor in tensors}, pairs)

    trial = case.build(torch.device("cpu"), 0)
    found, expected = trial.run(call), trial.expected()
    assert emulated.launches == 1
    for name in trial.tolerance:
        assert torch.equal(found[name], expected[name]), name


def test_vectors_are_as_wide_as_every_tensor_allows(monkeypatch):
    emulated = Emulated(monkeypatch)
    ids = torch.zeros(1, dtype=torch.int32)

    def width(cache):
        copy_pages(KVCache(*torch.zeros(2, 3, 16, 2, 64, dtype=torch.bfloat16)), cache, ids, ids)
        return emulated.spec.vector_bytes

    assert width(KVCache(*torch.zeros(2, 3, 16, 2, 64, dtype=torch.bfloat16))) == 16
    assert width(KVCache(*torch.zeros(2, 3, 16, 2, 68, dtype=torch.bfloat16)[..., :64])) == 8
    assert width(KVCache(*torch.zeros(2, 3, 16, 2, 72, dtype=torch.bfloat16)[..., 1:65])) == 2
    assert emulated.spec.index == torch.int32


def test_a_page_larger_than_one_block_takes_more_rows_of_blocks(monkeypatch):
    emulated = Emulated(monkeypatch)
    cache = KVCache(*torch.zeros(2, 4, 16, 8, 128, dtype=torch.bfloat16))
    copy_pages(cache, cache, torch.arange(3), torch.arange(3))
    assert emulated.grid == (3, 2 * 16 * 8 * 128 * 2 // 16 // 256)
    assert (emulated.values["k_packs"], emulated.values["k_width"]) == (2048, 2048)
    assert not emulated.spec.streaming
    copy_pages(cache, cache, *torch.zeros(2, 64, dtype=torch.int64))
    assert emulated.spec.streaming
