"""The engine's steps by parts, as far as that needs no GPU."""

from types import SimpleNamespace

import pytest
from bench_engine_decode import AttentionAlone, families, row_of
from fi_engine.decode_bench import SteadySpeed


def entries(*backends):
    return [SimpleNamespace(backend=name) for name in backends]


@pytest.mark.parametrize(("op", "wanted"), [("attention", "cuda"), ("append_kv", "triton"), ("rmsnorm", "triton")])
def test_all_but_attention_is_tritons(op, wanted):
    chosen = AttentionAlone().fi_select_kernel(SimpleNamespace(op=op), entries("cuda", "triton"))
    assert chosen.backend == wanted
    assert AttentionAlone().fi_select_kernel(SimpleNamespace(op=op), entries("reference")) is None


def test_kernels_are_summed_up_by_family():
    found = families({"fi_rmsnorm": 1e-6, "nvjet_hsh_64x8": 3e-6, "cutlass_80_gemm": 2e-6, "norm_kernel": 5e-7})
    assert found == {"matmul": 5.0, "CUDA rmsnorm": 1.0, "Triton norm": 0.5}


def test_a_row_has_the_median_step_and_its_parts():
    speed = SteadySpeed(8, [1e-3, 2e-3, 9e-3], {"fi_attention_decode": 1e-4, "fi_rope": 2e-4})
    row = row_of("case", "cuda", speed).as_json()
    assert (row["us"], row["families"]) == (2000.0, {"CUDA rope": 200.0, "CUDA attention_decode": 100.0})
    assert speed.step_seconds == pytest.approx(4e-3) and speed.attention_seconds == pytest.approx(1e-4)
    assert speed.kernel_seconds == pytest.approx(3e-4) and speed.tokens_per_second == pytest.approx(2000)
