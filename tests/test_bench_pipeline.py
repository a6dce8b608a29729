"""benchmarks/bench_pipeline.py without a GPU: its empty launches fit every layout, and what its proof accepts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.shipped import shipped_specs

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/bench_pipeline.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_pipeline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pipeline"] = module
    spec.loader.exec_module(module)
    return module


bench_pipeline = load()


def test_an_empty_launch_fits_the_layout_of_every_shipped_spec():
    layouts = {spec.stem: spec.layout for spec in shipped_specs()}
    for layout in layouts.values():
        values = bench_pipeline.empty_values(layout, 4096)
        packed = layout.packer.pack(*values)
        num_pointers = sum(kind in ("pointer", "output") for _, kind in layout.fields)
        assert values.count(4096) == num_pointers > 0
        assert layout.packer.unpack(packed) == tuple(values)


def test_an_empty_launch_has_a_tensor_map_for_each_that_the_kernel_takes(monkeypatch):
    from fi_cuda import tensor_map

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


def test_a_short_name_for_each_shipped_spec():
    specs = shipped_specs()
    names = bench_pipeline.names_of(specs)
    assert len(set(names.values())) == len(specs)
    rms, other = (RmsNormSpec(torch.bfloat16, torch.bfloat16, width, 16, False) for width in (4096, 128))
    assert bench_pipeline.names_of([rms, rms, other]) == {rms: "RmsNormSpec", other: "RmsNormSpec width=128"}


def test_the_file_has_a_line_for_each_spec_and_leads_to_the_slowest(tmp_path):
    *others, slow, newer = shipped_specs()
    names = bench_pipeline.names_of(shipped_specs())
    rows = [
        bench_pipeline.row(measure, spec.stem, names[spec], [us + 1e6 * (spec == slow)])
        for measure, us in (("first call", 5e5), ("from the cache", 4e3))
        for spec in (*others, slow)
    ]
    file = tmp_path / "pipeline.json"
    file.write_text(
        bench_pipeline.written({"device": "x"}, [*rows, bench_pipeline.row("public call", "rope", "y", [7.0])])
    )
    found = json.loads(file.read_text())
    assert found["device"] == "x" and [row["case"] for row in found["rows"]] == ["y"]
    line = {"op": slow.stem, "case": names[slow], "first call": 1500000, "from the cache": 1004000}
    assert len(found["specs"]) == len(others) + 1 and found["specs"][-1] == line
    selection = bench_pipeline.Selection(slowest=2, earlier=file)
    assert selection.specs() == [newer, slow] and not selection.takes_all
    assert selection.words() == ["--slowest", "2", str(file)]
    stem = bench_pipeline.Selection(("rope",))
    assert {spec.stem for spec in stem.specs()} == {"rope"} and stem.words() == ["--stem", "rope"]
