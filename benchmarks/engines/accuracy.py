"""Teacher-forced log-probabilities of one engine with one attention backend, and how far those of several backends differ.

usage: python accuracy.py run ENGINE MODEL_FOLDER BACKEND OUT.json [--options JSON ...] [--name NAME] [--text FILE ...]
                              [--prefill-only] [--common N]
       python accuracy.py compare FI.json OWN.json OWN.json ... [REFERENCE.json ...] [ROWS.jsonl]
64 prompts, each with 64 tokens drawn for it: "prompt" are the tokens' log-probabilities as a prefill computes them, "decode" as
decode steps do (left out with --prefill-only, for backends whose decode steps take minutes). With --text (for real weights)
prompts and tokens are cut from files; with --common all prompts begin with the same N tokens. SGLang cannot force tokens in
decode steps: there "decode" are those of its own greedy tokens, up to the first that two backends choose differently.
``compare`` also counts equal greedy texts, and their tokens before the first difference, and tells the largest margin of a first
difference: how far the best token was above the second there, by the backend for which that is less.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from engines import engine_options, open_engine

NUM_PROMPTS, NUM_NEW = 64, 64


def prompts_of(vocab_size: int) -> list[list[int]]:
    """64 prompts of 8 to 200 tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 200, (NUM_PROMPTS,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def drawn_tokens(vocab_size: int) -> list[list[int]]:
    """64 tokens for each prompt, the same in every run."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, vocab_size, (NUM_PROMPTS, NUM_NEW), generator=generator).tolist()


def common_tokens(num: int, vocab_size: int) -> list[int]:
    """The same in every run."""
    import torch

    return torch.randint(0, vocab_size, (num,), generator=torch.Generator().manual_seed(3)).tolist()


def texts_of(folder: str, files: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """(64 prompts of 8 to 200 tokens, the 64 tokens that follow each) of what the files say, one after the other."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder).encode("\n".join(Path(file).read_text() for file in files))
    lengths = [len(prompt) for prompt in prompts_of(2)]
    if len(tokens) < sum(lengths) + NUM_PROMPTS * NUM_NEW:
        raise ValueError(f"the files have {len(tokens)} tokens, {sum(lengths) + NUM_PROMPTS * NUM_NEW} are needed")
    prompts, following, start = [], [], 0
    for length in lengths:
        prompts.append(tokens[start : start + length])
        following.append(tokens[start + length : start + length + NUM_NEW])
        start += length + NUM_NEW
    return prompts, following


def inputs_of(folder: str, vocab_size: int, text: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the tokens after them: cut from the files ``text`` if there are any, else drawn."""
    return texts_of(folder, text) if text else (prompts_of(vocab_size), drawn_tokens(vocab_size))


def run(options: argparse.Namespace) -> None:
    engine = open_engine(options.engine, options.model, options.backend, **engine_options(options.options))
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    prompts, drawn = inputs_of(options.model, vocab_size, options.text)
    prompts = [common_tokens(options.common, vocab_size) + prompt for prompt in prompts]
    result: dict[str, Any] = {"engine": options.engine, "backend": options.backend, "model": options.model}
    result["name"] = options.name or options.backend
    found = engine.prompt_logprobs([prompt + more for prompt, more in zip(prompts, drawn, strict=True)])
    result["prompt"] = [values[-NUM_NEW:] for values in found]
    result |= dict.fromkeys(("decode_tokens", "decode", "greedy", "margins"), [])
    if not options.prefill_only:
        result["decode_tokens"], result["decode"] = engine.decode_logprobs(prompts, drawn)
        result["greedy"], result["margins"] = engine.greedy(prompts, NUM_NEW)
    for part in ("prompt", "decode", "margins"):
        result[part] = [[round(value, 6) for value in values] for values in result[part]]
    Path(options.out).write_text(json.dumps(result))
    print("written", options.out, flush=True)
    engine.close()


def common_length(one: list[int], two: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def difference(one: dict[str, Any], two: dict[str, Any], part: str) -> tuple[float, float, int]:
    """(mean, largest absolute difference, numbers compared) of the positions that have the same tokens before them."""
    apart: list[float] = []
    if not (one[part] and two[part]):
        return float("nan"), float("nan"), 0
    for row, (first, second) in enumerate(zip(one[part], two[part], strict=True)):
        same = len(first) if part == "prompt" else common_length(one["decode_tokens"][row], two["decode_tokens"][row])
        apart += [abs(a - b) for a, b in zip(first[:same], second[:same], strict=False)]
    return (sum(apart) / len(apart), max(apart), len(apart)) if apart else (float("nan"), float("nan"), 0)


def margin_of_differences(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest margin at which two greedy texts part, of either's there the smaller; 0 where none do."""
    largest = 0.0
    for row, (a, b) in enumerate(zip(one["greedy"], two["greedy"], strict=False)):
        if a != b:
            at = common_length(a, b)
            largest = max(largest, min(one["margins"][row][at], two["margins"][row][at]))
    return largest


def compare(paths: list[str], rows_file: str | None = None) -> int:
    """Print each pair of engine runs, and how far each is from float32 where a result of ``reference.py`` is among them, and
    append them to ``rows_file`` as lines of JSON; 1 unless fi's means (the first run's) are within the largest of the
    engine's own."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    runs = [result for result in results if result["backend"] != "float32"]
    exact = [result for result in results if result["backend"] == "float32"]
    rows, status = [], 0
    for part in ("prompt", "decode"):
        pairs = [pair_of(one, two, part) for one, two in combinations(runs, 2)]
        known = [row for row in pairs if row["numbers"]]
        ours = [row["mean"] for row in known if row["one"] == runs[0]["name"]]
        own = [row["mean"] for row in known if row["one"] != runs[0]["name"]]
        rows += pairs + [pair_of(run, reference, part) for reference in exact for run in runs]
        if own and not ours:
            print(f"{part}: not compared, {runs[0]['name']} has no numbers")
        elif own:
            holds = max(ours) <= max(own)
            print(f"{part}: fi differs by no more than the engine's own among themselves: {holds}")
            status |= not holds
    for row in rows:
        if row["numbers"]:
            print(
                f"{row['part']}: {row['one']} against {row['two']}: mean {row['mean']:.5f}, largest {row['largest']:.5f} "
                f"of {row['numbers']}; greedy texts equal {row['equal_texts']}, tokens {row['equal_tokens']}, "
                f"margin {row.get('margin', 'unknown')}"
            )
    if rows_file:
        with open(rows_file, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["numbers"])
    return status


def pair_of(one: dict[str, Any], two: dict[str, Any], part: str) -> dict[str, Any]:
    """A row: two runs by name, and how far they are apart. Tokens of greedy texts count up to the first that differs."""
    mean, most, num = difference(one, two, part)
    same = [common_length(a, b) for a, b in zip(one["greedy"], two["greedy"], strict=False)]
    texts = sum(a == b for a, b in zip(one["greedy"], two["greedy"], strict=False))
    row = {"op": "engine_accuracy", "engine": one["engine"], "case": f"{Path(one['model']).name} {part}", "part": part}
    row |= {"one": one["name"], "two": two["name"], "mean": round(mean, 6), "largest": round(most, 6), "numbers": num}
    row |= {"texts": len(same), "equal_texts": texts, "equal_tokens": sum(same)}
    if "margins" in one and "margins" in two:
        row["margin"] = round(margin_of_differences(one, two), 6)
    return row


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        rows = [each for each in sys.argv[2:] if each.endswith(".jsonl")]
        sys.exit(compare([each for each in sys.argv[2:] if each not in rows], *rows))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run"])
    for name in ("engine", "model", "backend", "out"):
        parser.add_argument(name)
    parser.add_argument("--options", action="append", default=[])
    parser.add_argument("--text", action="append", default=[], help="a file that prompts and tokens are cut from")
    parser.add_argument("--prefill-only", action="store_true")
    parser.add_argument("--common", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--name", help="what compare calls it, instead of the backend")
    run(parser.parse_args())


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
