"""The real SGLang end to end on a CPU with fi's attention backend and sampler; run by ``nox -s sglang``.

usage: python run_engine.py MODEL_FOLDER      (a tiny model of benchmarks/engines/models.py)
The same as the run of vLLM: chunked prefill, mixed lengths, decode, a second call whose prefix is in the radix cache; greedy
tokens must equal those of transformers' ``generate``. SGLang's CPU engine writes its request-to-token map with Triton under
any name but "torch_native", and forces the sampler "pytorch", so the plugin of the folder ``cpu_names`` registers fi under those.
"""

import json
import os
import sys

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPT_LENGTHS = (5, 40, 100, 17)
NUM_NEW = 12


def make_engine(folder):
    import sglang

    return sglang.Engine(
        model_path=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="fi",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=4096,
        max_running_requests=8,
        chunked_prefill_size=64,
        context_length=256,
        random_seed=0,
        mem_fraction_static=0.3,
        grammar_backend="none",
        log_level="warning",
        host="127.0.0.1",
    )


def expected(folder, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokens = []
    for prompt in prompts:
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(found[0, len(prompt) :].tolist())
    return tokens


def main(folder):
    with open(f"{folder}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, vocab_size, (num,), generator=generator).tolist() for num in PROMPT_LENGTHS]
    engine = make_engine(folder)

    def generate(**params):
        params = dict(ignore_eos=True, max_new_tokens=NUM_NEW, **params)
        return [output["output_ids"] for output in engine.generate(input_ids=prompts, sampling_params=params)]

    want = expected(folder, prompts)
    found = {"first": generate(temperature=0), "again": generate(temperature=0)}
    top_one = generate(temperature=1.0, top_k=1)
    drawn = generate(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02)
    report = {name: [one == other for one, other in zip(tokens, want, strict=True)] for name, tokens in found.items()}
    report["top_one"] = top_one == want
    report["drawn"] = all(len(tokens) == NUM_NEW and max(tokens) < vocab_size for tokens in drawn)
    print("report", json.dumps(report), flush=True)
    engine.shutdown()
    return 0 if all(all(report[name]) for name in found) and report["top_one"] and report["drawn"] else 1


if __name__ == "__main__":  # the engine starts processes that import this file
    sys.exit(main(sys.argv[1]))
