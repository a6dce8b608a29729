"""How far log-probabilities are apart when attention alone is exchanged, over many models: fi, FlashAttention-3, Triton.

usage: python spread.py OUT.jsonl [--kinds llama,qwen3,gemma2,gpt_oss] [--seeds N] [--decode N]
One comparison of two engines is one draw of weights and prompts, and its means move by a percent or two with the draw. Here
models of the shapes of ``models.py`` (size small) run in plain torch, everything but attention the same bits, and weights,
prompts and tokens are drawn anew for every seed: 64 prompts x 64 tokens as in ``accuracy.py``, "prompt" computed by one prefill,
"decode" by decode steps (of the first --decode seeds). A line has the mean absolute differences of the pairs for one seed; the
last lines have each kind's means over the seeds, and fi's distance to either over that of the two to each other with its standard
error. Needs vLLM's kernels and a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, stdev

import torch
from rounding import DEVICE, PAGE, Kind, Runner, Step, by_fi, by_flash, by_triton
from torch import Tensor
from torch.nn import functional

HIDDEN, INNER, LAYERS, VOCAB, DEVIATION = 1024, 2816, 4, 32000, 0.06
NUM_PROMPTS, NUM_NEW = 64, 64
RUNNERS: dict[str, Runner] = {"fi": by_fi, "FLASH_ATTN": by_flash, "TRITON_ATTN": by_triton}
WINDOW = 128
KINDS = {
    "llama": Kind("llama", 128),
    "qwen3": Kind("qwen3", 128),
    "gemma2": Kind("gemma2", 256, soft_cap=50.0),
    "gpt_oss": Kind("gpt_oss", 64, sinks=True),
}


@dataclass
class Layer:
    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    kind: Kind


@dataclass
class Model:
    """Weights of one seed; norms have the weight 1."""

    name: str
    embedding: Tensor
    layers: list[Layer]
    head: Tensor

    @property
    def is_gemma(self) -> bool:
        return self.name == "gemma2"


def model_of(name: str, seed: int) -> Model:
    kind, generator = KINDS[name], torch.Generator(DEVICE).manual_seed(1000 + seed)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE, generator=generator) * DEVIATION).bfloat16()

    width, widths = kind.num_heads * kind.head_dim, (kind.num_heads + 2 * kind.num_kv_heads) * kind.head_dim
    windowed = replace(kind, window=WINDOW) if name in ("gemma2", "gpt_oss") else kind
    layers = [
        Layer(
            weight(widths, HIDDEN),
            weight(HIDDEN, width),
            weight(2 * INNER, HIDDEN),
            weight(HIDDEN, INNER),
            windowed if number % 2 == 0 else kind,
        )
        for number in range(LAYERS)
    ]
    embedding = weight(VOCAB, HIDDEN)
    return Model(name, embedding, layers, embedding if name == "gemma2" else weight(VOCAB, HIDDEN))


def normed(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """By half, base 10000; x [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=DEVICE, dtype=torch.float32) / half)
    angles = positions.float()[:, None, None] * frequencies
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1).to(x.dtype)


@dataclass
class Requests:
    """All prompts with the tokens after them, and a cache whose pages lie in random order."""

    prompt_lens: Tensor
    tokens: Tensor  # [requests, longest]
    table: Tensor
    caches: list[tuple[Tensor, Tensor]]

    @classmethod
    def drawn(cls, model: Model, seed: int) -> Requests:
        generator = torch.Generator(DEVICE).manual_seed(2000 + seed)
        lens = torch.randint(8, 200, (NUM_PROMPTS,), device=DEVICE, generator=generator)
        pages = -(-(200 + NUM_NEW) // PAGE)
        tokens = torch.randint(0, VOCAB, (NUM_PROMPTS, pages * PAGE), device=DEVICE, generator=generator)
        order = torch.randperm(NUM_PROMPTS * pages, device=DEVICE, generator=generator)

        def cache(kind: Kind) -> Tensor:
            shape = (order.numel(), PAGE, kind.num_kv_heads, kind.head_dim)
            return torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)

        caches = [(cache(layer.kind), cache(layer.kind)) for layer in model.layers]
        return cls(lens, tokens, order.to(torch.int32).view(NUM_PROMPTS, pages), caches)


