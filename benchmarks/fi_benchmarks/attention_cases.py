"""Attention at served shapes: decode, prefill from ragged and paged caches, append to long caches, mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from fi_core.rope import FusedRope

from .attention_inputs import Shape, attention_problem
from .problem import Case

LLAMA, LLAMA_TP8 = Shape(), Shape(num_qo_heads=8, num_kv_heads=1)
GPT_OSS = Shape(num_qo_heads=64, head_dim=64)
GEMMA = Shape(num_qo_heads=16, head_dim=256)
UNDER_OTHER_PLANS = ("B1 1k", "B64 2k", "B256 1k")
PREFILL_LENGTHS = ((512, 32), (1024, 16), (4096, 4), (16384, 1))
APPENDS = ((16, 128, 4096), (4, 128, 32768), (1, 512, 32768), (1, 2048, 32768))


def zipf(count: int, longest: int, seed: int = 1, shortest: int = 64) -> list[int]:
    """Lengths in proportion to 1 / rank, in random order."""
    weights = 1 / torch.arange(1, count + 1).float()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [max(shortest, int(longest * weight)) for weight in weights[order].tolist()]


def equal_work(lengths: list[int]) -> list[int]:
    """As many prompts of one length, whose scores are as many in all: what variable lengths are measured by."""
    return [round((sum(length**2 for length in lengths) / len(lengths)) ** 0.5)] * len(lengths)


@cache
def decode_lengths() -> dict[str, list[int]]:
    """The batches of the peers' file, drawn in its order."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randint(512, 16384, (16,), generator=generator).tolist()
    return {
        "B1 1k": [1024],
        "B1 32k": [32768],
        "B8 8k": [8192] * 8,
        "B64 2k": [2048] * 64,
        "B128 1k": [1024] * 128,
        "B256 1k": [1024] * 256,
        "B16 uniform 512-16k": wide,
        "B64 zipf 64k": zipf(64, 65536),
        "B128 uniform 128-2k": torch.randint(128, 2048, (128,), generator=generator).tolist(),
    }


def _heads(shape: Shape) -> str:
    page = "" if shape.page_size is None else f" page{shape.page_size}"
    return f"h{shape.num_qo_heads}/{shape.num_kv_heads} d{shape.head_dim}{page}"


def _decode(batch: str, shape: Shape, suffix: str = "", variants: bool = False) -> Case:
    lengths = decode_lengths()[batch]
    build = partial(attention_problem, shape=shape, q_lens=[1] * len(lengths), kv_lens=lengths, variants=variants)
    return Case("attention", "decode", f"decode {batch} {_heads(shape)}{suffix}", build)


def decode_cases() -> Iterator[Case]:
    """Every batch with 8 KV heads and with one, then formats, dims, pages and features on a few of them."""
    for batch in decode_lengths():
        for shape in (LLAMA, LLAMA_TP8):
            yield _decode(batch, shape, variants=batch in UNDER_OTHER_PLANS)
    for batch in ("B1 32k", "B8 8k", "B64 2k", "B256 1k", "B64 zipf 64k"):
        yield _decode(batch, replace(LLAMA, kv_format="fp8_e4m3"), " fp8")
    for batch in ("B256 1k", "B64 zipf 64k"):
        yield _decode(batch, replace(LLAMA, page_size=1))
    for batch in ("B8 8k", "B64 2k"):
        for head_dim in (64, 256):
            yield _decode(batch, replace(LLAMA, head_dim=head_dim))
        for page_size in (1, 64):
            yield _decode(batch, replace(LLAMA, page_size=page_size))
        yield _decode(batch, GPT_OSS)
        yield _decode(batch, replace(GPT_OSS, sinks=True), " sinks")
        yield _decode(batch, replace(GPT_OSS, sinks=True, window=128), " sinks window128")
        yield _decode(batch, GEMMA)
        yield _decode(batch, replace(GEMMA, soft_cap=50.0), " softcap")
        yield _decode(batch, replace(GEMMA, soft_cap=50.0, window=1024), " softcap window1024")


