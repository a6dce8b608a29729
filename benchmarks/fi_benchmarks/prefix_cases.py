"""Decodes whose requests share prefixes: one level from 1k to 32k tokens, trees of two and three, and verification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import fi_core as fi
import torch
from fi_core.contract import Cost
from fi_core.plan import attention_values
from fi_core.records import Batch, KVCache, LayerArgs
from fi_core.tolerances import attention_tolerance
from torch import Tensor

from .attention_inputs import AttentionInputs, Shape, checked_rows, expected_rows, int32, offsets, ours
from .ceilings import READ_PAGES, has_bulk_copies
from .kernels import stream_pages
from .numerics import Accuracy, compare
from .problem import Call, Case, Maker, Outputs, Problem, generator_on, normal

CHECKED_ROWS = 24
LLAMA, LLAMA_70B, MHA = Shape(), Shape(num_qo_heads=64), Shape(num_qo_heads=32, num_kv_heads=32)


@dataclass(frozen=True)
class Tree:
    """``levels``: (requests that share a node, tokens of it) from the outside; every number of requests divides that before
    it. Each of ``count`` requests has ``suffix`` tokens of its own, ``q_len`` of them new."""

    count: int
    levels: tuple[tuple[int, int], ...]
    suffix: int
    q_len: int = 1

    @property
    def shared(self) -> int:
        """Tokens of a request that others have too."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def kv_len(self) -> int:
        return self.shared + self.suffix

    def nodes(self) -> list[tuple[int, int, int, int]]:
        """As fi.SharedPrefixes has them."""
        found, begin = [], 0
        for members, tokens in self.levels:
            for first in range(0, self.count, members):
                found.append((first, first + members, begin, begin + tokens))
            begin += tokens
        return found


@dataclass(frozen=True)
class PrefixInputs(AttentionInputs):
    """The batch has ``levels``; ``pages`` names shared pages once for each request. ``level_pages``: page ids of each level,
    node after node, then those of the suffixes."""

    tree: Tree = Tree(1, (), 1)
    level_pages: tuple[Tensor, ...] = ()


