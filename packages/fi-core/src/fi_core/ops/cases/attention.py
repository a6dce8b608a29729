"""Conformance cases of ``attention``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...plan import attention_values
from ...protocols import AttentionKernel
from ...records import AttentionSpec, Batch, Capacity, LayerArgs, PackedMask, ResolvedLayer
from ...reference.append_kv import quantise
from ...reference.attention import oracle
from ...rope import FusedRope, Llama3Scaling, RopeConfig, RopeTable, YarnScaling
from ...tolerances import attention_tolerance, lse_tolerance
from . import poisoned
from .attention_batches import large_batches
from .kv import CacheForm, ScaleForm, indptr_of, make_cache, make_scale, tilt
from .prefixes import Forest, forests, share


@dataclass(frozen=True)
class Scenario:
    """One batch under one spec, and how its tensors are laid out.

    ``window`` is what the call picks of spec.windows; ``mask`` the columns of a packed mask; ``spare_rows`` rows of q and
    out past q_indptr[B]; ``strided`` makes q and out views of wider tensors; ``before`` plans another batch first, to find
    state that an update fails to replace. ``q_scale`` is the form of the scale of FP8 queries; ``scaling`` that of the
    rotation's frequencies; ``forest`` what requests share; ``soft_cap`` the cap of a spec with one; ``steep`` as in ``tilt``.
    """

    spec: AttentionSpec
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    form: CacheForm
    window: int | None = None
    mask: Literal["kv", "new"] | None = None
    spare_rows: int = 3
    strided: bool = False
    before: bool = False
    slack: int = 0
    q_scale: ScaleForm = "none"
    scaling: YarnScaling | Llama3Scaling | None = None
    fp8_weights: bool = False
    forest: Forest | None = None
    soft_cap: float = 2.0
    steep: float = 0.0

    @property
    def capacity(self) -> Capacity:
        longest = max([1, *self.q_lens]) + self.slack
        total = max(1, sum(self.q_lens), longest) + self.slack
        prefixes = () if self.forest is None else (len(self.forest.nodes) + self.slack, self.forest.depth)
        longest_kv = max([1, *self.kv_lens]) + self.slack
        return Capacity(max(1, len(self.q_lens)) + self.slack, total, longest, longest_kv, *prefixes)


def _scenario(q_lens: tuple[int, ...], kv_lens: tuple[int, ...], options: Mapping[str, Any]) -> Scenario:
    """Options are fields of AttentionSpec (with heads=(Hq, Hkv) for the head counts), CacheForm and Scenario."""
    chosen = {"heads": (4, 2), "head_dim": 64, "dtype": torch.float32, **options}
    num_qo_heads, num_kv_heads = chosen.pop("heads")
    if chosen.get("table") == "ragged":
        chosen["page_size"] = None
    in_spec = {name: chosen.pop(name) for name in list(chosen) if name in AttentionSpec.__dataclass_fields__}
    spec = AttentionSpec(num_qo_heads, num_kv_heads, **in_spec)
    in_form = {name: chosen.pop(name) for name in list(chosen) if name in CacheForm.__dataclass_fields__}
    for name in ("head_dim", "head_dim_vo", "kv_format", "page_size", "kv_layout", "table"):
        in_form[name] = getattr(spec, name)
    window = chosen.pop("window", spec.windows[0])
    return Scenario(spec, q_lens, kv_lens, CacheForm(num_heads=num_kv_heads, **in_form), window=window, **chosen)


def case(
    name: str, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], tags: frozenset[str] = frozenset(), **options: Any
) -> Case:
    scenario = _scenario(q_lens, kv_lens, options)
    values = attention_values(scenario.spec, scenario.capacity.max_q_len, scenario.forest is not None)
    return Case(name, values, lambda device, seed: build(scenario, device, seed), tags)


def build(scenario: Scenario, device: torch.device, seed: int) -> Trial:
    """Inputs from ``seed`` on ``device``, the run on poisoned outputs, and the oracle's results."""
    spec = scenario.spec
    generator = torch.Generator().manual_seed(seed)
    cache = make_cache(scenario.form, scenario.kv_lens, device, generator)
    num_tokens = sum(scenario.q_lens)
    rows = num_tokens + scenario.spare_rows
    q = torch.randn(rows, spec.num_qo_heads, spec.head_dim, generator=generator)
    q[num_tokens:] = math.nan
    tilt(q[:num_tokens], cache, scenario.kv_lens, scenario.steep)
    q_scale = make_scale(scenario.q_scale, spec.num_qo_heads, device, generator)
    stored = (
        quantise(q.to(device), spec.q_format, q_scale, torch.float32) if spec.q_is_fp8 else q.to(device, spec.dtype)
    )
    q = _place(stored, scenario.strided)
    lengths = torch.tensor(scenario.kv_lens, dtype=torch.int32, device=device)
    mask = _mask(scenario, device, generator)
    levels = None
    if scenario.forest is not None:
        share(cache, scenario.forest, scenario.form)
        levels = scenario.forest.levels(device)
    batch = Batch(indptr_of(scenario.q_lens, device), lengths, mask=mask, levels=levels, **cache.fields)
    layer = _layer(scenario, q_scale, device, generator)
    shape = (rows, spec.num_qo_heads, spec.head_dim_vo or 0)

    def run(kernel: AttentionKernel) -> dict[str, Tensor]:
        state = kernel.plan(spec, scenario.capacity, str(device))
        if scenario.before:
            state.update(replace(batch, kv_lens=lengths.flip(0).contiguous().clamp(max=1), levels=None))
        state.update(batch)
        out = _place(poisoned(shape, spec.dtype, device), scenario.strided)
        lse = poisoned(shape[:2], torch.float32, device) if "lse" in spec.features else None
        state.run(q, cache.kv, layer, out, lse)
        return _outputs(out, lse, num_tokens)

    def expected() -> dict[str, Tensor]:
        out, lse = oracle(spec, batch, q, cache.kv, layer)
        outputs = _outputs(out, lse if "lse" in spec.features else None, num_tokens)
        # The very bits of the poison: a NaN that is cast changes them.
        rest = {
            "rest of out": poisoned(shape, spec.dtype, device),
            "rest of lse": poisoned(shape[:2], torch.float32, device),
        }
        return {name: rest[name][num_tokens:] if name in rest else value for name, value in outputs.items()}

    tolerance = {"out": attention_tolerance(spec.dtype, scenario.fp8_weights), "rest of out": EXACT}
    if "lse" in spec.features:
        tolerance |= {"lse": lse_tolerance(spec.dtype), "rest of lse": EXACT}
    return Trial(run, expected, tolerance)