@dataclass
class Forward:
    """Passes of a model whose layers attend by ``run``, over the last ``q_lens`` of ``kv_lens`` tokens of each request."""

    model: Model
    requests: Requests
    run: Runner
    q_lens: Tensor
    kv_lens: Tensor

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """After the last norm, of every token of the step."""
        model = self.model
        x = functional.embedding(tokens, model.embedding)
        if model.is_gemma:
            x = x * HIDDEN**0.5
        for layer, cache in zip(model.layers, self.requests.caches, strict=True):
            out = self.attended(layer, normed(x), cache)
            x = x + (normed(out) if model.is_gemma else out)
            gate, up = functional.linear(normed(x), layer.up).chunk(2, dim=-1)
            active = functional.gelu(gate, approximate="tanh") if model.is_gemma else functional.silu(gate)
            out = functional.linear(active * up, layer.down)
            x = x + (normed(out) if model.is_gemma else out)
        return normed(x)

    def attended(self, layer: Layer, x: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """A layer's attention with its projections."""
        kind, table = layer.kind, self.requests.table
        rows = torch.repeat_interleave(torch.arange(len(table), device=DEVICE), self.q_lens)
        starts = torch.repeat_interleave(self.kv_lens - self.q_lens.cumsum(0), self.q_lens)
        positions = torch.arange(len(rows), device=DEVICE) + starts
        heads = functional.linear(x, layer.qkv).view(len(rows), -1, kind.head_dim)
        q, k, v = heads.split([kind.num_heads, kind.num_kv_heads, kind.num_kv_heads], dim=1)
        if self.model.name == "qwen3":
            q, k = normed(q), normed(k)
        slots = table[rows, positions // PAGE].long() * PAGE + positions % PAGE
        for pages, new in zip(cache, (rotated(k, positions), v), strict=True):
            pages.view(-1, kind.num_kv_heads, kind.head_dim)[slots] = new
        step = Step(self.q_lens.tolist(), self.kv_lens.tolist(), rotated(q, positions), *cache, table)
        return functional.linear(self.run(kind, step).flatten(1), layer.out)


def logprobs(model: Model, hidden: Tensor, tokens: Tensor) -> Tensor:
    logits = functional.linear(hidden, model.head).float()
    if model.is_gemma:
        logits = 30.0 * torch.tanh(logits / 30.0)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def by_prefill(model: Model, requests: Requests, run: Runner) -> Tensor:
    """[prompts, tokens]: the log-probabilities of the tokens after the prompts."""
    lens = requests.prompt_lens + NUM_NEW
    seen = torch.arange(requests.tokens.shape[1], device=DEVICE) < lens[:, None]
    hidden = Forward(model, requests, run, lens, lens).hidden_states(requests.tokens[seen])
    last = lens.cumsum(0)[:, None] - NUM_NEW - 1 + torch.arange(NUM_NEW, device=DEVICE)
    wanted = requests.tokens[seen][(last + 1).flatten()]
    return logprobs(model, hidden[last.flatten()], wanted).view(NUM_PROMPTS, NUM_NEW)


def by_decode(model: Model, requests: Requests, run: Runner) -> Tensor:
    """The same, but for the first, by decode steps over a cache that the same implementation's prefill has filled."""
    by_prefill(model, requests, run)  # what is behind a step's tokens is not read
    ones, rows, found = torch.ones_like(requests.prompt_lens), torch.arange(NUM_PROMPTS, device=DEVICE), []
    for number in range(NUM_NEW - 1):
        at = requests.prompt_lens + number
        hidden = Forward(model, requests, run, ones, at + 1).hidden_states(requests.tokens[rows, at])
        found.append(logprobs(model, hidden, requests.tokens[rows, at + 1]))
    return torch.stack(found, dim=1)


def distances(name: str, seed: int, part: str) -> dict[str, object]:
    """A row: mean absolute differences of each pair, named as "fi, FLASH_ATTN"."""
    model = model_of(name, seed)
    compute = by_prefill if part == "prompt" else by_decode
    found = {impl: compute(model, Requests.drawn(model, seed), run).double() for impl, run in RUNNERS.items()}
    row: dict[str, object] = {"op": "engine_spread", "case": f"{name} {part}", "seed": seed}
    for one, two in combinations(found, 2):
        row[f"{one}, {two}"] = (found[one] - found[two]).abs().mean().item()
    return row


def summaries(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Of each case, over its seeds."""
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        seeds = [row for row in rows if row["case"] == case]
        summary: dict[str, object] = {"op": "engine_spread", "case": case, "seeds": len(seeds)}
        pairs = [", ".join(pair) for pair in combinations(RUNNERS, 2)]
        summary |= {pair: fmean(float(str(row[pair])) for row in seeds) for pair in pairs}
        for other in pairs[:2]:
            ratios = [float(str(row[other])) / float(str(row[pairs[2]])) for row in seeds]
            summary[f"{other} over theirs"] = fmean(ratios)
            if len(ratios) > 1:
                summary[f"{other} over theirs, standard error"] = stdev(ratios) / len(ratios) ** 0.5
        yield summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--decode", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with open(options.out, "a") as file:
        for seed in range(options.seeds):
            for name in options.kinds.split(","):
                for part in ("prompt", "decode") if seed < options.decode else ("prompt",):
                    rows.append(distances(name, seed, part))
                    print(json.dumps(rows[-1]), file=file, flush=True)
        for summary in summaries(rows):
            print(json.dumps(summary), file=file, flush=True)
            print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
