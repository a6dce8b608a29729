"""Running the kernels without a GPU: is Triton's interpreter on, and a shim that gives it correct bf16 and FP8.

Triton 3.6's interpreter keeps bf16 as raw 16-bit patterns: a dot product or an addition of bf16 values works on the
patterns, and casts to bf16 and FP8 truncate. The shim rounds to nearest even (FP8 saturates, like the hardware's
``cvt.rn.satfinite``), widens bf16 operands of a dot, and makes any other arithmetic on bf16 an error.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET`` asks Triton to interpret kernels; imports nothing of Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "y", "yes", "true")


def kernel_devices() -> tuple[str, ...]:
    """Device types that the kernels of this process serve: the interpreter also takes CPU tensors."""
    return ("cuda", "cpu") if interpreting() else ("cuda",)


@lru_cache(maxsize=1)
def prepare_interpreter() -> None:
    """Install the shim if this process interprets; every kernel entry calls it before it loads its kernel."""
    if interpreting():
        from triton.runtime import interpreter

        _install(interpreter)


def _install(module: Any) -> None:
    """Wrap the methods of Triton's InterpreterBuilder that are wrong for bf16 and FP8."""
    import triton.language as tl

    builder, handle = module.InterpreterBuilder, module.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widen(value: Any) -> Any:
        return _from_bf16(value, handle, tl) if value.dtype.scalar == tl.bfloat16 else value

    def cast(self: Any, source: Any, target: Any) -> Any:
        kind, wide = target.scalar, _from_fp8(widen(source), handle, tl)
        if kind not in (tl.bfloat16, tl.float8e4nv, tl.float8e5):
            return plain_cast(self, wide, target)
        return handle(_round(plain_cast(self, wide, tl.float32).data, kind, tl), kind)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        return cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), d, *options)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = dot, cast, fp_to_fp
    for name in ("binary_op", "unary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt", "create_clampf"):
        setattr(builder, name, _refusing_bf16(getattr(builder, name), handle, tl))


def _refusing_bf16(plain: Any, handle: Any, tl: Any) -> Any:
    def checked(self: Any, *operands: Any) -> Any:
        if any(isinstance(item, handle) and item.dtype.scalar == tl.bfloat16 for item in operands):
            raise TypeError(
                "arithmetic on bf16 operands: the interpreter would compute on bit patterns; cast to float32"
            )
        return plain(self, *operands)

    return checked


def _from_bf16(value: Any, handle: Any, tl: Any) -> Any:
    import numpy

    return handle((value.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)


def _from_fp8(value: Any, handle: Any, tl: Any) -> Any:
    if value.dtype.scalar not in (tl.float8e4nv, tl.float8e5):
        return value
    import torch

    dtype = torch.float8_e4m3fn if value.dtype.scalar == tl.float8e4nv else torch.float8_e5m2
    wide = torch.from_numpy(value.data.copy()).view(dtype).to(torch.float32).numpy()
    return handle(wide, tl.float32)


def _round(data: Any, kind: Any, tl: Any) -> Any:
    """float32 array -> bit patterns of ``kind``, to nearest even; FP8 saturates at its largest finite value."""
    import numpy
    import torch

    values = torch.from_numpy(numpy.array(data, dtype=numpy.float32))
    if kind == tl.bfloat16:
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(numpy.uint16)
    dtype = torch.float8_e4m3fn if kind == tl.float8e4nv else torch.float8_e5m2
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
