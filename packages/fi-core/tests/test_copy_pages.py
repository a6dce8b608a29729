"""copy_pages against Python loops over bytes, its rules for pairs of pages, and its argument errors."""

from __future__ import annotations

import random

import fi_core as fi
import pytest
import torch
from fi_core import ArgumentError, IndexCheckError, KVCache, checks, library
from fi_core.conformance import compare
from fi_core.contract import EXACT
from fi_core.ops.cases.copy_pages import cases
from fi_core.ops.copy_pages import copy_pages_cost
from fi_core.settings import settings


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("FI_CHECK", "1")
    settings.cache_clear()
    checks.reset()
    yield
    monkeypatch.undo()
    settings.cache_clear()
    checks.reset()


def ids(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def cache_of(num_pages: int = 5, seed: int = 0, **options) -> KVCache:
    torch.manual_seed(seed)
    shape = (num_pages, 4, 2, 8)
    return KVCache(torch.randn(shape), torch.randn(shape), **options)


def as_bytes(kv: KVCache) -> list[list[bytes]]:
    """The bytes of every page, of K and of V."""
    return [[bytes(page.flatten().view(torch.uint8).tolist()) for page in part] for part in (kv.k, kv.v)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pages_are_copied_byte_for_byte_and_others_stay(dtype):
    draw = random.Random(1)
    for _ in range(20):
        count = draw.randrange(6)
        source, target = cache_of(9), cache_of(7, seed=1)
        source.k.view(torch.int32).random_(-(2**31), 2**31 - 1)
        sources = [draw.randrange(-1, 9) for _ in range(count)]
        targets = [page if draw.random() < 0.8 else -1 for page in draw.sample(range(7), count)]
        before, expected = as_bytes(source), as_bytes(target)
        fi.copy_pages(source, target, ids(*sources, dtype=dtype), ids(*targets, dtype=dtype))
        for read, written in zip(before, expected, strict=True):
            for page, place in zip(sources, targets, strict=True):
                if page >= 0 and place >= 0:
                    written[place] = read[page]
        assert as_bytes(target) == expected
        assert as_bytes(source) == before


def test_a_fork_gets_the_contents_of_the_shared_page():
    kv = cache_of()
    before = as_bytes(kv)
    fi.copy_pages(kv, kv, ids(3, 3, 1), ids(0, 4, 1))
    assert as_bytes(kv) == [[part[3], part[1], part[2], part[3], part[3]] for part in before]


def test_signalling_nans_keep_their_payload():
    kv = cache_of(2)
    kv.k.view(torch.int32)[0] = 0x7F812345
    fi.copy_pages(kv, kv, ids(0), ids(1))
    assert kv.k.view(torch.int32)[1].eq(0x7F812345).all()


@pytest.mark.parametrize("case", [case for case in cases() if "large" not in case.tags], ids=lambda case: case.name)
def test_cases_pass_through_the_public_function_in_checked_mode(case, checked):
    trial = case.build(torch.device("cpu"), 3)
    found, expected = trial.run(fi.copy_pages), trial.expected()
    assert set(found) == set(expected) == set(trial.tolerance)
    for name, tensor in found.items():
        assert compare(tensor, expected[name], EXACT).passed, name


@pytest.mark.parametrize(
    ("text", "sources", "targets", "same"),
    [
        (r"source_pages\[1\]: 9 is outside its limit 4", (1, 9), (2, 3), False),
        (r"target_pages\[0\]: 5 is outside its limit 4", (1, 2), (5, 3), False),
        (r"target_pages\[2\]: page 3 is the target of another pair too", (0, 1, 2), (3, 4, 3), False),
        (r"target_pages\[2\]: page 3 is the target of another pair too", (0, 1, 0), (3, 4, 3), True),
        (r"source_pages\[0\]: page 1 is the target of another pair of the same cache", (1, 2), (0, 1), True),
        (r"source_pages\[1\]: page 1 is the target of another pair of the same cache", (2, 1), (1, 0), True),
    ],
)
def test_checked_mode_names_the_first_bad_pair(checked, text, sources, targets, same):
    source = cache_of()
    target = source if same else cache_of()
    with pytest.raises(IndexCheckError, match=text):
        fi.copy_pages(source, target, ids(*sources), ids(*targets))
    fi.copy_pages(source, target, ids(0), ids(1))


def test_ids_out_of_range_are_named_on_a_cpu():
    with pytest.raises(IndexCheckError, match=r"source_pages\[1\]: 9 is outside its limit 4"):
        fi.copy_pages(cache_of(), cache_of(), ids(1, 9), ids(2, 3))


def test_checked_mode_lets_skipped_pairs_and_chains_between_two_caches_pass(checked):
    kv = cache_of()
    fi.copy_pages(kv, kv, ids(-1, 99, 1, -1), ids(99, -1, 3, 3))
    fi.copy_pages(kv, kv, ids(-1, 2, -2), ids(1, -1, 1))
    fi.copy_pages(kv, cache_of(seed=1), ids(1, 2), ids(2, 1))
    fi.copy_pages(kv, kv, ids(), ids())


def broken(name: str) -> tuple[str, dict]:
    """The argument that the error names, and the argument that is wrong."""
    kv, shape = cache_of(), (5, 4, 2, 8)
    zeros = torch.zeros(shape)
    fp8 = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    return {
        "layout": ("target.layout", {"target": KVCache(kv.k, kv.v, "HND")}),
        "format": ("target.format", {"target": KVCache(zeros.half(), zeros.half())}),
        "page size": ("target.page_size", {"target": KVCache(zeros.repeat(1, 2, 1, 1), zeros.repeat(1, 2, 1, 1))}),
        "heads": ("target.num_kv_heads", {"target": KVCache(zeros[:, :, :1], zeros[:, :, :1])}),
        "k dim": ("target.k", {"target": KVCache(zeros[..., :4], zeros)}),
        "v dim": ("target.v", {"target": KVCache(zeros, zeros[..., :4])}),
        "v pages": ("source.v", {"source": KVCache(zeros, zeros[:3])}),
        "ragged": ("source", {"source": KVCache(zeros[0], zeros[0])}),
        "scale": ("target.v_scale", {"source": KVCache(fp8, fp8), "target": KVCache(fp8, fp8, v_scale=0.5)}),
        "ids of another length": ("target_pages", {"target_pages": ids(1)}),
        "ids of another dtype": ("target_pages", {"target_pages": ids(1, 2, dtype=torch.int32)}),
        "float ids": ("source_pages", {"source_pages": torch.zeros(2)}),
        "ids of two dims": ("source_pages", {"source_pages": torch.zeros(2, 1, dtype=torch.int64)}),
        "ids with gaps": ("source_pages", {"source_pages": ids(0, 1, 2, 3)[::2]}),
        "another device": ("source_pages", {"source_pages": torch.zeros(2, dtype=torch.int64, device="meta")}),
        "a cache elsewhere": ("target", {"target": KVCache(zeros.to("meta"), zeros.to("meta"))}),
        "v elsewhere": ("source.v", {"source": KVCache(zeros, zeros.to("meta"))}),
        "an expanded target": ("target.k", {"target": KVCache(zeros[:1].expand(shape), zeros)}),
    }[name]


@pytest.mark.parametrize(
    "name",
    "layout,format,page size,heads,k dim,v dim,v pages,ragged,scale,ids of another length,ids of another dtype,float ids,"
    "ids of two dims,ids with gaps,another device,a cache elsewhere,v elsewhere,an expanded target".split(","),
)
def test_wrong_arguments_are_named(name):
    argument, wrong = broken(name)
    good = {"source": cache_of(), "target": cache_of(), "source_pages": ids(0, 1), "target_pages": ids(2, 3)}
    with pytest.raises(ArgumentError) as caught:
        fi.copy_pages(**{**good, **wrong})
    assert caught.value.argument == argument


def test_scales_that_agree_or_are_tensors_are_the_callers():
    fp8 = torch.zeros(5, 4, 2, 8, dtype=torch.float8_e4m3fn)
    source = KVCache(fp8, fp8.clone(), v_scale=0.5, k_scale=torch.ones(2))
    fi.copy_pages(source, KVCache(fp8.clone(), fp8.clone(), v_scale=0.5, k_scale=2.0), ids(1), ids(2))


@pytest.mark.parametrize("same", [False, True])
def test_compiled_copies_equal_eager_ones(same):
    torch._dynamo.reset()

    def step(source, target, sources, targets):
        fi.copy_pages(source, target, sources, targets)
        return target.k * 2

    found, expected = ([cache_of(), cache_of(seed=1)] for _ in range(2))
    pairs = (ids(3, -1, 1), ids(0, 2, 4))
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    doubled = run(found[0], found[0 if same else 1], *pairs)
    assert torch.equal(doubled, step(expected[0], expected[0 if same else 1], *pairs))
    assert [as_bytes(kv) for kv in found] == [as_bytes(kv) for kv in expected]
    assert as_bytes(found[0 if same else 1]) != as_bytes(cache_of(seed=0 if same else 1))


def test_the_operator_passes_opcheck():
    source, target = cache_of(), cache_of(seed=1)
    details = (*library.cache_details(source), *library.cache_details(target)[2:])
    arguments = (source.k, source.v, target.k, target.v, *details, ids(0, 1), ids(2, 3))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fi.copy_pages.default, arguments, test_utils=tests)


def test_cost_is_two_ways_of_every_byte():
    kv = KVCache(torch.zeros(3, 4, 2, 8, dtype=torch.bfloat16), torch.zeros(3, 4, 2, 16, dtype=torch.bfloat16))
    assert copy_pages_cost(kv, 5).num_bytes == 5 * 2 * 4 * 2 * (8 + 16) * 2
    assert copy_pages_cost(kv, 0).num_bytes == copy_pages_cost(kv, 5).num_flops == 0


@pytest.mark.gpu
@pytest.mark.parametrize("pageable", ["source", "target"])
def test_pageable_memory_beside_a_gpu_is_refused(pageable):
    here = KVCache(torch.zeros(5, 4, 2, 8, device="cuda"), torch.zeros(5, 4, 2, 8, device="cuda"))
    caches = {"source": here, "target": here, pageable: cache_of()}
    with pytest.raises(ArgumentError) as caught:
        fi.copy_pages(**caches, source_pages=ids(0).cuda(), target_pages=ids(1).cuda())
    assert caught.value.argument == f"{pageable}.k"


@pytest.mark.gpu
def test_pages_swap_out_to_pinned_memory_and_back():
    kv = cache_of()
    here = KVCache(kv.k.cuda(), kv.v.cuda())
    host = KVCache(torch.zeros(3, 4, 2, 8).pin_memory(), torch.zeros(3, 4, 2, 8).pin_memory())
    fi.copy_pages(here, host, ids(4, 1).cuda(), ids(0, 2).cuda())
    here.k[[1, 4]] = 0
    fi.copy_pages(host, here, ids(0, 2).cuda(), ids(4, 3).cuda())
    torch.cuda.synchronize()
    assert torch.equal(host.k[[0, 2]], kv.k[[4, 1]]) and torch.equal(host.v[[0, 2]], kv.v[[4, 1]])
    assert torch.equal(here.k[[3, 4]].cpu(), kv.k[[1, 4]]) and here.k[1].eq(0).all()
