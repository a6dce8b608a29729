"""The real vLLM end to end on a CPU with fi's attention backend, sampler and layers; run by ``nox -s vllm``.

usage: python run_engine.py MODEL_FOLDER [layers] [pressure]      (a tiny model of benchmarks/engines/models.py)
layers: fi's norms and rotary embedding run too, which vLLM would leave to torch on a CPU
pressure: so few pages that requests are preempted and computed again, and two are aborted
Prompts longer than a step (chunked prefill), mixed steps, decode, and a second call (its prefix is in the cache): greedy
tokens must equal those of transformers' ``generate``. Exit status 0 when they do, when seeds are honoured and no page is lost.
"""

import json
import os
import sys

import torch

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

PROMPT_LENGTHS = (5, 40, 100, 17)
NUM_NEW = 12
STEP_TOKENS = 64
FEW_PAGES = 14
"""The four prompts take 13 pages, with their answers 15; one page is vLLM's own."""


def make_engine(folder, layers, pressure):
    from vllm import LLM

    if layers:
        from fi_vllm.layers import REPLACED

        for ours in REPLACED.values():
            ours.forward_cpu = ours.forward_cuda
    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        attention_backend="CUSTOM",
        enforce_eager=True,
        max_model_len=128 if pressure else 256,
        max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        compilation_config={"mode": 0, "custom_ops": ["all" if layers else "none"]},
        num_gpu_blocks_override=FEW_PAGES if pressure else None,
        disable_log_stats=False,
    )


def generate(engine, prompts, **params):
    from vllm import SamplingParams

    params = SamplingParams(ignore_eos=True, detokenize=False, max_tokens=NUM_NEW, **params)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


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


def main(folder, *options):
    with open(f"{folder}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, vocab_size, (num,), generator=generator).tolist() for num in PROMPT_LENGTHS]
    engine = make_engine(folder, "layers" in options, "pressure" in options)
    want = expected(folder, prompts)
    found = {"first": generate(engine, prompts, temperature=0), "again": generate(engine, prompts, temperature=0)}
    report = {name: [one == other for one, other in zip(tokens, want, strict=True)] for name, tokens in found.items()}
    # On a CPU vLLM cannot take back the draw of a prompt that it computes in pieces, as it does under pressure.
    report["seeded"] = "pressure" in options or seeds_are_honoured(engine, prompts)
    report["aborted"] = survivors(engine, prompts) == {str(row): want[row] for row in (0, 2)}
    report["pages_left_in_use"] = pages_in_use(engine)
    report["preempted"] = preemptions(engine)
    report["shadow"] = shadow_counts()
    report["used"] = used()
    print("report", json.dumps(report), flush=True)
    right = [*(all(report[name]) for name in found), report["seeded"], report["aborted"], *report["used"].values()]
    right += [report["pages_left_in_use"] == 0, (report["preempted"] > 0) == ("pressure" in options)]
    return 0 if all(right) else 1


def seeds_are_honoured(engine, prompts):
    """Whether a request draws the same tokens alone and among others."""
    params = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}
    return generate(engine, prompts, **params)[1] == generate(engine, prompts[1:2], **params)[0]


def survivors(engine, prompts):
    """Tokens of the requests 0 and 2, by name, when 1 and 3 are aborted after some steps."""
    from vllm import SamplingParams

    inner, tokens = engine.llm_engine, {}
    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=NUM_NEW)
    for number, prompt in enumerate(prompts):
        inner.add_request(str(number), {"prompt_token_ids": prompt}, params)
    for _ in range(5):
        inner.step()
    inner.abort_request(["1", "3"])
    while inner.has_unfinished_requests():
        for output in inner.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    return tokens


def pages_in_use(engine):
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.usage


def preemptions(engine):
    """How often a request was preempted, by vLLM's own count."""
    return sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def shadow_counts():
    from fi_core.shadow import statistics

    counts = statistics()
    return {"calls": counts.calls, "compared": counts.compared, "mismatches": counts.mismatches}


def used():
    """Whether vLLM runs what was registered."""
    import vllm.v1.sample.sampler as sampler
    from fi_vllm.layers import REPLACED
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return {
        "attention": AttentionBackendEnum.CUSTOM.get_path().startswith("fi_vllm."),
        "sampler": sampler.TopKTopPSampler.__module__ == "fi_vllm.sampler",
        "layers": all(op_registry_oot.get(cls.__name__) is ours for cls, ours in REPLACED.items()),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