def rotated_cases() -> Iterator[Case]:
    """Queries in FP8, and RoPE within attention, of queries and of keys that the cache holds unrotated."""
    fp8 = replace(LLAMA, kv_format="fp8_e4m3")
    both = FusedRope(128, keys=True)
    for batch in ("B1 32k", "B8 8k", "B64 2k"):
        yield _decode(batch, replace(fp8, q_format="fp8_e4m3"), " fp8 q-fp8")
        yield _decode(batch, replace(LLAMA, rope=FusedRope(128)), " rope-q")
        yield _decode(batch, replace(LLAMA, rope=both), " rope-qk")
        yield _decode(batch, replace(fp8, rope=both), " fp8 rope-qk")
    yield _decode("B64 2k", replace(LLAMA, rope=FusedRope(128, "interleaved", keys=True)), " rope-qk interleaved")
    yield _decode("B64 2k", replace(LLAMA, head_dim=64, rope=FusedRope(64, keys=True)), " rope-qk")


def verify_cases() -> Iterator[Case]:
    """Several new tokens a request, or very many query heads for a KV head: many query rows share K and V."""
    for num_qo_heads, num_kv_heads, q_len in (
        (32, 8, 4),
        (32, 8, 8),
        (32, 8, 16),
        (64, 8, 16),
        (128, 1, 1),
        (128, 1, 16),
    ):
        shape = Shape(num_qo_heads, num_kv_heads)
        for count, kv_len in ((8, 8192), (64, 2048)):
            name = f"verify B{count} q{q_len} kv{kv_len} {_heads(shape)}"
            build = partial(attention_problem, shape=shape, q_lens=[q_len] * count, kv_lens=[kv_len] * count)
            yield Case("attention", "decode", name, build)


def _prefill(name: str, shape: Shape, lengths: list[int], group: str = "prefill") -> Case:
    beside_ragged = shape.page_size is not None
    build = partial(attention_problem, shape=shape, q_lens=lengths, kv_lens=lengths, beside_ragged=beside_ragged)
    return Case("attention", group, name, build)


def prefill_cases() -> Iterator[Case]:
    """Whole prompts from ragged K and V (the peers' file's names) and from pages of 16 and 1, these also where they follow each
    other in memory, then of variable lengths and of equal ones with the same work."""
    ragged = replace(LLAMA, page_size=None)
    for length, count in PREFILL_LENGTHS:
        slots = replace(LLAMA, page_size=1)
        for shape in (ragged, replace(LLAMA, page_size=16), slots, replace(slots, in_order=True)):
            suffix = "" if shape.page_size is None else f" page{shape.page_size}"
            suffix += " in order" if shape.in_order else ""
            name = f"prefill B{count} S{length} h32/8 d128 causal=1{suffix}"
            yield _prefill(name, shape, [length] * count)
    for length, count in PREFILL_LENGTHS:
        yield _prefill(
            f"prefill B{count} S{length} h32/8 d128 causal=0", replace(ragged, causal=False), [length] * count
        )
    for head_dim in (64, 256):
        yield _prefill(f"prefill B1 S16384 h32/8 d{head_dim} causal=1", replace(ragged, head_dim=head_dim), [16384])
    for count in (16, 64):
        generator = torch.Generator().manual_seed(7)
        uniform = torch.randint(512, 1537, (count,), generator=generator).tolist()
        harmonic = sum(1 / rank for rank in range(1, count + 1))
        skewed = zipf(count, int(1024 * count / harmonic), shortest=16)
        for name, lengths in (("uniform", uniform), ("zipf", skewed)):
            yield _prefill(f"prefill B{count} {name} mean1024 h32/8 d128 causal=1", ragged, lengths)
            yield _prefill(f"prefill B{count} work of {name} h32/8 d128 causal=1", ragged, equal_work(lengths))


