"""A process whose threads all compile first: loading cuda.core and NVRTC is safe then too."""

import subprocess
import sys

SCRIPT = """
from concurrent.futures import ThreadPoolExecutor
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import compile_cubin

def compile_one(number):
    text = f'extern "C" __global__ void scale(float* x) {{ x[threadIdx.x] *= {number}.0f; }}'
    return compile_cubin(text, "scale", CompileTarget()).code

with ThreadPoolExecutor(8) as pool:
    assert len(set(pool.map(compile_one, range(2, 10)))) == 8
"""


def test_threads_may_compile_first():
    for _ in range(5):
        subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=100)
