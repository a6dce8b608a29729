"""The compile pipeline and the cost of a launch, on a GPU: ``python benchmarks/bench_pipeline.py [--out FOLDER]``.

For every shipped spec: its first call where it was never compiled (an empty cache: source, NVRTC, load, launch), and in
a new process its first call with the cache that the first process left; the events of the pipeline prove that the second
process compiled nothing (exit status 1 if it did). Such a call launches one block (or cluster) on an empty problem:
every pointer and tensor map leads to zeroed memory, every number is 0. Then the host's cost of a launch with its
arguments ready, with the driver's part and without, of whole public calls, and of importing fi_cuda; and 50 processes that
ask at once for one kernel that was never compiled (exit status 1 if it was not compiled just once). Prints a table;
``--out`` adds pipeline.json; ``--stem`` asks for the first calls of some kernels alone, ``--slowest`` for those of the
specs that took longest in an earlier run. A spec is named by what it has unlike most shipped ones of its class.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fi_benchmarks.results import commit
from fi_benchmarks.shipped import FIRST, Selection, names_of
from fi_core.bench.model_workloads import MODEL_WORKLOADS
from fi_core.bench.workload import SCALES
from fi_core.contract import target_of
from fi_core.errors import FiError
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry

NUM_CALLS = 2000
CALLS_BETWEEN_SYNCS = 50
"""Few enough that the driver's queue, about a thousand launches, never fills."""

SCRATCH_BYTES = 64 * 1024 * 1024
MAP_WIDTH = 128
NUM_IMPORTS = 5
NUM_AT_ONCE = 50

CACHED = "from the cache"
AIMS_US = {FIRST: 2e6, CACHED: 20e3, "launch, Python alone": 6.0, "import fi_cuda": 50e3}

IMPORT = """
import time, torch
import json, os

def driver_is_mapped():
    with open("/proc/self/maps") as maps:
        return "libcuda.so" in maps.read()

mapped_by_torch = driver_is_mapped()
started = time.perf_counter()
import fi_cuda
package_us = (time.perf_counter() - started) * 1e6
import fi_cuda.plugin
plugin_us = (time.perf_counter() - started) * 1e6
links = []
for name in os.listdir("/proc/self/fd"):
    try:
        links.append(os.readlink(f"/proc/self/fd/{name}"))
    except FileNotFoundError:
        pass
print(json.dumps({
    "import fi_cuda": package_us,
    "import fi_cuda.plugin": plugin_us,
    "driver opened": driver_is_mapped() and not mapped_by_torch,
    "devices opened": sorted({link for link in links if link.startswith("/dev/nvidia")}),
    "context made": torch.cuda.is_initialized(),
}))
"""

Row = dict[str, Any]


class Observer:
    """A plugin that keeps the pipeline's events."""

    def __init__(self) -> None:
        self.origins: list[str] = []

    @hookimpl(optionalhook=True)
    def fi_on_compile(self, event: Any) -> None:
        self.origins.append(event.origin)


def row(measure: str, op: str, case: str, times_us: Sequence[float]) -> Row:
    """A row of the results; one time stands alone."""
    deciles = statistics.quantiles(times_us, n=10) if len(times_us) > 1 else [times_us[0]] * 9
    figures = {"us": deciles[4], "p10": deciles[0], "p90": deciles[8], "share_of_ceiling": None}
    return {"measure": measure, "op": op, "case": case, "impl": "cuda", **figures}


def empty_values(layout: Any, address: int) -> list[int]:
    """Values of the struct of a launch that has nothing to do: pointers to ``address``, zeros."""
    from fi_cuda.params import KINDS

    codes = [code for _, kind in layout.fields for code in KINDS[kind][1]]
    return [address if code == "P" else 0 for code in codes]


def empty_arguments(spec: Any, scratch: torch.Tensor) -> list[Any]:
    """All values of such a launch: the struct's, and for each tensor map the kernel takes one of ``scratch``. Nothing is
    copied through it, so its form, that of a matrix, need not be what the kernel's copies want."""
    from fi_cuda.tensor_map import Box, tensor_map_of

    values = empty_values(spec.layout, scratch.data_ptr())
    return [*values, *(tensor_map_of(scratch.view(-1, MAP_WIDTH), Box((8, MAP_WIDTH))) for _ in spec.tensor_maps)]


def first_calls(
    measure: str, device: torch.device, scratch: torch.Tensor, share: tuple[int, int], selection: Selection
) -> list[Row]:
    """The first call of a small kernel that is not shipped, which brings up what a process needs once; then of each
    selected spec of share (i, n): i, i + n, ..."""
    from fi_cuda.kernels.rmsnorm import RmsNormSpec
    from fi_cuda.shipped import shipped_specs
    from fi_cuda.spec import kernel_for

    first, step = share
    small = next(spec for spec in shipped_specs() if isinstance(spec, RmsNormSpec))
    small = dataclasses.replace(small, width=8 * (first + 1))  # another one for each share
    names = names_of([*shipped_specs(), small])
    rows = []
    for spec in [small, *selection.specs()[first::step]]:
        scratch.zero_()
        torch.cuda.synchronize()
        started = time.perf_counter()
        kernel = kernel_for(spec, device)
        kernel.launch(device, spec.cluster_size, 1, *empty_arguments(spec, scratch))
        torch.cuda.synchronize()
        rows.append(row(measure, spec.stem, names[spec], [(time.perf_counter() - started) * 1e6]))
    rows[0]["measure"] = f"{measure}, first of the process"
    return rows


