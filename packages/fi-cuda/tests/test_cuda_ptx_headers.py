"""Every function of fi/ptx assembles for Hopper and becomes the machine instruction it is named for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from fi_cuda.compile import INCLUDE_FOLDER, parse_resources
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import CompileError, compile_cubin

pytestmark = pytest.mark.timeout(180)

FOLDER = INCLUDE_FOLDER / "fi" / "ptx"
HEADERS = sorted(path.name for path in FOLDER.glob("*.cuh"))
INCLUDES = "".join(f'#include "fi/ptx/{name}"\n' for name in HEADERS)

COPIES = """
extern "C" __global__ void probe(const __grid_constant__ TensorMap map, char* global, unsigned long long policy, int n) {
  extern __shared__ unsigned long long bar[];
  char* s = reinterpret_cast<char*>(bar) + 1024;
  init_barrier(bar, 1);
  fence_barrier_init();
  bulk_load(s, global, 64, bar);
  bulk_load(s, global, 64, bar, evict_first_policy());
  prefetch_tensor_map(&map);
  tma_load_1d(s, &map, bar, n);
  tma_load_2d(s, &map, bar, n, 2);
  tma_load_3d(s, &map, bar, n, 2, 3);
  tma_load_4d(s, &map, bar, n, 2, 3, 4);
  tma_load_5d(s, &map, bar, n, 2, 3, 4, 5);
  tma_load_1d(s, &map, bar, n, policy);
  tma_load_2d(s, &map, bar, n, 2, policy);
  tma_load_3d(s, &map, bar, n, 2, 3, evict_last_policy());
  tma_load_4d(s, &map, bar, n, 2, 3, 4, policy);
  tma_load_5d(s, &map, bar, n, 2, 3, 4, 5, policy);
  tma_load_multicast_1d(s, &map, bar, n, 3);
  tma_load_multicast_2d(s, &map, bar, n, 2, 3);
  tma_load_multicast_3d(s, &map, bar, n, 2, 3, 3);
  tma_load_multicast_4d(s, &map, bar, n, 2, 3, 4, 3);
  tma_load_multicast_5d(s, &map, bar, n, 2, 3, 4, 5, 3);
  arrive_and_expect_bytes(bar, 4096);
  if (!test_barrier(bar, 0)) wait_barrier(bar, 0);
  fence_proxy_async();
  fence_proxy_async_shared();
  tma_store_1d(&map, s, n);
  tma_store_2d(&map, s, n, 2);
  tma_store_3d(&map, s, n, 2, 3);
  tma_store_4d(&map, s, n, 2, 3, 4);
  tma_store_5d(&map, s, n, 2, 3, 4, 5);
  bulk_store(global, s, 64);
  bulk_commit();
  bulk_wait_read<1>();
  bulk_wait<0>();
  cp_async_16(s, global, n > 3);
  cp_async_part<4>(s, global, n);
  cp_async_part<8>(s, global, n);
  cp_async_part<16>(s, global, n);
  cp_async_commit();
  cp_async_wait<1>();
  cp_async_arrive_noinc(bar);
  invalidate_barrier(bar);
}
"""

THREADS = """
extern "C" __global__ void __launch_bounds__(256, 1) probe(float* out, int* flags, int n) {
  extern __shared__ unsigned long long bar[];
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x < 32 && elect_one()) arrive(bar);
  } else {
    take_registers<216>();
    named_barrier_sync(1, 128);
    named_barrier_arrive(n, 256);
    if (n == 5) end_thread();
    if (n == 6) end_thread_unseen();
    unsigned x1[1], x2[2], x4[4];
    ldmatrix_x1(x1, bar);
    ldmatrix_x2(x2, bar);
    ldmatrix_x4(x4, bar);
    stmatrix_x1(bar + 64, x1);
    stmatrix_x2(bar + 64, x2);
    stmatrix_x4(bar + 64, x4);
    ldmatrix_x1_trans(x1, bar);
    ldmatrix_x2_trans(x2, bar);
    ldmatrix_x4_trans(x4, bar);
    stmatrix_x1_trans(bar + 64, x1);
    stmatrix_x2_trans(bar + 64, x2);
    stmatrix_x4_trans(bar + 64, x4);
    float c[4] = {};
    mma_m16n8k16<__nv_bfloat16>(c, x4, x2);
    mma_m16n8k16<__half>(c, x4, x2);
    unsigned halves[4];
    halves_of_e4m3(halves[0], halves[1], e4m3x4_of(c[0], c[1], c[2], c[3]));
    halves_of_e5m2(halves[2], halves[3], movmatrix_trans(x1[0]) ^ load_past_l1(flags).x);
    stmatrix_x4(bar + 128, halves);
    out[threadIdx.x] = exp2_approx(c[0]) + log2_approx(c[1]) + tanh_approx(c[2]) + rcp_approx(max_or_nan(c[3], c[0]));
  }
  cluster_arrive_relaxed();
  cluster_wait();
  const unsigned place = address_in_cluster(bar + 2, 1), barrier = address_in_cluster(bar, 1);
  store_async(place, make_uint2(1, 2), barrier);
  store_async(place, make_uint4(1, 2, 3, 4), barrier);
  store_async(place, 5ull, barrier);
  store_async(place, 6u, barrier);
  cluster_arrive();
  cluster_wait();
  arrive_in_cluster(bar, num_blocks_in_cluster() - 1);
  out[0] += load_from_cluster(address_in_cluster(bar, rank_in_cluster() ^ rank_in_cluster_again() ^ 1));
  fence_acq_rel_gpu();
  fence_acq_rel_cluster();
  if (load_acquire(flags) == 3) store_release(flags + 1, 4);
  red_release(flags + 2, 1);
  flags[4] = add_acq_rel(flags + 3, 1);
  float4* quads = reinterpret_cast<float4*>(out);
  store_relaxed(quads + 1, load_relaxed(quads + 2));
  float2* pairs = reinterpret_cast<float2*>(out);
  store_relaxed(pairs + 1, load_relaxed(pairs + 2));
  prefetch_to_l2(out + 64);
}
"""

# All numbers of columns and both kinds of A of one type; all types and major-nesses of one number.
MULTIPLY = """
template <class T, int kN>
__device__ void one(unsigned long long a, unsigned long long b, float* out, unsigned (&fragment)[4], bool accumulate) {
  float c[kN / 2];
  for (int idx = 0; idx < kN / 2; ++idx) c[idx] = out[idx];
  pin_registers(c);
  pin_registers(fragment);
  wgmma_fence();
  wgmma_ss<T, kN>(c, a, b, accumulate);
  wgmma_rs<T, kN>(c, fragment, b, true);
  if constexpr (WgmmaType<T>::kHasMajor && kN == 64) {
    wgmma_ss<T, kN, Major::kMN>(c, a, b, true);
    wgmma_ss<T, kN, Major::kK, Major::kMN>(c, a, b, true);
    wgmma_rs<T, kN, Major::kMN>(c, fragment, b, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(c);
  for (int idx = 0; idx < kN / 2; ++idx) out[threadIdx.x * kN / 2 + idx] = c[idx];
}
template <int kN>
__device__ void upwards(unsigned long long a, unsigned long long b, float* out, unsigned (&fragment)[4], bool accumulate) {
  one<__nv_bfloat16, kN>(a, b, out, fragment, accumulate);
  if constexpr (kN < 256) upwards<kN + 8>(a, b, out, fragment, accumulate);
}
extern "C" __global__ void __launch_bounds__(128) probe(unsigned long long a, unsigned long long b, float* out, uint4 x,
                                                        bool accumulate) {
  unsigned fragment[4] = {x.x, x.y, x.z, x.w};
  upwards<8>(a, b, out, fragment, accumulate);
  one<__half, 64>(a, b, out, fragment, accumulate);
  one<__nv_fp8_e4m3, 64>(a, b, out, fragment, accumulate);
  one<__nv_fp8_e5m2, 64>(a, b, out, fragment, accumulate);
}
"""

INSTRUCTIONS = {
    COPIES: [
        *("UBLKCP.S.G", "UBLKCP.G.S", "UTMACCTL.PF", "SYNCS.EXCH", "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK"),
        *(f"UTMALDG.{dims}D" for dims in range(1, 6)),
        *(f"UTMALDG.{dims}D.MULTICAST" for dims in range(1, 6)),
        *(f"UTMASTG.{dims}D" for dims in range(1, 6)),
        *("UTMACMDFLUSH", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "ARRIVES.LDGSTSBAR"),
    ],
    THREADS: [
        *("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC", "ELECT", "BAR.SYNC", "BAR.ARV", "HMMA.16816.F32.BF16"),
        *("LDSM.16.M88.4", "LDSM.16.MT88.4", "STSM.16.M88.4", "STSM.16.MT88.4", "MOVM.16.MT88", "HMMA.16816.F32"),
        *("MUFU.EX2", "MUFU.LG2", "MUFU.TANH", "MUFU.RCP", "UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR.ALL.GPU"),
        *("STAS.64", "STAS.128"),
        *("LDG.E.STRONG.GPU", "STG.E.STRONG.GPU", "SYNCS.ARRIVE.TRANS64.RED.A1T0", "LDG.E.64.STRONG.GPU", "CCTL.E.PF2"),
        *("STG.E.64.STRONG.GPU", "LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU"),
    ],
    MULTIPLY: [
        *(f"HGMMA.64x{columns}x16.F32.BF16" for columns in range(8, 257, 8)),
        *("HGMMA.64x64x16.F32", "QGMMA.64x64x32.F32.E4M3.E4M3", "QGMMA.64x64x32.F32.E5M2.E5M2"),
        *("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR"),
    ],
}


def compile_probe(text, arch="sm_90a"):
    return compile_cubin(f"{INCLUDES}using namespace fi::ptx;\n{text}", "probe", CompileTarget(arch), [INCLUDE_FOLDER])


def disassembly(code, folder):
    """SASS of a cubin; None without the disassembler that Triton carries."""
    triton = importlib.util.find_spec("triton")
    found = triton and list(Path(triton.origin).parent.glob("backends/nvidia/bin/nvdisasm"))
    if not found:
        return None
    (folder / "probe.cubin").write_bytes(code)
    command = [found[0], "-c", folder / "probe.cubin"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout


@pytest.mark.parametrize("text", INSTRUCTIONS, ids=["copies", "threads", "multiply"])
def test_functions_become_their_instructions(text, tmp_path):
    cubin = compile_probe(text)
    resources = parse_resources(cubin.report)
    assert resources.num_registers > 0
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    sass = disassembly(cubin.code, tmp_path)
    if sass is not None:
        assert [name for name in INSTRUCTIONS[text] if not re.search(rf"{re.escape(name)}(?![0-9A-Za-z])", sass)] == []


def test_every_function_is_probed():
    names = set()
    for path in FOLDER.glob("*.cuh"):
        names |= set(re.findall(r"__forceinline__ \w[\w ]*[ *]([a-z]\w+)\(", path.read_text()))
    probed = COPIES + THREADS + MULTIPLY
    used = {name for name in names if re.search(rf"\b{name}[<(]", probed)}
    # Helpers of the others, and what other kernels' tests launch.
    assert names - used <= {
        "shared_address",
        "global_address",
        "try_wait_barrier",
        "wait_for_previous_kernel",
        "allow_next_kernel",
    }


@pytest.mark.parametrize("name", HEADERS)
def test_each_header_is_small_and_names_its_section(name):
    text = (FOLDER / name).read_text()
    assert text.count("\n") <= 130
    comment = text.partition("#pragma once")[0].replace("\n//", "")
    assert re.search(r'PTX ISA[^"]*, sections? "[A-Z]', comment), comment


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", HEADERS)
def test_each_header_stands_alone(name, arch):
    text = f'#include "fi/ptx/{name}"\nextern "C" __global__ void probe(int* out) {{ *out = 1; }}\n'
    assert compile_cubin(text, "probe", CompileTarget(arch), [INCLUDE_FOLDER]).code.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("float c[3]; wgmma_ss<__half, 6>(c, 1, 1, true);", "kN % 8 == 0"),
        ("float c[132]; wgmma_ss<__half, 264>(c, 1, 1, true);", "kN <= 256"),
        ("float c[4]; wgmma_ss<__nv_fp8_e4m3, 8, Major::kK, Major::kMN>(c, 1, 1, true);", "8-bit operands are K-major"),
        ("out[0] = k_major_descriptor<16>(0);", "kSwizzleBytes == 32"),
    ],
)
def test_what_the_hardware_lacks_does_not_compile(call, message):
    with pytest.raises(CompileError, match=re.escape(message)):
        compile_probe(f'extern "C" __global__ void probe(float* out) {{ {call} }}\n')
