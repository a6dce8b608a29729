"""Packing a folder of kernels as a wheel (the binary distribution format of PyPA) whose entry point is a plugin."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from . import __version__

_MODULE = '''"""Kernels of fi-cuda {version} for {arch}, compiled ahead of time."""

from pathlib import Path

from fi_cuda.aot import AotFolder

plugin = AotFolder(Path(__file__).parent / "kernels")
'''

_METADATA = """\
Metadata-Version: 2.1
Name: {distribution}
Version: {version}
Summary: Kernels of fi-cuda {version} for {arch}, compiled ahead of time
License: Apache-2.0
Requires-Python: >=3.11
Requires-Dist: fi-cuda=={version}
"""

_WHEEL = """\
Wheel-Version: 1.0
Generator: fi-cuda {version}
Root-Is-Purelib: true
Tag: py3-none-any
"""

_ENTRY_POINTS = "[fi]\n{distribution} = {package}:plugin\n"


def pack_wheel(kernels: Path, arch: str, folder: Path) -> Path:
    """Write ``fi_cuda_kernels_<arch>-<version>-py3-none-any.whl`` with the folder ``kernels`` into ``folder`` (made if
    absent) and return its path. The same kernels give the same bytes."""
    package = f"fi_cuda_kernels_{arch.replace('_', '')}"
    words = {
        "version": __version__,
        "arch": arch,
        "package": package,
        "distribution": package.replace("_", "-"),
    }
    contents = {f"{package}/__init__.py": _MODULE.format(**words).encode()}
    for path in sorted(kernels.rglob("*")):
        if path.is_file():
            contents[f"{package}/kernels/{path.relative_to(kernels).as_posix()}"] = path.read_bytes()
    info = f"{package}-{__version__}.dist-info"
    for name, text in (("METADATA", _METADATA), ("WHEEL", _WHEEL), ("entry_points.txt", _ENTRY_POINTS)):
        contents[f"{info}/{name}"] = text.format(**words).encode()
    contents[f"{info}/RECORD"] = _record(contents, f"{info}/RECORD")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)  # whose time is fixed, unlike a file's
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel


def _record(contents: dict[str, bytes], own_name: str) -> bytes:
    """One line a file: name, SHA-256 in unpadded URL-safe base64, size; none of the last two for the record itself."""
    lines = []
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own_name},,\n"]).encode()
