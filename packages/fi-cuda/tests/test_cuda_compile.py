"""Sources, content keys and the way from a source to an artifact, with the real compiler and no GPU."""

import pytest
from fi_cuda.cache import ArtifactCache, Resources
from fi_cuda.compile import build, compile_source, parse_resources
from fi_cuda.source import CompileTarget, KernelSource, SourceError
from fi_cuda.toolchain import NO_CONTRACTION

pytestmark = pytest.mark.timeout(120)

TEXT = '#include "fi/outer.cuh"\n\nextern "C" __global__ void scale(float* x) { x[threadIdx.x] *= outer(); }\n'
OUTER = '#pragma once\n#include "fi/inner.cuh"\n__device__ inline float outer() { return inner() + 1.0f; }\n'
INNER = "#pragma once\n__device__ inline float inner() { return 2.0f; }\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "include" / "fi").mkdir(parents=True)
    (tmp_path / "include" / "fi" / "outer.cuh").write_text(OUTER)
    (tmp_path / "include" / "fi" / "inner.cuh").write_text(INNER)
    (tmp_path / "include" / "fi" / "unused.cuh").write_text("#error not included\n")
    return tmp_path / "include"


def source(folder, text=TEXT, symbol="scale"):
    return KernelSource("scale_rows", symbol, text, (folder,))


def test_headers_are_the_transitive_closure(folder):
    assert sorted(source(folder).headers()) == ["fi/inner.cuh", "fi/outer.cuh"]


def test_key_depends_on_everything_that_reaches_the_compiler_and_nothing_else(folder, tmp_path):
    key = source(folder).key(CompileTarget(), "13.0")
    assert key == source(folder).key(CompileTarget(), "13.0")
    changed = {
        source(folder).key(CompileTarget("sm_80"), "13.0"),
        source(folder).key(CompileTarget(fast_math=True), "13.0"),
        source(folder).key(CompileTarget(max_registers=64), "13.0"),
        source(folder).key(CompileTarget(), "13.1"),
        source(folder, TEXT + "// other\n").key(CompileTarget(), "13.0"),
    }
    (folder / "fi" / "unused.cuh").write_text("// edited\n")
    assert source(folder).key(CompileTarget(), "13.0") == key
    (folder / "fi" / "inner.cuh").write_text(INNER.replace("2.0f", "30.f"))
    changed.add(source(folder).key(CompileTarget(), "13.0"))
    assert len(changed) == 6 and key not in changed
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "fi" / "inner.cuh").write_text(INNER)
    assert source(moved).key(CompileTarget(), "13.0") == key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('#include "fi/absent.cuh"\n' + TEXT, '"fi/absent.cuh" is in none of the include folders'),
        ('#include "../secret.cuh"\n' + TEXT, "not relative to an include folder"),
        ('#include "/etc/passwd"\n' + TEXT, "not relative to an include folder"),
        (TEXT + "\n" * 40, "generated lines, at most 40"),
        (TEXT + TEXT, "exactly one"),
        (TEXT.replace("scale(", "other("), "exactly one"),
    ],
)
def test_rule_breaking_source_is_refused(folder, text, message):
    with pytest.raises(SourceError, match=message):
        source(folder, text).headers()


def test_build_compiles_once_and_then_reads(folder, tmp_path, monkeypatch):
    cache = ArtifactCache(tmp_path / "cache")
    made = build(source(folder), CompileTarget(), cache)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.resources.num_registers > 0
    assert made.resources.spill_store_bytes == made.resources.spill_load_bytes == 0
    monkeypatch.setattr("fi_cuda.compile.compile_cubin", None)
    assert build(source(folder), CompileTarget(), cache) == made


def test_flags_reach_the_compiler(folder):
    text = TEXT.replace("*=", "/=")
    exact = compile_source(source(folder, text), CompileTarget())
    fast = compile_source(source(folder, text), CompileTarget(fast_math=True))
    lines = compile_source(source(folder, text), CompileTarget(line_info=True))
    assert fast.cubin != exact.cubin
    assert len(lines.cubin) > len(exact.cubin)
    assert fast.flags == ("fast_math=True",)


def test_products_and_sums_are_rounded_one_by_one_where_the_text_asks_for_it(folder):
    text = TEXT.replace("*= outer()", "= x[0] * x[1] + outer()")
    apart = TEXT.replace("*= outer()", "= __fadd_rn(__fmul_rn(x[0], x[1]), outer())")
    joined, asked, exact = (
        compile_source(source(folder, given), CompileTarget()).cubin
        for given in (text, f"{NO_CONTRACTION}\n{text}", f"{NO_CONTRACTION}\n{apart}")
    )
    assert asked == exact != joined


def test_register_limit_shows_in_the_report(folder):
    loads = " + ".join(f"x[threadIdx.x + {32 * i}] * y{i}" for i in range(60))
    values = "\n".join(
        f'  float y{i} = x[threadIdx.x + {3200 + 32 * i}]; asm volatile("" ::: "memory");' for i in range(2)
    )
    values += "".join(f" float y{i} = x[{i}];" for i in range(2, 60))
    text = f'extern "C" __global__ void scale(float* x) {{\n{values}\n  __syncthreads();\n  x[threadIdx.x] = {loads};\n}}\n'
    limited = compile_source(source(folder, text), CompileTarget(max_registers=24)).resources
    free = compile_source(source(folder, text), CompileTarget()).resources
    assert limited.num_registers <= 24 < free.num_registers


def test_resources_are_read_from_the_report():
    report = (
        "ptxas info    : Compiling entry function 'scale' for 'sm_90a'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem\n"
    )
    assert parse_resources(report) == Resources(168, 1024, 16, 8, 12)
