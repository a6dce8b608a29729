"""benchmarks/bench_pipeline.py without a GPU: its empty launches fit every layout, and what its proof accepts."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/bench_pipeline.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_pipeline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pipeline"] = module
    spec.loader.exec_module(module)
    return module


bench_pipeline = load()


def test_an_empty_launch_fits_the_layout_of_every_shipped_spec():
    from fi_cuda.shipped import shipped_specs

    layouts = {spec.stem: spec.layout for spec in shipped_specs()}
    for layout in layouts.values():
        values = bench_pipeline.empty_values(layout, 4096)
        packed = layout.packer.pack(*values)
        num_pointers = sum(kind in ("pointer", "output") for _, kind in layout.fields)
        assert values.count(4096) == num_pointers > 0
        assert layout.packer.unpack(packed) == tuple(values)


def test_an_empty_launch_has_a_tensor_map_for_each_that_the_kernel_takes(monkeypatch):
    from fi_cuda import tensor_map
    from fi_cuda.shipped import shipped_specs

    asked = []
    monkeypatch.setattr(tensor_map, "tensor_map_of", lambda tensor, box: asked.append((tensor, box)) or "map")
    scratch = torch.zeros(4096, dtype=torch.uint8)
    kinds = {spec.tensor_maps: spec for spec in shipped_specs()}
    assert len(kinds) > 1
    for names, spec in kinds.items():
        values = bench_pipeline.empty_arguments(spec, scratch)
        num_values = len(bench_pipeline.empty_values(spec.layout, scratch.data_ptr()))
        assert values[num_values:] == ["map"] * len(names)
    for tensor, box in asked:
        assert tensor.data_ptr() == scratch.data_ptr() and tensor.numel() == scratch.numel()
        tensor_map._check_tensor(4096, tensor.dtype, tensor.shape, tensor.stride())
        tensor_map._check_box(box, tensor.dtype, tensor.dim())


@pytest.mark.parametrize(
    ("compiled", "cached", "holds"),
    [
        (["nvrtc"] * 3, ["cache"] * 3, True),
        (["nvrtc"] * 3, ["cache", "nvrtc", "cache"], False),
        (["nvrtc"] * 3, ["cache"] * 2, False),
        (["cache"] * 3, ["cache"] * 3, False),
        (["nvrtc"] * 3, ["fi_find_artifact of wheel"] * 3, False),
        ([], [], False),
    ],
)
def test_the_proof_holds_only_if_the_second_process_took_all_from_the_cache(compiled, cached, holds):
    text, found = bench_pipeline.proof(compiled, cached)
    assert found == holds
    assert text.endswith(f"{cached.count('nvrtc')} of {len(cached)} in a later process")


def test_processes_that_ask_at_once_compile_once(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_pipeline, "NUM_AT_ONCE", 6)
    waits, origins = bench_pipeline.many_at_once(str(tmp_path))
    assert sorted(origins) == ["cache"] * 5 + ["nvrtc"]
    assert waits["measure"] == "6 processes at once" and waits["us"] > 0


def test_importing_the_backend_touches_no_driver(monkeypatch):
    monkeypatch.setattr(bench_pipeline, "NUM_IMPORTS", 1)
    rows, found = bench_pipeline.imports()
    assert [item["measure"] for item in rows] == ["import fi_cuda", "import fi_cuda.plugin"]
    assert all(item["us"] > 0 for item in rows)
    assert found == {"driver_touched_by_import": []}


def test_the_table_has_each_measure_with_its_worst_case():
    rows = [
        bench_pipeline.row("from the cache", "rope", "small", [1000.0]),
        bench_pipeline.row("from the cache", "rope", "large", [3000.0]),
        bench_pipeline.row("public call", "rope", "x", [7.0, 8.0, 9.0]),
    ]
    _, first, second = bench_pipeline.summary(rows)
    assert first.split() == ["from", "the", "cache", "2", "2000.0", "3000.0", "20000", "large"]
    assert second.split() == ["public", "call", "1", "8.0", "8.0", "x"]
