"""The parts of benchmarks/gpu_check.py that work without a GPU: entry points of the examples, families of kernels."""

import importlib.metadata
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/gpu_check.py"


def load():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


gpu_check = load()


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("fi_append_kv", "CUDA append_kv"),
        ("attention_kernel", "Triton attention"),
        ("nvjet_tst_64x8_64x16_1x4_h_bz_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "matmul"),
        ("void gemv2T_kernel_val<int, int, float>", "matmul"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "torch"),
        ("triton_poi_fused_add_0", "other"),
    ],
)
def test_a_kernel_belongs_to_one_family(kernel, family):
    assert gpu_check.family_of(kernel) == family


def test_each_example_has_the_entry_points_that_installing_it_would_give(tmp_path):
    projects = [tomllib.loads(path.read_text())["project"] for path in ROOT.glob("examples/*/pyproject.toml")]
    assert {project["name"] for project in projects} == {"fi-example-plugin", "fi-example-cuda-plugin"}
    for project in projects:
        folder = tmp_path / project["name"]
        folder.mkdir()
        gpu_check.write_dist_info(folder, project)
        (found,) = importlib.metadata.distributions(path=[str(folder)])
        assert (found.name, found.version) == (project["name"], project["version"])
        points = {(point.group, point.name, point.value) for point in found.entry_points}
        assert points == {("fi", name, value) for name, value in project["entry-points"]["fi"].items()}


def test_a_partition_without_its_native_module_fails_visibly(tmp_path, monkeypatch):
    check = gpu_check.Check(tmp_path, "cpu", (), 1, None)
    rows = [{"case": f"decode-random-b{size}", "us": 31.0, "impl": "numpy"} for size in (256, 4096)]
    (tmp_path / "partition.json").write_text(gpu_check.json.dumps(rows))
    monkeypatch.setattr(gpu_check, "command", lambda check, name, *given: int(name == "build-native"))
    gpu_check.partition(check)
    assert [status for _, _, status in check.table] == ["FAILED", "FAILED"]
    assert "(numpy)" in check.table[1][1]
    assert check.failed


def test_variables_reach_the_command_and_its_output_the_log(tmp_path):
    check = gpu_check.Check(tmp_path, "cpu", (), 1, None)
    script = "import os, sys; print(os.environ['FI_EXAMPLE']); sys.exit(3)"
    assert gpu_check.command(check, "script", "-c", script, FI_EXAMPLE="seen") == 3
    assert (tmp_path / "script.log").read_text() == "seen\n"


@pytest.mark.parametrize("with_xdist", [True, False])
def test_without_the_modules_that_read_a_model_the_other_tests_run(tmp_path, monkeypatch, with_xdist):
    check = gpu_check.Check(tmp_path, "cuda", (), 3, tmp_path / "model.gguf")
    find = gpu_check.importlib.util.find_spec
    absent = {"gguf", "tokenizers", *(() if with_xdist else ("xdist",))}
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    commands = []

    def run(check, name, *arguments, **variables):
        commands.append((name, arguments))
        (check.out / f"{name}.log").write_text("== 5 passed, 1 error in 2.00s ==\n")
        return 1

    monkeypatch.setattr(gpu_check, "command", run)
    gpu_check.gpu_tests(check)
    gpu_check.engine(check)
    ((name, arguments),) = commands
    assert name == "tests" and "gpu and not model" in arguments and "--continue-on-collection-errors" in arguments
    assert ("-n" in arguments) == with_xdist
    files = {Path(text).name for text in arguments if text.endswith(".py")}
    assert {"test_engine_gpu.py", "test_example_cuda_plugin.py", "test_cuda_attention_graph.py"} <= files
    missing = "not installed: gguf, tokenizers"
    assert check.table == [
        ("tests of the language model", missing, "not run"),
        ("gpu tests", "5 passed, 1 error in 2.00s", "FAILED"),
        ("engine", missing, "not run"),
    ]


def test_no_model_is_not_a_failure(tmp_path):
    check = gpu_check.Check(tmp_path, "cuda", (), 1, None)
    gpu_check.engine(check)
    assert check.table == [("engine", "needs --model", "not run")] and not check.failed
