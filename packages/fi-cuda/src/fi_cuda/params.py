"""A kernel's parameters: one field list gives the C++ struct of the generated glue and packs it from Python; beside it,
tensor maps."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

KINDS = {
    "pointer": ("const void*", "P"),
    "output": ("void*", "P"),
    "int32": ("int", "i"),
    "int64": ("long long", "q"),
    "float": ("float", "f"),
    "rows": ("fi::RowStrides", "qq"),
}
"""C++ type and struct codes of each kind of field; "rows" (``fi/tile/rows.cuh``) takes two values, outer and inner.
Every scalar is aligned to its own size, on both sides."""

_MAP_BYTES = 128


@dataclass(frozen=True)
class ParamsLayout:
    """The struct ``Params`` with ``fields``: (name, kind)."""

    fields: tuple[tuple[str, str], ...]

    @cached_property
    def packer(self) -> struct.Struct:
        """Packs one value a field (two for "rows"), padded to the alignment of a pointer as C++ does."""
        return struct.Struct("@" + "".join(KINDS[kind][1] for _, kind in self.fields) + "0P")

    def declaration(self) -> Sequence[str]:
        """C++ lines that declare ``Params``: neighbours of one type share a line."""
        lines: list[str] = []
        previous = ""
        for name, kind in self.fields:
            cpp_type = KINDS[kind][0]
            separator = "*" if cpp_type.endswith("*") else " "
            if kind == previous:
                lines[-1] = lines[-1][:-1] + f",{separator}{name};"
            else:
                lines.append(f"  {cpp_type} {name};")
            previous = kind
        size = f"static_assert(sizeof(Params) == {self.packer.size});"
        return ["struct Params {", *lines, "};", size]


class TensorMap:
    """A tensor map on the host (``tensor_map.py`` makes and keeps them): a kernel parameter by value. The driver writes
    its 128 bytes at ``address`` when it encodes and copies them when it launches."""

    __slots__ = ("_storage", "address")

    def __init__(self) -> None:
        # The driver wants the address a multiple of 128, which objects of cuda.bindings are not.
        self._storage = ctypes.create_string_buffer(2 * _MAP_BYTES)
        self.address = -(-ctypes.addressof(self._storage) // _MAP_BYTES) * _MAP_BYTES