def make_prefix_inputs(device: torch.device, shape: Shape, tree: Tree) -> PrefixInputs:
    """Random q, K and V in pages that lie in random order; prefixes end where pages do."""
    generator, size = generator_on(device), shape.page_size or 1
    counts = [tree.count // members * (tokens // size) for members, tokens in tree.levels]
    counts.append(tree.count * -(-tree.suffix // size))
    ids = torch.randperm(sum(counts), device=device, generator=generator).int()
    level_pages = ids.split(counts)
    parts = []
    for (members, tokens), pages in zip((*tree.levels, (1, tree.suffix)), level_pages, strict=True):
        parts.append(pages.view(-1, -(-tokens // size)).repeat_interleave(members, dim=0))
    table = torch.cat(parts, dim=1).contiguous()
    q_lens, kv_lens = (tree.q_len,) * tree.count, (tree.kv_len,) * tree.count
    levels = fi.SharedPrefixes(int32([value for node in tree.nodes() for value in node], device).view(-1, 4))
    batch = Batch(int32(offsets(q_lens), device), int32(kv_lens, device), table, levels=levels)
    q = normal((sum(q_lens), shape.num_qo_heads, shape.head_dim), shape.spec.q_dtype, generator)
    rows = (sum(counts), size, shape.num_kv_heads, shape.head_dim)
    k, v = (normal(rows, shape.spec.kv_dtype, generator) for _ in range(2))
    scale = 0.5 if shape.spec.kv_is_fp8 else None
    kv = KVCache(k, v, format=shape.kv_format, k_scale=scale, v_scale=scale)
    return PrefixInputs(shape, LayerArgs(), q_lens, kv_lens, q, kv, batch, table.flatten(), tree, level_pages)


def shared(inputs: PrefixInputs, updates: bool = False) -> Maker:
    """Our call with the batch's levels; with ``updates`` every call plans anew first."""

    def make() -> Call:
        tree = inputs.tree
        plan = fi.plan(
            inputs.shape.spec,
            max_batch=tree.count,
            max_q_tokens=tree.count * tree.q_len,
            max_q_len=tree.q_len,
            max_kv_len=tree.kv_len,
            max_prefixes=len(tree.nodes()),
            max_prefix_depth=len(tree.levels),
            device=inputs.q.device,
        )
        out = torch.empty_like(inputs.q, dtype=inputs.shape.spec.dtype)
        plan.update(inputs.batch)

        def call() -> Outputs:
            if updates:
                plan.update(inputs.batch)
            return {"out": fi.attention(inputs.q, inputs.kv, plan, layer=inputs.layer, out=out)}

        return call

    return make


def _cost(inputs: PrefixInputs) -> Cost:
    """Every page once, q and out; 4 D a visible pair and query head."""
    shape, tree = inputs.shape, inputs.tree
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * inputs.kv.k.element_size()
    keys = sum(tree.count // members * tokens for members, tokens in tree.levels) + tree.count * tree.suffix
    rows = 4 * inputs.q.numel()
    pairs = tree.count * sum(tree.kv_len - token for token in range(tree.q_len))
    return Cost(keys * token_bytes + rows, 4 * shape.head_dim * pairs * shape.num_qo_heads)


def _floor(inputs: PrefixInputs) -> dict[str, Maker]:
    """A read of every page once through a table."""
    if not has_bulk_copies(inputs.q.device):
        return {}
    pages, k, v = torch.cat(inputs.level_pages), inputs.kv.k, inputs.kv.v
    page_bytes = k[0].numel() * k.element_size()
    valid = torch.full_like(pages, page_bytes)

    def call() -> Outputs:
        stream_pages(k, v, page_bytes, pages, valid)
        return {}

    return {READ_PAGES: lambda: call}


def prefix_problem(device: torch.device, shape: Shape, tree: Tree) -> Problem:
    """Our call with levels ("+update": planned each time) and the same batch without ("+unshared")."""
    inputs = make_prefix_inputs(device, shape, tree)
    chosen, starts = checked_rows(inputs.q_lens, CHECKED_ROWS), offsets(inputs.q_lens)
    rows = torch.tensor([starts[request] + token for request, token in chosen], device=device)
    expected = expected_rows(inputs, chosen)

    def check(outputs: Outputs) -> Accuracy:
        return compare(outputs["out"][rows], expected, attention_tolerance(torch.bfloat16))

    plain = replace(inputs, batch=replace(inputs.batch, levels=None))
    return Problem(
        request=attention_values(shape.spec, tree.q_len, levels=True),
        inputs=inputs,
        ours={
            "": shared(inputs),
            "+update": shared(inputs, updates=True),
            "+unshared": ours(plain, tree.q_len),
        },
        check=check,
        cost=_cost(inputs),
        ceilings=_floor(inputs),
    )


def _named(shape: Shape, tree: Tree, suffix: str = "") -> Case:
    levels: Sequence[str] = [f"{tree.count // members}x{tokens}" for members, tokens in tree.levels]
    verify = f" q{tree.q_len}" if tree.q_len > 1 else ""
    heads = f"h{shape.num_qo_heads}/{shape.num_kv_heads}"
    name = f"prefix B{tree.count}{verify} {'+'.join(levels)} suffix {tree.suffix} {heads}{suffix}"
    return Case("attention", "prefix", name, partial(prefix_problem, shape=shape, tree=tree))


def prefix_cases() -> Iterator[Case]:
    for count, prefix, suffix in (
        (64, 8192, 256),
        (256, 8192, 256),
        (64, 32768, 256),
        (256, 32768, 512),
        (8, 1024, 512),
        (16, 2048, 256),
        (64, 1024, 1024),
    ):
        yield _named(LLAMA, Tree(count, ((count, prefix),), suffix))
    yield _named(MHA, Tree(256, ((256, 32768),), 128))
    yield _named(LLAMA_70B, Tree(64, ((64, 4096), (8, 4096)), 256))
    yield _named(LLAMA_70B, Tree(64, ((64, 2048), (16, 4096), (4, 1024)), 128))
    yield _named(LLAMA, Tree(64, ((64, 8192),), 256, q_len=4))
    yield _named(replace(LLAMA, kv_format="fp8_e4m3"), Tree(64, ((64, 8192),), 256), " fp8")
    yield _named(LLAMA, Tree(64, ((1, 64),), 2048), " none shared")
