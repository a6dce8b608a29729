"""Conformance cases of ``attention`` with many new tokens a request, beside requests with one, none and no cache.

Backends serve long queries by kernels of their own, which meet every layout, shape and feature here. Requests end inside
a tile, a step and a page; one continues a cache, one is all new, one decodes, and one is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...contract import Case
from ...rope import FusedRope
from .attention import case

_BF16, _FP16 = torch.bfloat16, torch.float16
_LONG = ((70, 1, 0, 130, 1), (203, 77, 0, 130, 0))
_APPEND = ((17, 3), (1500, 700))
_HOSTILE = frozenset({"hostile"})
_PLACES: Mapping[str, Mapping[str, Any]] = {
    "table_row": {"table_row": True, "storage": "interleaved"},
    "indptr": {"dtype": _FP16, "table": "indptr", "kv_layout": "HND"},
    "fp8": {"kv_format": "fp8_e5m2", "scale": "tensor", "storage": "padded"},
}


def _case(name: str, lens: tuple[tuple[int, ...], tuple[int, ...]] = _LONG, **options: Any) -> Case:
    return case(f"long_{name}", *lens, **{"dtype": _BF16, "heads": (4, 2), **options})


def long_cases() -> Iterator[Case]:
    yield from _shapes()
    yield from _layouts()
    yield from _features()
    yield from _formats()
    yield from _hostile()


def _shapes() -> Iterator[Case]:
    for dtype in (_BF16, _FP16):
        yield _case(str(dtype).removeprefix("torch."), dtype=dtype, features={"lse"})
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 48, 64, 128):
        yield _case(f"group_{group}", heads=(group, 1), features={"lse"})
    for head_dim in (80, 96, 128, 192, 256):
        for table in ("dense", "ragged"):
            yield _case(f"head_dim_{head_dim}_{table}", head_dim=head_dim, table=table)
    for table in ("dense", "ragged"):
        yield _case(f"head_dim_192_128_{table}", head_dim=192, head_dim_vo=128, table=table)
    yield _case("append", _APPEND, head_dim=128, heads=(8, 2), features={"lse"})
    yield _case("append_slots", _APPEND, head_dim=128, heads=(8, 2), page_size=1, table_row=True, features={"lse"})
    yield _case("append_ragged", _APPEND, head_dim=128, heads=(8, 2), table="ragged", features={"lse"})
    yield _case("many_requests", ((19,) * 24, tuple(range(19, 43))), features={"lse"})
    yield _case("decodes_beside", ((40, *(1,) * 20), (300, *range(20))), heads=(8, 1), features={"lse"})
    yield from _short_steps()
    yield _case("invariant", batch_invariant=True, features={"lse"})
    yield _case("invariant_append", _APPEND, batch_invariant=True)
    yield _case("second_update", before=True)


def _short_steps() -> Iterator[Case]:
    """Steps without a long query under plans that admit one."""
    decodes: Any = ((1, 1, 0, 1, 1), (403, 77, 30, 0, 1))
    for name, options in (
        ("", {"features": {"lse"}}),
        ("_d128", {"head_dim": 128, "heads": (8, 2), "dtype": _FP16, "features": {"sinks", "lse"}}),
        ("_window", {"windows": (None, 60), "window": 60}),
        ("_fp8", {"kv_format": "fp8_e4m3", "scale": "heads"}),
        ("_slots", {"page_size": 1, "table_row": True}),
        ("_ragged", {"table": "ragged", "causal": False}),
        ("_invariant", {"batch_invariant": True}),
        ("_second_update", {"before": True}),
    ):
        yield _case(f"only_decodes{name}", decodes, slack=40, **options)
    yield _case("only_two_tokens", ((2, 1, 2), (203, 77, 2)), slack=40, features={"lse", "mask"}, mask="new")
    yield _case("three_tokens", ((2, 3, 1), (203, 77, 2)), slack=40, features={"lse"})


def _layouts() -> Iterator[Case]:
    for page_size in (1, 2, 3, 5, 8, 16, 24, 32, 64, 100, 128, 255, 256):
        for name, options in _PLACES.items():
            yield _case(f"page_size_{page_size}_{name}", page_size=page_size, **options)
    # Tiles enough for some to begin after the end of others of their request.
    many: dict[str, Any] = {"page_size": 1, "head_dim": 128, "heads": (16, 4), "tags": frozenset({"large"})}
    yield _case("slots_of_many_tiles", ((3000, 700, 1), (3100, 1500, 5000)), table_row=True, **many)
    yield _case("slots_of_many_tiles_not_causal", ((2000, 900), (2000, 901)), table="indptr", causal=False, **many)
    # Of a step of 128 keys some parts of 32 follow each other in memory and some do not.
    runs: dict[str, Any] = {"page_size": 1, "run": 70}
    yield _case("slots_in_runs", _APPEND, head_dim=128, heads=(8, 2), features={"lse"}, **runs)
    yield _case("slots_in_runs_window", _APPEND, windows=(200,), kv_layout="HND", storage="padded", **runs)
    yield _case("slots_in_runs_d96", head_dim=96, table="indptr", storage="interleaved", causal=False, **runs)
    for storage in ("interleaved", "padded"):
        for kv_layout in ("NHD", "HND"):
            placed: dict[str, Any] = {"storage": storage, "kv_layout": kv_layout, "strided": True}
            yield _case(f"{storage}_{kv_layout}", **placed)
            yield _case(f"ragged_{storage}_{kv_layout}", table="ragged", **placed)


def _features() -> Iterator[Case]:
    for head_dim in (64, 128, 256):
        plain: dict[str, Any] = {"head_dim": head_dim}
        for window in (1, 5, 64, 150, 1000):
            yield _case(f"window_{window}_d{head_dim}", windows=(window,), features={"lse"}, **plain)
        yield _case(f"window_of_two_d{head_dim}", windows=(None, 20), window=20, **plain)
        yield _case(f"soft_cap_d{head_dim}", features={"soft_cap", "lse"}, **plain)
        yield _case(f"sinks_d{head_dim}", features={"sinks", "lse"}, **plain)
        yield _case(f"alibi_d{head_dim}", features={"alibi", "lse"}, heads=(6, 2), **plain)
        yield _case(f"mask_kv_d{head_dim}", features={"mask", "lse"}, mask="kv", causal=False, **plain)
        yield _case(f"mask_tree_d{head_dim}", features={"mask"}, mask="new", causal=False, **plain)
        yield _case(f"not_causal_d{head_dim}", causal=False, features={"lse"}, **plain)
        everything = {"soft_cap", "sinks", "alibi", "mask", "lse"}
        yield _case(
            f"every_feature_d{head_dim}", features=everything, mask="kv", windows=(None, 70), window=70, **plain
        )
    yield _case("window_not_causal", windows=(60,), causal=False, features={"lse"})
    yield _case("window_append", _APPEND, windows=(200,), features={"sinks", "lse"}, head_dim=128)
    yield _case("soft_cap_slots", features={"soft_cap"}, page_size=1, head_dim=128)
    # Caps that some steps' scores come near to, and that none does.
    for head_dim in (64, 128, 256):
        capped: dict[str, Any] = {"features": {"soft_cap", "lse"}, "head_dim": head_dim, "heads": (8, 2)}
        for soft_cap in (10.0, 50.0):
            yield _case(f"soft_cap_{soft_cap:.0f}_d{head_dim}", _APPEND, soft_cap=soft_cap, **capped)
        yield _case(f"soft_cap_window_d{head_dim}", _APPEND, soft_cap=50.0, windows=(300,), **capped)
        for soft_cap in (50.0, 64.0, 100.0):
            yield _case(f"soft_cap_{soft_cap:.0f}_steep_d{head_dim}", _APPEND, soft_cap=soft_cap, steep=150.0, **capped)
    yield _case("rope_q", rope=FusedRope(64), features={"lse"})
    yield _case("rope_q_d128", rope=FusedRope(128), head_dim=128, heads=(8, 2))
    yield _case("rope_q_interleaved", rope=FusedRope(32, "interleaved"))
    yield _case("rope_q_partial", rope=FusedRope(64), head_dim=192, head_dim_vo=128, table="ragged", heads=(7, 1))
    yield _case("rope_q_d256", rope=FusedRope(256), head_dim=256, dtype=_FP16, windows=(90,))
    yield _case("rope_q_fp8", rope=FusedRope(128), head_dim=128, kv_format="fp8_e4m3", scale="heads")
    yield _case("rope_q_slots", rope=FusedRope(128, "interleaved"), head_dim=128, page_size=1, strided=True)
    yield _case("rope_qk", rope=FusedRope(64, keys=True), features={"lse"})


def _formats() -> Iterator[Case]:
    for kv_format in ("fp8_e4m3", "fp8_e5m2"):
        for head_dim in (64, 128, 256):
            yield _case(f"{kv_format}_d{head_dim}", kv_format=kv_format, scale="heads", head_dim=head_dim)
        yield _case(f"{kv_format}_ragged", kv_format=kv_format, scale="tensor", table="ragged", head_dim=128)
        yield _case(f"{kv_format}_slots", kv_format=kv_format, scale="float", page_size=1, as_bytes=True)
        queries: dict[str, Any] = {"kv_format": kv_format, "q_format": "fp8_e4m3", "scale": "heads", "q_scale": "heads"}
        queries["fp8_weights"] = kv_format == "fp8_e4m3"
        yield _case(f"{kv_format}_queries_d64", **queries, features={"lse"})
        yield _case(f"{kv_format}_queries_d128", **queries, head_dim=128, heads=(8, 2))
        yield _case(f"{kv_format}_queries_ragged", **queries, head_dim=128, table="ragged", strided=True)
    yield from _fp8_products()


def _fp8_products() -> Iterator[Case]:
    """Q, K and V in e4m3, which kernels may multiply as they are."""
    form: dict[str, Any] = {"kv_format": "fp8_e4m3", "q_format": "fp8_e4m3", "fp8_weights": True}
    everything = {"soft_cap", "sinks", "alibi", "mask", "lse"}
    for name, options in (
        ("d256", {"head_dim": 256, "page_size": 8, "scale": "tensor", "q_scale": "tensor"}),
        ("d96_fp16", {"head_dim": 96, "dtype": _FP16, "heads": (7, 1), "page_size": 64, "kv_layout": "HND"}),
        ("d192_128", {"head_dim": 192, "head_dim_vo": 128, "storage": "interleaved", "before": True}),
        ("window", {"windows": (100,), "features": {"lse"}, "head_dim": 128, "causal": False}),
        ("slots", {"page_size": 1, "head_dim": 128, "q_scale": "float", "windows": (100,), "as_bytes": True}),
        ("invariant", {"batch_invariant": True, "page_size": 32, "features": {"lse"}}),
        (
            "every_feature",
            {"features": everything, "mask": "kv", "windows": (60,), "q_scale": "heads", "scale": "heads"},
        ),
        ("append", {"head_dim": 128, "heads": (8, 2), "q_scale": "heads", "scale": "heads"}),
    ):
        lens = _APPEND if name == "append" else _LONG
        yield _case(f"fp8_products_{name}", lens, **form, **options)
    yield _case("fp8_products_padding", ((40, 1, 0, 20), (0, 9, 0, 0)), **form)


def _hostile() -> Iterator[Case]:
    for name, q_lens, kv_lens, options in (
        ("padding", (40, 1, 0, 20), (0, 9, 0, 0), {}),
        ("all_padding", (40, 1), (0, 0), {}),
        ("padding_with_sinks", (40, 1, 2), (0, 9, 0), {"features": {"lse", "sinks"}}),
        ("no_new_tokens", (0, 33, 0), (20, 35, 7), {}),
        ("more_queries_than_keys", (90, 40), (30, 40), {}),
        ("more_queries_than_keys_not_causal", (90,), (30,), {"causal": False, "windows": (20,)}),
        ("no_spare_rows", (40, 1), (40, 66), {"spare_rows": 0}),
        ("many_spare_rows", (17, 1), (40, 66), {"spare_rows": 300}),
        ("capacity_to_spare", (40, 1), (40, 66), {"slack": 5000}),
    ):
        yield case(f"long_{name}", q_lens, kv_lens, _HOSTILE, **{"dtype": _BF16, "features": {"lse"}, **options})
