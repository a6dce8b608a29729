"""Files, functions and parameter lists stay small; an exemption is one name with its reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
"""Of a Triton kernel and of a C++ function on the device."""
MAX_PARAMETERS = 8

SOURCES = ("packages", "integrations", "examples", "benchmarks", "tests", "noxfile.py")
SUFFIXES = {".py", ".h", ".hpp", ".cuh", ".cu", ".cpp"}

COMMENT_OR_LITERAL = re.compile(
    r"^\s*#[^\n]*|//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.DOTALL | re.MULTILINE
)
DEVICE_FUNCTION = re.compile(
    r"\b(?:__device__|__global__|FI_HOST_DEVICE)\b[^;{}=]*?(?P<name>\w+)\s*\([^;{}]*\)[^;{}()]*\{"
)

_VLLMS_OWN = "vLLM calls it, with these parameters"
_CAPACITIES = "a keyword for each capacity"
EXEMPT: dict[str, str] = {
    "integrations/vllm/src/fi_vllm/impl.py:__init__": _VLLMS_OWN,
    "integrations/vllm/src/fi_vllm/impl.py:forward": _VLLMS_OWN,
    "packages/fi-core/src/fi_core/plan.py:plan": _CAPACITIES,
    "packages/fi-core/src/fi_core/plan.py:workspace_bytes": _CAPACITIES,
}
"""\"path\" or \"path:function\" -> why it may exceed a budget."""


def source_files(root: Path) -> list[Path]:
    found = []
    for name in SOURCES:
        top = root / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            parts = path.relative_to(root).parts
            hidden = any(part.startswith(".") or part in ("build", "dist", "__pycache__") for part in parts)
            if path.suffix in SUFFIXES and not hidden:
                found.append(path)
    return found


def is_triton_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A @triton.jit (or @jit) function: its parameters are the kernel's ABI, one a pointer, stride or constant."""
    called = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return "jit" in {getattr(item, "attr", getattr(item, "id", "")) for item in called}


def device_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, number of lines) of each function that C++ source defines for the device."""
    # Comments, literals and macros may hold braces or keywords; what replaces them keeps the lines.
    code = COMMENT_OR_LITERAL.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in DEVICE_FUNCTION.finditer(code):
        depth, end = 1, found.end()
        while depth and end < len(code):
            depth += {"{": 1, "}": -1}.get(code[end], 0)
            end += 1
        yield found["name"], code.count("\n", 0, found.start()) + 1, code.count("\n", found.start(), end) + 1


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls"))


def excesses(root: Path) -> Iterator[tuple[str, str]]:
    """(exemptible name, what exceeds which budget) of every file under ``root``."""
    for path in source_files(root):
        name, text = str(path.relative_to(root)), path.read_text()
        num_lines = text.count("\n")
        if num_lines > MAX_FILE_LINES:
            yield name, f"{name}: {num_lines} lines, at most {MAX_FILE_LINES}"
        if path.suffix != ".py":
            for function, line, length in device_functions(text):
                if length > MAX_KERNEL_LINES:
                    exceeds = f"{length} lines, at most {MAX_KERNEL_LINES}"
                    yield f"{name}:{function}", f"{name}:{line} {function}: {exceeds}"
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            exemptible, where = f"{name}:{node.name}", f"{name}:{node.lineno} {node.name}"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = is_triton_kernel(node)
            most = MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES
            if length > most:
                yield exemptible, f"{where}: {length} lines, at most {most}"
            if num_parameters(node) > MAX_PARAMETERS and not kernel:
                yield exemptible, f"{where}: {num_parameters(node)} parameters, at most {MAX_PARAMETERS}"


def test_everything_is_within_its_budget():
    assert [text for name, text in excesses(ROOT) if name not in EXEMPT] == []


def test_every_exemption_is_needed_and_has_a_reason():
    exceeding = {name for name, _ in excesses(ROOT)}
    assert set(EXEMPT) <= exceeding
    assert all(len(reason) > 10 for reason in EXEMPT.values())


def test_each_kind_of_excess_is_found(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    names = ", ".join(f"a{i}" for i in range(MAX_PARAMETERS + 1))
    body = "    pass\n" * MAX_FUNCTION_LINES
    (folder / "long.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    (folder / "long.cuh").write_text("// x\n" * (MAX_FILE_LINES + 1))
    kernel = f"@triton.jit(debug=True)\ndef kernel({names}):\n{body}"
    lines = "  x = 1; // }\n" * MAX_KERNEL_LINES
    (folder / "kernels.cuh").write_text(
        f"template <class T>\n__device__ __forceinline__ void deep(T x) {{\n{lines}}}\n"
        f"inline void host() {{\n{lines}}}\n__device__ int declared(int x);\n__global__ void flat(int x) {{ x = '{{'; }}\n"
    )
    (folder / "wide.py").write_text(f"def wide({names}):\n    pass\n\n\n{kernel}")
    (folder / "kernel.py").write_text(f"@jit\ndef kernel():\n{body * 2}")
    (folder / "tall.py").write_text(f"class A:\n    async def tall(self):\n{body.replace('    pass', '        pass')}")
    (folder / "fits.py").write_text(
        f"def fits(self, {names.removesuffix(', a8')}):\n{body.removesuffix('    pass' + chr(10))}"
    )
    found = sorted(name for name, _ in excesses(tmp_path))
    assert found == [
        "packages/kernel.py:kernel",
        "packages/kernels.cuh:deep",
        "packages/long.cuh",
        "packages/long.py",
        "packages/tall.py:tall",
        "packages/wide.py:wide",
    ]