def prefill_fp8_cases() -> Iterator[Case]:
    """Whole prompts in FP8, of Q, K and V or of K and V alone; plain attention beside."""
    ragged = replace(LLAMA, page_size=None)
    stored = replace(ragged, kv_format="fp8_e4m3")
    fp8 = replace(stored, q_format="fp8_e4m3")
    shapes = [("B1 S16384 h32/8 d128 causal=0 fp8", replace(fp8, causal=False), [16384])]
    for length, count in PREFILL_LENGTHS:
        heads = f"B{count} S{length} h32/8 d128 causal=1"
        shapes.append((f"{heads} fp8", fp8, [length] * count))
        shapes.append((f"{heads} page16 fp8", replace(fp8, page_size=16), [length] * count))
    for head_dim in (64, 256):
        shapes.append((f"B1 S16384 h32/8 d{head_dim} causal=1 fp8", replace(fp8, head_dim=head_dim), [16384]))
    for suffix, shape in (
        ("page1 fp8", replace(fp8, page_size=1)),
        ("fp8-kv", stored),
        ("page16 fp8-kv", replace(stored, page_size=16)),
        ("plain", ragged),
    ):
        shapes.append((f"B4 S4096 h32/8 d128 causal=1 {suffix}", shape, [4096] * 4))
    for name, shape, lengths in shapes:
        yield _prefill(f"prefill {name}", shape, lengths, "prefill_fp8")


def prefill_feature_cases() -> Iterator[Case]:
    """Features beside plain attention of the same shapes: what visits fewer keys should take as much less."""
    ragged = replace(LLAMA, page_size=None)
    for head_dim in (64, 128, 256):
        for suffix, changes in (
            ("no feature", {}),
            ("sinks", {"sinks": True}),
            ("alibi", {"alibi": True}),
            ("rope-q", {"rope": FusedRope(head_dim)}),
            ("softcap", {"soft_cap": 50.0}),
            *((f"window{window}", {"window": window}) for window in (128, 512, 1024)),
        ):
            name = f"prefill B4 S4096 h32/8 d{head_dim} causal=1 {suffix}"
            yield _prefill(name, replace(ragged, head_dim=head_dim, **changes), [4096] * 4, "prefill_features")
    # A window beside plain attention of the keys that its tiles (48 tokens of four heads) see, and of as many blocks of 128 keys,
    # all of them visible.
    for window in (128, 512, 1024):
        paged = replace(LLAMA, window=window)
        name = f"prefill B4 S4096 {_heads(paged)} causal=1"
        for suffix, tile, block in (
            (f"window{window}", None, 0),
            (f"keys of window{window}", 48, 0),
            (f"blocks of window{window}", 48, 128),
        ):
            build = partial(
                attention_problem, shape=paged, q_lens=[4096] * 4, kv_lens=[4096] * 4, tile=tile, block=block
            )
            yield Case("attention", "prefill_features", f"{name} {suffix}", build)
    for window in (1024, 4096):
        name = f"prefill B1 S16384 h32/8 d128 causal=1 window{window}"
        yield _prefill(name, replace(ragged, window=window), [16384], "prefill_features")


def append_cases() -> Iterator[Case]:
    """New tokens of requests that have long caches, and batches of prefills beside decodes."""
    for count, q_len, kv_len in APPENDS:
        name = f"append B{count} q{q_len} kv{kv_len} {_heads(LLAMA)}"
        build = partial(attention_problem, shape=LLAMA, q_lens=[q_len] * count, kv_lens=[kv_len] * count)
        yield Case("attention", "append", name, build)
    mixed = (
        ("mixed mixed 1x4096 prefill+ 127x decode 2k", [4096] + [1] * 127, [4096] + [2048] * 127),
        ("mixed chunked 512+255 decode 4k", [512] + [1] * 255, [8192] + [4096] * 255),
    )
    for name, q_lens, kv_lens in mixed:
        yield Case("attention", "mixed", name, partial(attention_problem, shape=LLAMA, q_lens=q_lens, kv_lens=kv_lens))
