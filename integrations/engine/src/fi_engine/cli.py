"""The ``fi-engine`` command: chat with a model, complete prompts, run the demo, or measure speed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from fi_core.errors import FiError
from fi_sampling import SamplingParams

from .bench import run_bench
from .checkpoint import open_checkpoint
from .decode_bench import Workload, run_decode_bench
from .demo import run_demo
from .engine import Engine
from .model import Model, load_model
from .placement import device_of
from .prompt_bench import Prompt, run_prompt_bench
from .random_model import SHAPES, random_model
from .tokenizer import Message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fi-engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chat = commands.add_parser("chat", help="talk to a model; an empty line ends it")
    generate = commands.add_parser("generate", help="complete prompts, all at once")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    demo = commands.add_parser("demo", help="serve eight prompts at once and show which kernel ran each operation")
    bench = commands.add_parser(
        "bench", help="measure tokens per second alone and batched, and decode steps per second"
    )
    bench.add_argument("--num-tokens", type=int, default=64, help="tokens of each request, more than 16")
    decode = commands.add_parser("bench-decode", help="measure decode steps of many requests of mixed lengths")
    prompt = commands.add_parser("bench-prompt", help="measure the time to the first token of a long prompt")
    prompt.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    prompt.add_argument("--chunks", type=int, nargs="*", default=[2048], help="tokens a step, beside all in one")
    for command in (decode, prompt):
        which = command.add_mutually_exclusive_group(required=True)
        which.add_argument("--model", type=Path, help="a .gguf file or a safetensors folder")
        which.add_argument("--random", choices=sorted(SHAPES), help="a model of this shape with random weights")
        command.add_argument("--backends", default="default", help="comma-separated; default: what is preferred")
    decode.add_argument("--batch", type=int, default=64, help="requests at once")
    decode.add_argument("--lengths", type=int, nargs=2, default=(128, 2048), metavar=("SHORTEST", "LONGEST"))
    decode.add_argument("--num-steps", type=int, default=64)
    for command in (chat, generate, demo, bench):
        command.add_argument("--model", type=Path, required=True, help="a .gguf file or a safetensors folder")
    for command in (chat, generate, demo, bench, decode, prompt):
        command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    for command in (chat, generate):
        command.add_argument("--max-tokens", type=int, default=256)
        command.add_argument("--temperature", type=float, default=0.0)
        command.add_argument("--top-p", type=float, default=1.0)
        command.add_argument("--seed", type=int, help="default: another one for each request")
    return parser


def _params(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens, seed=options.seed
    )


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{line}")
        sys.stderr.flush()


def _engine(options: argparse.Namespace) -> Engine:
    engine = Engine.from_path(options.model, device=options.device, progress=_progress)
    _progress("")
    return engine


def _chat(options: argparse.Namespace) -> None:
    engine, params = _engine(options), _params(options)
    messages: list[Message] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        handle = engine.submit(messages, params)
        for chunk in engine.stream([handle]):
            print(chunk.text, end="", flush=True)
        print()
        if handle.error is not None:
            raise handle.error
        messages.append({"role": "assistant", "content": handle.text})


def _generate(options: argparse.Namespace) -> int:
    outputs = _engine(options).generate(options.prompts, _params(options))
    for prompt, output in zip(options.prompts, outputs, strict=True):
        print(f"{prompt}{output.text}" if output.error is None else f"{prompt}\nerror: {output.error}")
    return int(any(output.error is not None for output in outputs))


def _measured_model(options: argparse.Namespace) -> Model:
    """A model of a file or of random weights, in bfloat16 on a GPU and float32 on a CPU."""
    device = device_of(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if options.random is not None:
        config = SHAPES[options.random]
        model = random_model(config, device, dtype, config.max_position, _progress)
    else:
        checkpoint = open_checkpoint(options.model, _progress)
        model = load_model(checkpoint, device, dtype, checkpoint.config.max_position, _progress)
    _progress("")
    return model


def _bench_decode(options: argparse.Namespace) -> None:
    workload = Workload(options.batch, *options.lengths)
    backends = options.backends.split(",")
    run_decode_bench(_measured_model(options), workload, options.num_steps, backends, sys.stdout, _progress)


def _bench_prompt(options: argparse.Namespace) -> None:
    prompts = [Prompt(options.length, chunk) for chunk in (None, *options.chunks)]
    run_prompt_bench(_measured_model(options), prompts, options.backends.split(","), sys.stdout, _progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Errors of fi and an interrupt are printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "demo":
            run_demo(options.model, options.device, sys.stdout)
        elif options.command == "bench":
            run_bench(options.model, options.device, options.num_tokens, sys.stdout, _progress)
        elif options.command == "bench-decode":
            _bench_decode(options)
        elif options.command == "bench-prompt":
            _bench_prompt(options)
        elif options.command == "chat":
            _chat(options)
        else:
            return _generate(options)
    except FiError as error:
        print(f"fi-engine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fi-engine: interrupted", file=sys.stderr)
        return 130
    return 0