def times_of(call: Callable[[], object]) -> list[float]:
    """Microseconds of each of NUM_CALLS calls on the host, while the device's queue is short."""
    times = []
    for index in range(NUM_CALLS):
        if index % CALLS_BETWEEN_SYNCS == 0:
            torch.cuda.synchronize()
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1000)
    torch.cuda.synchronize()
    return times


def launches(device: torch.device, scratch: torch.Tensor) -> list[Row]:
    """A launch of one spec of each stem, with the driver's call and with a function that does nothing in its place."""
    import fi_cuda.launch as launching
    from fi_cuda.shipped import shipped_specs
    from fi_cuda.spec import kernel_for

    rows, names = [], names_of(shipped_specs())
    success = (launching.driver.CUresult.CUDA_SUCCESS,)
    for spec in {spec.stem: spec for spec in shipped_specs()}.values():
        kernel = kernel_for(spec, device)
        values = [spec.cluster_size, 1, *empty_arguments(spec, scratch)]
        scratch.zero_()

        def launch(kernel: Any = kernel, values: list[Any] = values) -> None:
            kernel.launch(device, *values)

        for _ in range(CALLS_BETWEEN_SYNCS):
            launch()
        rows.append(row("launch", spec.stem, names[spec], times_of(launch)))
        seen: list[object] = []
        driver = launching.driver
        try:
            launching.driver = SimpleNamespace(cuLaunchKernelEx=lambda *given, seen=seen: seen.append(given) or success)
            launch()
            if not seen:
                raise FiError("a launch no longer calls driver.cuLaunchKernelEx: its Python part cannot be told apart")
            launching.driver = SimpleNamespace(cuLaunchKernelEx=lambda *given: success)
            rows.append(row("launch, Python alone", spec.stem, names[spec], times_of(launch)))
        finally:
            launching.driver = driver
    return rows


def public_calls(device: torch.device) -> list[Row]:
    """Whole calls of the operations that the CUDA backend serves, on a few tokens."""
    scale = dataclasses.replace(SCALES["cuda"], num_tokens=8, num_requests=8, kv_len=64)
    rows = []
    for op, builders in MODEL_WORKLOADS.items():
        if not any(entry.backend == "cuda" for entry in registry().kernels(op)):
            continue
        for builder in builders:
            workload = builder(device, scale)
            request = registry().operations[op].request(target_of(device), **workload.values)
            if registry().select(request).entry.backend == "cuda":
                workload.call()
                rows.append(row("public call", op, workload.case, times_of(workload.call)))
    return rows


def child(stage: str, share: tuple[int, int], selection: Selection) -> None:
    """One process on the device; prints its rows and the origins of its kernels as JSON."""
    observer = Observer()
    registry().manager.register(observer, "observer")
    device = torch.device("cuda", torch.cuda.current_device())
    scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    rows = first_calls(stage, device, scratch, share, selection)
    origins = list(observer.origins)
    if stage == CACHED and selection.takes_all:
        rows += launches(device, scratch) + public_calls(device)
    print(json.dumps({"rows": rows, "origins": origins, "device": torch.cuda.get_device_name(device)}))


def run_children(stage: str, cache: str, jobs: int, selection: Selection) -> dict[str, Any]:
    """What ``jobs`` processes with equal shares of the specs found, side by side."""
    environment = {**os.environ, "FI_CACHE_DIR": cache}
    child_of = [sys.executable, __file__, "--stage", stage, *selection.words(), "--share"]
    commands = [[*child_of, str(first), str(jobs)] for first in range(jobs)]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise FiError(f"{stage}: exit statuses {[child.returncode for child in children]}")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    joined = {name: [item for each in found for item in each[name]] for name in ("rows", "origins")}
    return {**joined, "device": found[0]["device"]}


