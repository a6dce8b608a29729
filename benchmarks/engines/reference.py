"""Log-probabilities of accuracy.py's tokens in float32, by transformers: how far an engine is from the truth.

usage: python reference.py KIND MODEL_FOLDER OUT.json [--kv e4m3|e5m2] [--q e4m3|e5m2] [--device cuda] [--text FILE ...]
KIND as in models.py; gpt_oss adds the sinks and windows of the plugin of that name. Weights are the model's, rounded as they are
saved. ``--kv`` rounds keys and values to that FP8 type, as a cache without scales does, and ``--q`` the queries too, as the
engines' own backends do with such a cache. The result compares like an engine's run (``accuracy.py compare``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accuracy import NUM_NEW, inputs_of
from torch import Tensor

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def rounded(x: Tensor, name: str | None) -> Tensor:
    """``x`` as FP8 holds it, saturated."""
    if name is None:
        return x
    most = torch.finfo(FP8[name]).max
    return x.clamp(-most, most).to(FP8[name]).to(x.dtype)


def attention_of(kind: str, options: argparse.Namespace) -> Any:
    """A function of transformers' interface for attention: one sequence, causal, in float32."""
    if kind == "gpt_oss":
        sys.path.insert(0, str(Path(__file__).with_name("gpt_oss_attention")))
        from fi_gpt_oss_attention import WINDOW, sinks_of

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **named: Any
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]."""
        window, soft_cap, sinks = named.get("sliding_window"), named.get("softcap"), None
        if kind == "gpt_oss":
            window = WINDOW if module.layer_idx % 2 == 0 else None
            sinks = sinks_of(module.layer_idx, query.shape[1]).to(query)
        query, key, value = rounded(query, options.q), rounded(key, options.kv), rounded(value, options.kv)
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        logits = query @ key.transpose(2, 3) * scaling
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        length = logits.shape[-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if window:
            seen = seen.triu(1 - window)
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :length]
        return (weights @ value).transpose(1, 2), None

    return attention


@torch.inference_mode()
def run(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("fi_reference", attention_of(options.kind, options))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="fi_reference")
    model = model.to(options.device).eval()
    prompts, drawn = inputs_of(options.model, model.config.vocab_size, options.text)
    lists = []
    for prompt, more in zip(prompts, drawn, strict=True):
        tokens = torch.tensor([prompt + more], device=options.device)
        logits = model(tokens, logits_to_keep=NUM_NEW + 1).logits[0, :-1].float()
        lists.append(logits.log_softmax(dim=-1).gather(1, tokens[0, -NUM_NEW:, None])[:, 0].tolist())
    name = "_".join(["float32", *(f"{part}_{kind}" for part, kind in (("kv", options.kv), ("q", options.q)) if kind)])
    result = {"engine": "transformers", "backend": "float32", "model": options.model, "name": name}
    return result | {"prompt": lists, "decode": lists, "decode_tokens": drawn, "greedy": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kind", "model", "out"):
        parser.add_argument(name)
    parser.add_argument("--kv", choices=sorted(FP8))
    parser.add_argument("--q", choices=sorted(FP8))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--text", action="append", default=[], help="as accuracy.py takes it")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    Path(options.out).write_text(json.dumps(run(options)))
    print("written", options.out, flush=True)


if __name__ == "__main__":
    main()