def _outputs(out: Tensor, lse: Tensor | None, num_tokens: int) -> dict[str, Tensor]:
    outputs = {"out": out[:num_tokens], "rest of out": out[num_tokens:]}
    return outputs if lse is None else {**outputs, "lse": lse[:num_tokens], "rest of lse": lse[num_tokens:]}


def _place(rows: Tensor, strided: bool) -> Tensor:
    """``rows`` [T, H, D], as a view of a wider tensor (a fused q, k, v projection) if asked."""
    if not strided:
        return rows
    wide = torch.full((rows.shape[0], rows.shape[1] + 2, rows.shape[2]), math.nan, device=rows.device).to(rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def _layer(
    scenario: Scenario, q_scale: float | Tensor | None, device: torch.device, generator: torch.Generator
) -> ResolvedLayer:
    spec, heads = scenario.spec, scenario.spec.num_qo_heads
    sinks = torch.randn(heads, generator=generator).to(device) if "sinks" in spec.features else None
    slopes = (torch.rand(heads, generator=generator) * 0.2).to(device) if "alibi" in spec.features else None
    cap = scenario.soft_cap if "soft_cap" in spec.features else None
    rope = None
    if spec.rope is not None:
        config = RopeConfig(spec.rope.rotary_dim, pairs=spec.rope.pairs, scaling=scenario.scaling)
        rope = RopeTable.make(config, device)
    return LayerArgs(None, cap, scenario.window, sinks, slopes, q_scale, rope).resolve(spec)


def _mask(scenario: Scenario, device: torch.device, generator: torch.Generator) -> PackedMask | None:
    """Random bits, padding bits set: a kernel must not take them for columns."""
    if scenario.mask is None:
        return None
    parts, indptr = [torch.zeros(0, dtype=torch.uint8)], [0]
    for q_len, kv_len in zip(scenario.q_lens, scenario.kv_lens, strict=True):
        columns = kv_len if scenario.mask == "kv" else q_len
        bits = torch.ones(q_len, math.ceil(columns / 8) * 8, dtype=torch.uint8)
        bits[:, :columns] = torch.rand(q_len, columns, generator=generator) < 0.6
        weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
        parts.append((bits.view(q_len, bits.shape[1] // 8, 8) * weights).sum(dim=2, dtype=torch.uint8).flatten())
        indptr.append(indptr[-1] + parts[-1].numel())
    packed = torch.cat(parts).to(device)
    return PackedMask(packed, torch.tensor(indptr, dtype=torch.int64, device=device), scenario.mask)


_HOSTILE = frozenset({"hostile"})
_HOSTILE_DTYPES = ((torch.float32, ""), (torch.bfloat16, "_bf16"))
_LARGE = frozenset({"large"})
_BF16, _FP16 = torch.bfloat16, torch.float16
_PLACES: Mapping[str, Mapping[str, Any]] = {
    "table_row": {"dtype": _BF16, "table_row": True, "kv_layout": "HND"},
    "indptr": {"dtype": _FP16, "table": "indptr", "storage": "interleaved"},
    "fp8": {"dtype": _BF16, "kv_format": "fp8_e4m3", "scale": "heads", "kv_layout": "HND", "storage": "interleaved"},
}
_DECODE = ((1, 1, 1), (1, 17, 70))
_MIXED = ((1, 9, 1, 5), (33, 9, 1, 40))


def cases() -> Iterator[Case]:
    """Cases cheap enough for a CPU, then those that need a GPU with much memory."""
    yield from _basic()
    yield from _hostile()
    yield from _shapes()
    yield from _layouts()
    yield from _features()
    yield from _formats()
    yield from _rotations()
    yield from _prefixes()
    yield from _large()


def _basic() -> Iterator[Case]:
    for dtype in (torch.float32, _FP16, _BF16):
        name = str(dtype).removeprefix("torch.")
        yield case(f"decode_{name}", *_DECODE, dtype=dtype)
        yield case(f"prefill_{name}", (33, 20), (33, 20), dtype=dtype, features={"lse"})
        yield case(f"mixed_{name}", *_MIXED, dtype=dtype, features={"lse"})
    yield case("decode_long", (1, 1), (150, 300), dtype=_BF16, features={"lse"})
    yield case("append_chunk", (16, 3), (80, 67), dtype=_BF16)
    yield case("prefill_d128", (40,), (40,), dtype=_BF16, head_dim=128, heads=(8, 2))
    yield case("decode_d128_group4", (1, 1, 1, 1), (5, 64, 65, 130), dtype=_BF16, head_dim=128, heads=(8, 2))
    yield case("not_causal", (7, 1, 20), (30, 18, 20), causal=False, features={"lse"})
    yield case("not_causal_bf16", (7, 1, 16), (130, 18, 16), dtype=_BF16, causal=False, features={"lse"})
    yield case("batch_invariant", *_MIXED, dtype=_BF16, batch_invariant=True)
    yield case("capacity_to_spare", *_MIXED, dtype=_BF16, slack=100)
    yield case("second_update", *_MIXED, dtype=_BF16, before=True)


def _hostile() -> Iterator[Case]:
    for dtype, suffix in _HOSTILE_DTYPES:
        yield from _hostile_lengths({"dtype": dtype}, suffix)


def _hostile_lengths(base: dict[str, Any], suffix: str) -> Iterator[Case]:
    for name, q_lens, kv_lens, options in (
        ("empty_batch", (), (), {"features": {"lse"}}),
        ("length_one", (1,), (1,), {"features": {"lse"}}),
        ("padding_requests", (1, 1, 0, 2), (0, 9, 0, 0), {"features": {"lse"}}),
        ("all_padding", (1, 1), (0, 0), {"features": {"lse"}}),
        ("padding_requests_with_sinks", (1, 1, 2), (0, 9, 0), {"features": {"lse", "sinks"}}),
        ("no_new_tokens", (0, 3, 0), (20, 5, 7), {"features": {"lse"}}),
        ("more_queries_than_keys", (9, 4), (3, 4), {"features": {"lse"}}),
        ("more_queries_than_keys_not_causal", (9,), (3,), {"causal": False, "windows": (2,)}),
        ("many_short_requests", (1,) * 20, tuple(range(20)), {}),
        ("no_spare_rows", (4, 1), (4, 6), {"spare_rows": 0}),
        ("many_spare_rows", (1, 1), (4, 6), {"spare_rows": 30}),
    ):
        yield case(name + suffix, q_lens, kv_lens, _HOSTILE, **base, **options)


def _shapes() -> Iterator[Case]:
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        yield case(f"group_{group}", (1, 6), (19, 22), dtype=_BF16, heads=(group, 1))
    for group in (12, 32, 48, 64, 100, 128):
        yield case(f"group_{group}", (1, 6), (19, 122), dtype=_BF16, heads=(group, 1))
    for group in (8, 16, 128):
        yield case(f"group_{group}_verify", (16, 1, 5), (150, 70, 5), dtype=_BF16, heads=(group, 1), features={"lse"})
    many: dict[str, Any] = {"dtype": _BF16, "heads": (48, 1), "features": {"soft_cap", "sinks", "alibi", "mask", "lse"}}
    yield case("group_48_features", (9, 16), (50, 170), **many, mask="new", windows=(None, 60), window=60)
    yield case("group_48_mask_kv", (9, 16), (50, 170), **many, mask="kv", causal=False)
    yield case("group_48_invariant", (9, 16), (50, 370), dtype=_BF16, heads=(48, 1), batch_invariant=True)
    yield case("group_48_ragged", (9, 16), (50, 170), dtype=_FP16, heads=(48, 1), table="ragged", head_dim=96)
    yield case(
        "group_48_fp8", (9, 2), (50, 170), dtype=_BF16, heads=(48, 1), kv_format="fp8_e4m3", scale="heads", page_size=5
    )
    yield case("group_32_d128", (3, 16), (80, 200), dtype=_FP16, head_dim=128, heads=(64, 2), windows=(90,))
    yield case("group_16_d256", (1, 4), (200, 90), dtype=_BF16, head_dim=256, heads=(32, 2), features={"sinks", "lse"})
    for head_dim in (80, 96, 192, 256):
        yield case(f"head_dim_{head_dim}", (1, 6), (19, 22), dtype=_BF16, head_dim=head_dim)
    yield case("head_dim_192_128", (1, 6), (19, 22), dtype=_BF16, head_dim=192, head_dim_vo=128)
    yield case("smollm_heads", (1, 1), (40, 3), heads=(9, 3))
    for name, lens, values in large_batches():
        yield case(name, *lens, **values)
    for page_size in (1, 3, 64, 256):
        yield case(f"page_size_{page_size}", (1, 6, 1), (19, 70, 64), dtype=_BF16, page_size=page_size)
    for page_size in (1, 2, 5, 8, 24, 32, 100, 128, 255):
        # Every page size meets every table form, K and V apart and in turns, tokens and heads outermost.
        for name, options in _PLACES.items():
            yield case(f"page_size_{page_size}_{name}", (1, 0, 4), (77, 0, 140), page_size=page_size, **options)


def _layouts() -> Iterator[Case]:
    yield case("hnd", *_MIXED, dtype=_BF16, kv_layout="HND")
    yield case("hnd_interleaved", *_MIXED, dtype=_BF16, kv_layout="HND", storage="interleaved")
    yield case("interleaved", *_MIXED, dtype=_BF16, storage="interleaved", strided=True)
    yield case("padded_rows", *_MIXED, dtype=_BF16, storage="padded", strided=True)
    yield case("table_row", *_MIXED, dtype=_BF16, table_row=True)
    yield case("table_indptr", *_MIXED, dtype=_BF16, table="indptr")
    yield case("table_indptr_padding", (1, 0, 1), (0, 0, 33), dtype=_BF16, table="indptr", page_size=1)
    yield case("token_slots", *_DECODE, dtype=_BF16, page_size=1, table_row=True)
    yield case("ragged", *_MIXED, dtype=_BF16, table="ragged", features={"lse"})
    yield case("ragged_hnd", *_MIXED, dtype=_BF16, table="ragged", kv_layout="HND")
    yield case(
        "ragged_interleaved", (33, 20), (33, 20), dtype=_BF16, table="ragged", storage="interleaved", strided=True
    )


def _features() -> Iterator[Case]:
    for window in (1, 5, 16, 1000):
        yield case(f"window_{window}", *_MIXED, dtype=_BF16, windows=(window,), features={"lse"})
    yield case("soft_cap", *_MIXED, dtype=_BF16, features={"soft_cap", "lse"})
    yield case("sinks", *_MIXED, dtype=_BF16, features={"sinks", "lse"})
    yield case("sinks_window", *_DECODE, dtype=_BF16, features={"sinks"}, windows=(20,), heads=(8, 1))
    yield case("mask_tree", (8, 5, 1), (40, 5, 12), dtype=_BF16, features={"mask"}, mask="new", causal=False)
    for dtype, suffix in _HOSTILE_DTYPES:
        yield from _combined_features({"dtype": dtype}, suffix)


def _combined_features(base: dict[str, Any], suffix: str) -> Iterator[Case]:
    everything = {"soft_cap", "sinks", "alibi", "mask", "lse"}
    for name, lens, options in (
        ("window_decode", _DECODE, {"windows": (20,)}),
        ("window_of_two", _DECODE, {"windows": (None, 20), "window": 20}),
        ("no_window_of_two", _DECODE, {"windows": (None, 20), "window": None}),
        ("window_not_causal", ((7, 16), (30, 20)), {"windows": (6,), "causal": False}),
        ("alibi", _MIXED, {"features": {"alibi", "lse"}, "heads": (6, 2)}),
        ("mask_kv", _MIXED, {"features": {"mask", "lse"}, "mask": "kv"}),
        ("mask_kv_not_causal", ((5, 8), (21, 8)), {"features": {"mask", "lse"}, "mask": "kv", "causal": False}),
        ("mask_tree_causal", ((9,), (50,)), {"features": {"mask"}, "mask": "new"}),
        ("every_feature", _MIXED, {"features": everything, "mask": "kv", "windows": (None, 7), "window": 7}),
    ):
        yield case(name + suffix, lens[0], lens[1], **base, **options)


def _formats() -> Iterator[Case]:
    e4m3: dict[str, Any] = {"dtype": _BF16, "kv_format": "fp8_e4m3"}
    yield case("fp8_e4m3", *_MIXED, **e4m3)
    yield case("fp8_e4m3_decode_heads", *_DECODE, **e4m3, scale="heads", features={"lse"})
    yield case("fp8_e4m3_bytes", *_MIXED, **e4m3, scale="tensor", as_bytes=True)
    yield case("fp8_e4m3_float_scale", *_MIXED, **e4m3, scale="float", kv_layout="HND", page_size=64)
    yield case("fp8_e4m3_group8", *_DECODE, **e4m3, scale="heads", heads=(8, 1), head_dim=128, storage="interleaved")
    yield case("fp8_e5m2", *_MIXED, dtype=_FP16, kv_format="fp8_e5m2", scale="float")
    yield case("fp8_e5m2_heads_bytes", *_DECODE, dtype=_BF16, kv_format="fp8_e5m2", scale="heads", as_bytes=True)
    yield case("fp8_ragged", (6, 1), (20, 33), **e4m3, scale="tensor", table="ragged")
    for head_dim in (64, 96, 128, 192, 256):
        for kv_format in ("fp8_e4m3", "fp8_e5m2"):
            stored: dict[str, Any] = {"kv_format": kv_format, "scale": "heads", "head_dim": head_dim, "heads": (8, 2)}
            yield case(f"{kv_format}_head_dim_{head_dim}", (1, 2), (150, 40), dtype=_BF16, **stored)
    yield case("fp8_q", *_DECODE, **e4m3, q_format="fp8_e4m3", q_scale="tensor", scale="tensor", features={"lse"})
    yield case("fp8_q_heads", *_MIXED, **e4m3, q_format="fp8_e4m3", q_scale="heads", scale="heads", strided=True)
    yield case(
        "fp8_q_float", (1, 3), (90, 66), **e4m3, q_format="fp8_e4m3", q_scale="float", head_dim=128, heads=(8, 1)
    )
    yield case("fp8_q_unscaled", *_DECODE, dtype=_FP16, kv_format="fp8_e5m2", q_format="fp8_e4m3", head_dim=96)
    yield case("fp8_q_e5m2", (1, 2), (40, 33), **e4m3, q_format="fp8_e5m2", q_scale="float", scale="float")
    for dtype in (_FP16, _BF16):
        name = str(dtype).removeprefix("torch.")
        yield case(f"fp8_q_{name}_kv", (1, 2), (40, 33), dtype=dtype, q_format="fp8_e4m3", q_scale="heads")


def _rotations() -> Iterator[Case]:
    for dtype in (torch.float32, _FP16, _BF16):
        name = str(dtype).removeprefix("torch.")
        yield case(f"rope_q_{name}", *_MIXED, dtype=dtype, rope=FusedRope(64), features={"lse"})
        yield case(f"rope_qk_{name}", *_MIXED, dtype=dtype, rope=FusedRope(64, keys=True), features={"lse"})
    turned: dict[str, Any] = {"dtype": _BF16, "rope": FusedRope(64, "interleaved", keys=True)}
    yield case("rope_q_interleaved", *_DECODE, dtype=_BF16, rope=FusedRope(32, "interleaved"), heads=(8, 1))
    yield case("rope_qk_interleaved", *_MIXED, **turned)
    yield case("rope_qk_interleaved_d128", (1, 3), (200, 90), **turned, head_dim=128, heads=(16, 1))
    for head_dim in (64, 96, 128, 192, 256):
        stored: dict[str, Any] = {"dtype": _BF16, "head_dim": head_dim, "heads": (8, 2)}
        yield case(f"rope_q_d{head_dim}", (1, 2), (150, 40), **stored, rope=FusedRope(head_dim))
        yield case(f"rope_qk_d{head_dim}", (1, 2), (150, 40), **stored, rope=FusedRope(head_dim, keys=True))
    half = FusedRope(64, keys=True)
    yield case("rope_qk_partial", (1, 4), (70, 99), dtype=_BF16, head_dim=128, rope=half, page_size=1, table_row=True)
    yield case("rope_qk_ragged", (1, 4), (70, 99), dtype=_BF16, rope=half, table="ragged")
    yield case("rope_qk_window", (1, 4), (170, 99), dtype=_BF16, rope=half, windows=(50,), features={"sinks"})
    yield case("rope_qk_yarn", *_DECODE, dtype=_BF16, rope=half, scaling=YarnScaling(4.0, 64))
    yield case("rope_qk_llama3", *_DECODE, dtype=_BF16, rope=half, scaling=Llama3Scaling())
    yield case("rope_qk_many_rows", (16, 2), (150, 70), dtype=_BF16, rope=half, heads=(32, 2))
    yield case("rope_qk_not_causal", (9, 2), (3, 20), _HOSTILE, dtype=_BF16, rope=half, causal=False)
    yield case("rope_qk_padding", (1, 1, 0, 2), (0, 9, 0, 0), _HOSTILE, dtype=_BF16, rope=half, features={"lse"})
    yield case("rope_qk_odd_dims", *_DECODE, dtype=_BF16, head_dim=80, rope=FusedRope(40, keys=True))
    for kv_format in ("fp8_e4m3", "fp8_e5m2"):
        stored = {"dtype": _BF16, "kv_format": kv_format, "scale": "heads", "head_dim": 128, "heads": (8, 2)}
        full = FusedRope(128, keys=True)
        yield case(f"rope_qk_{kv_format}", (1, 2), (150, 40), **stored, rope=full)
        yield case(
            f"rope_qk_{kv_format}_q", (1, 2), (150, 40), **stored, rope=full, q_format="fp8_e4m3", q_scale="heads"
        )


def _prefixes() -> Iterator[Case]:
    for name, forest, q_lens, kv_lens, options in forests():
        yield case(f"prefix_{name}", q_lens, kv_lens, **{"dtype": _BF16, "forest": forest, **options})


def _large() -> Iterator[Case]:
    # Page ids from 2^17 on: element offsets beyond 2^31, byte offsets beyond 2^32.
    wide: dict[str, Any] = {"dtype": _BF16, "head_dim": 128, "heads": (8, 8), "first_page": 1 << 17}
    yield case("far_pages", (1, 9, 1), (100, 40, 5), _LARGE, **wide)
    yield case("far_pages_interleaved", (1, 9, 1), (100, 40, 5), _LARGE, **wide, storage="interleaved")
    yield case("far_pages_fp8", (1, 9), (100, 40), _LARGE, **{**wide, "kv_format": "fp8_e4m3", "kv_layout": "HND"})
    single: dict[str, Any] = {**wide, "first_page": 1 << 21, "page_size": 1}
    yield case("far_slots", (1, 9), (100, 40), _LARGE, **single, table_row=True)
    yield case("far_slots_indptr", (1, 9), (100, 40), _LARGE, **single, table="indptr", storage="interleaved")
    yield case("far_pages_table_row", (1, 9), (100, 40), _LARGE, **wide, table_row=True, kv_layout="HND")
    far_e5m2 = {**wide, "kv_format": "fp8_e5m2", "scale": "heads", "page_size": 64, "first_page": 1 << 15}
    yield case("far_pages_e5m2", (1, 9), (100, 40), _LARGE, **far_e5m2, table="indptr")
    turned: dict[str, Any] = {"dtype": _BF16, "head_dim": 128, "heads": (8, 2), "rope": FusedRope(128, keys=True)}
    yield case("rope_long_decode", (1, 1, 1), (40000, 1, 9000), _LARGE, **turned)
    yield case("long_decode", (1, 1, 1), (40000, 1, 9000), _LARGE, dtype=_BF16, head_dim=128, heads=(8, 2))
    slots: dict[str, Any] = {"dtype": _BF16, "head_dim": 128, "heads": (16, 4), "page_size": 1}
    yield case("many_slots_long", (1,) * 64, (40000, 1, 9000, *range(61)), _LARGE, **slots)
    yield case("long_prefill", (3000, 1), (3000, 5000), _LARGE, dtype=_BF16, head_dim=128, heads=(4, 1))