def imports() -> tuple[list[Row], dict[str, Any]]:
    """Import times of fresh processes that have torch, and whether one of them touched the driver."""
    found = []
    for _ in range(NUM_IMPORTS):
        done = subprocess.run([sys.executable, "-c", IMPORT], stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
    names = ("import fi_cuda", "import fi_cuda.plugin")
    rows = [row(name, name, "fresh process, torch imported", [item[name] for item in found]) for name in names]
    touched = [item for item in found if item["driver opened"] or item["devices opened"] or item["context made"]]
    return rows, {"driver_touched_by_import": touched}


def ask_at_once(cache: str, source: Any, ready: Any, answers: Any) -> None:
    """One of many processes that ask for a kernel when all are ready; (seconds, origin) goes to ``answers``."""
    from fi_cuda.cache import ArtifactCache
    from fi_cuda.compile import build
    from fi_cuda.source import CompileTarget

    observer, target = Observer(), CompileTarget("sm_90a")
    registry().manager.register(observer, "observer")
    ready.wait()
    started = time.perf_counter()
    build(source, target, ArtifactCache(Path(cache)))
    answers.put((time.perf_counter() - started, *observer.origins))


def many_at_once(cache: str) -> tuple[Row, list[str]]:
    """How long each of NUM_AT_ONCE processes waited for the same new kernel, and where each had it from."""
    from fi_cuda.shipped import shipped_specs

    source = shipped_specs()[0].source()
    # Forked, before this process knows of a GPU: so many at once would spend their time importing torch.
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(NUM_AT_ONCE), context.SimpleQueue()
    processes = [context.Process(target=ask_at_once, args=(cache, source, ready, answers)) for _ in range(NUM_AT_ONCE)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    name = f"{NUM_AT_ONCE} processes at once"
    return row(name, name, "a kernel never compiled", [1e6 * seconds for seconds, _ in found]), [
        item[1] for item in found
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines of the table: each measure's median and worst over its rows, beside its aim."""
    lines = [f"{'measure':<40}{'rows':>6}{'median us':>13}{'worst us':>13}{'aim us':>12}  worst case"]
    for measure in dict.fromkeys(item["measure"] for item in rows):
        chosen = [item for item in rows if item["measure"] == measure]
        worst = max(chosen, key=lambda item: item["us"])
        median = statistics.median(item["us"] for item in chosen)
        aim = f"{AIMS_US[measure]:.0f}" if measure in AIMS_US else ""
        times = f"{median:>13.1f}{worst['us']:>13.1f}"
        lines.append(f"{measure:<40}{len(chosen):>6}{times}{aim:>12}  {worst['case'][:60]}")
    return lines


def proof(compiled: Sequence[str], cached: Sequence[str], jobs: int = 1) -> tuple[str, bool]:
    """What the events of the first ``jobs`` processes and of the later one say, and whether that compiled nothing."""
    same = len(cached) - 1 == len(compiled) - jobs > 0  # each process has a small kernel of its own besides
    holds = same and set(compiled) == {"nvrtc"} and set(cached) == {"cache"}
    counts = [f"{list(origins).count('nvrtc')} of {len(origins)}" for origins in (compiled, cached)]
    return f"kernels compiled: {counts[0]} at first, {counts[1]} in a later process", holds


def written(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """pipeline.json: ``found``, a line for each spec with its first calls, and one for each other row."""
    calls: dict[tuple[str, str], Row] = {}
    others = []
    for item in rows:
        if item["measure"] in (FIRST, CACHED):
            spec = calls.setdefault((item["op"], item["case"]), {"op": item["op"], "case": item["case"]})
            spec[item["measure"]] = round(item["us"])
        else:
            others.append(item)
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    for key, items in (("specs", calls.values()), ("rows", others)):
        lines = ",\n".join(json.dumps(item) for item in items)
        parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
    return "{" + ",\n".join(parts) + "}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for pipeline.json")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side (times grow a little)")
    parser.add_argument("--stem", action="append", default=[], help="first calls of these kernels alone (repeatable)")
    parser.add_argument(
        "--slowest", nargs=2, metavar=("N", "FILE"), help="first calls of the N specs that took longest in FILE alone"
    )
    parser.add_argument("--commit", metavar="TEXT", help="what the file names (default: git's answer)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.slowest and int(options.slowest[0]) < 1:
        parser.error("--slowest takes a count of at least 1")
    slowest, earlier = (int(options.slowest[0]), Path(options.slowest[1])) if options.slowest else (0, None)
    selection = Selection(tuple(options.stem), slowest, earlier)
    if options.stage is not None:
        child(options.stage, tuple(options.share), selection)
        return 0
    with tempfile.TemporaryDirectory(prefix="fi-pipeline-") as folder:
        waits, origins = many_at_once(folder)
    with tempfile.TemporaryDirectory(prefix="fi-pipeline-") as folder:
        first = run_children(FIRST, folder, options.jobs, selection)
        second = run_children(CACHED, folder, 1, selection)
    import_rows, touched = imports()
    rows = [*first["rows"], *second["rows"], *import_rows, waits]
    text, holds = proof(first["origins"], second["origins"], options.jobs)
    once = sorted(origins) == ["cache"] * (NUM_AT_ONCE - 1) + ["nvrtc"]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {
            "device": first["device"],
            "commit": options.commit or commit(),
            "jobs": options.jobs,
            "proof": text,
            "proof_holds": holds,
            "compiled_once": once,
            **touched,
        }
        (options.out / "pipeline.json").write_text(written(found, rows))
    print("\n".join(summary(rows)))
    print(text)
    print(
        f"{NUM_AT_ONCE} processes at once: {origins.count('nvrtc')} compiled, {origins.count('cache')} found it in the cache"
    )
    print(f"importing fi_cuda touched the driver: {'yes' if touched['driver_touched_by_import'] else 'no'}")
    return int(not holds or not once or bool(touched["driver_touched_by_import"]))


if __name__ == "__main__":
    sys.exit(main())
