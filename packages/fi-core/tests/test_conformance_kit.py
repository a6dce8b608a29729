"""The conformance kit: what passes, what fails and how the failure reads; reports; use without pytest."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fi_core as fi
import pytest
import torch
from fi_core import conformance
from fi_core.conformance import BoundCase, CaseResult, compare
from fi_core.contract import EXACT, Case, KernelEntry, OneOf, Operation, Tolerance, Trial
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.ops.cases import SENTINEL, guarded, poisoned
from fi_core.registry import KernelRegistry, reset_registry

NAN, INF = float("nan"), float("inf")
LOOSE = Tolerance(1e-2, 1e-1)


def _judge(actual: list[float], expected: list[float], tolerance: Tolerance) -> conformance.Comparison:
    return compare(torch.tensor(actual), torch.tensor(expected, dtype=torch.float64), tolerance)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([1.0, 2.0], [1.0, 2.0]), ([1.0, INF, -INF], [1.001, INF, -INF]), ([], []), ([0.0], [0.0])],
)
def test_compare_passes(actual: list[float], expected: list[float]) -> None:
    assert _judge(actual, expected, LOOSE).message is None


@pytest.mark.parametrize(
    ("actual", "expected", "index"),
    [
        ([1.0, NAN], [1.0, 2.0], 1),
        ([NAN, 1.0], [NAN, 1.0], 0),
        ([1.0, 2.0], [1.0, NAN], 1),
        ([1.0, INF], [1.0, -INF], 1),
        ([1.0, INF], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, INF], 1),
        ([1.0, 2.5], [1.0, 2.0], 1),
        ([0.05], [0.0], 0),
    ],
)
def test_compare_fails_at_the_first_bad_index(actual: list[float], expected: list[float], index: int) -> None:
    found = _judge(actual, expected, LOOSE)
    assert not found.passed
    assert f"first bad at ({index},)" in (found.message or "")


def test_compare_names_values_and_errors() -> None:
    actual = torch.zeros(2, 3, 4)
    actual[1, 2, 3], actual[1, 0, 0] = 2.0, 0.5
    found = compare(actual, torch.zeros(2, 3, 4, dtype=torch.float64), LOOSE)
    assert found.max_error == 2.0
    assert found.rel_rmse == INF
    for text in ("first bad at (1, 0, 0): actual 0.5, expected 0.0", "2 of 24 bad", "max error 2"):
        assert text in (found.message or "")


def test_compare_limits_the_rmse_by_itself() -> None:
    expected = torch.ones(1000, dtype=torch.float64)
    found = compare(expected + 0.05, expected, LOOSE)
    assert "rel_rmse <= 0.01" in (found.message or "")
    assert found.rel_rmse == pytest.approx(0.05)
    assert compare(expected + 0.005, expected, LOOSE).passed


def test_largest_error_is_relative_to_the_rms_when_that_is_above_one() -> None:
    expected = torch.full((1000,), 100.0, dtype=torch.float64)
    actual = expected.clone()
    actual[7] += 9.0
    assert compare(actual, expected, LOOSE).passed
    actual[7] += 2.0
    assert not compare(actual, expected, LOOSE).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_exact_compares_bits_after_a_cast(dtype: torch.dtype) -> None:
    expected = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    assert compare(expected.to(dtype), expected, EXACT).passed
    off = expected.clone()
    off[2] = -1.75 if dtype.is_floating_point else -3.0
    assert "first bad at (2,)" in (compare(off.to(dtype), expected, EXACT).message or "")


def test_exact_knows_signed_zeros_and_kept_poison() -> None:
    assert not _judge([0.0], [-0.0], EXACT).passed
    poison = poisoned((2, 2), torch.bfloat16, torch.device("cpu"))
    assert compare(poison, poison.clone(), EXACT).passed
    assert not compare(torch.ones_like(poison), poison, EXACT).passed


def test_compare_refuses_another_shape() -> None:
    found = compare(torch.zeros(2, 1), torch.zeros(2), LOOSE)
    assert found.message == "shape (2, 1), expected (2,)"


def test_poison_and_guards() -> None:
    cpu = torch.device("cpu")
    assert poisoned((3,), torch.float8_e4m3fn, cpu).float().isnan().all()
    assert poisoned((3,), torch.int32, cpu).tolist() == [SENTINEL] * 3
    assert poisoned((3,), torch.uint8, cpu).tolist() == [0xA5] * 3
    held = guarded((2, 3), torch.float32, cpu, before=1, after=2, content=torch.ones(2, 3))
    assert held.base.shape == (4, 6)
    assert held.view.storage_offset() == 7
    untouched = held.rest()
    assert untouched.isnan().sum() == 24 - 6
    held.view.zero_()
    assert compare(held.rest(), untouched, EXACT).passed
    held.base[1, 4] = 0.0
    assert not compare(held.rest(), untouched, EXACT).passed


def _case(name: str, size: int = 4, tags: frozenset[str] = frozenset(), keys: tuple[str, ...] = ("out",)) -> Case:
    def build(device: torch.device, seed: int) -> Trial:
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)

        def run(kernel: Any) -> Mapping[str, torch.Tensor]:
            out = poisoned((size,), torch.float32, device)
            kernel(x, out)
            return dict.fromkeys(keys, out)

        return Trial(run, lambda: {"out": 2.0 * x.double()}, {"out": Tolerance(1e-6, 1e-6)})

    return Case(name, {"size": size}, build, tags)


CASES = [_case("four"), _case("five", 5), _case("huge", 4, frozenset({"large"}))]
TOY = Operation("toy", "doubles", {"size": "s"}, {"size": 4}, lambda: iter(CASES))


def _double(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, x, out=out)


def _forgets_the_last(x: torch.Tensor, out: torch.Tensor) -> None:
    _double(x[:-1], out[:-1])


def _raises(x: torch.Tensor, out: torch.Tensor) -> None:
    raise ZeroDivisionError("inside the kernel")


def _refuses(x: torch.Tensor, out: torch.Tensor) -> None:
    raise fi.ArgumentError("x", "a better day", "this one")


def _plugin(name: str, *kernels: Callable[..., None], rule: object = OneOf(4, 5)) -> types.SimpleNamespace:
    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo(name, "1.0", "s", 1)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        for kernel in kernels:
            entry = KernelEntry("toy", kernel.__name__, name, {"size": rule}, lambda kernel=kernel: kernel, ("cpu",))
            registry.add(entry)

    return types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelRegistry]:
    made = KernelRegistry([TOY])
    monkeypatch.setattr(importlib.import_module("fi_core.registry"), "_registry", made)
    made.register_plugin(_plugin("good", _double), "good")
    made.register_plugin(_plugin("bad", _forgets_the_last, _raises, _refuses), "bad")
    made.register_plugin(_plugin("narrow", _double, rule=OneOf(5)), "narrow")
    made.register_plugin(_plugin("empty"), "empty")
    yield made
    monkeypatch.undo()


def test_a_good_backend_passes(current: KernelRegistry) -> None:
    report = conformance.run("good")
    assert report.ok
    assert [(item.name, item.outcome) for item in report.results] == [("toy/four", "passed"), ("toy/five", "passed")]
    assert str(report) == "good on cpu: 2 passed, 0 failed, 0 unsupported"


def test_every_kernel_of_a_bad_backend_fails_in_its_own_words(current: KernelRegistry) -> None:
    report = conformance.run("bad", cases="four", seed=9)
    assert not report.ok
    found = {item.kernel: item for item in report.results}
    assert {item.outcome for item in report.results} == {"failed"}
    assert "out: first bad at (3,): actual nan" in found["bad._forgets_the_last"].message
    assert "Traceback" in found["bad._raises"].message
    assert "ZeroDivisionError: inside the kernel" in found["bad._raises"].message
    assert found["bad._refuses"].message == "ArgumentError: x: expected a better day, got this one"
    assert all(item.seed == 9 for item in report.results)
    assert "(seed 9)" in str(report)


def test_unsupported_cases_keep_their_reasons(current: KernelRegistry) -> None:
    report = conformance.run("narrow")
    assert [item.outcome for item in report.results] == ["unsupported", "passed"]
    assert report.results[0].message == "narrow._double: size: 4 is not one of 5"
    assert report.ok


@pytest.mark.parametrize(("backend", "case"), [("narrow", "four"), ("good", "no such case"), ("empty", None)])
def test_nothing_executed_is_a_failure(current: KernelRegistry, backend: str, case: str | None) -> None:
    report = conformance.run(backend, cases=case)
    assert report.num_executed == 0
    assert not report.ok
    assert "no case was executed" in str(report)


def test_large_cases_need_a_gpu_and_consent(current: KernelRegistry) -> None:
    names = [item.case for item in conformance.run("good", include_large=True).results]
    assert names == ["four", "five"]


def test_unknown_names_are_refused(current: KernelRegistry) -> None:
    with pytest.raises(fi.UnknownBackendError, match="nope"):
        conformance.run("nope")
    with pytest.raises(fi.ArgumentError, match="nope"):
        conformance.run("good", ["nope"])
    with pytest.raises(fi.ArgumentError, match="^device:.*toaster"):
        conformance.run("good", device="toaster")


def test_a_case_whose_outputs_do_not_agree_fails(current: KernelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CASES", [_case("odd", keys=("out", "more"))])
    (result,) = conformance.run("good").results
    assert result.outcome == "failed"
    assert "the same outputs everywhere" in result.message


def _broken_generator() -> Iterator[Case]:
    yield _case("four")
    raise RuntimeError("no more")


def _case_of_another_operation() -> Iterator[Case]:
    yield Case("stranger", {"colour": 4}, _case("x").build)
    yield _case("four")


@pytest.mark.parametrize(
    ("cases", "failed", "words"),
    [
        (_broken_generator, "cases()", "RuntimeError: no more"),
        (_case_of_another_operation, "stranger", "request fields ['colour'] are not ['size']"),
    ],
)
def test_cases_that_cannot_be_made_fail_alone(
    current: KernelRegistry, monkeypatch: pytest.MonkeyPatch, cases: Any, failed: str, words: str
) -> None:
    monkeypatch.setitem(current.operations, "toy", dataclasses.replace(TOY, cases=cases))
    monkeypatch.setitem(current.operations, "more", dataclasses.replace(TOY, name="more"))
    report = conformance.run("good", ["toy", "more"])
    outcomes = {item.name: item.outcome for item in report.results}
    assert outcomes == {
        "toy/four": "passed",
        f"toy/{failed}": "failed",
        "more/four": "unsupported",
        "more/five": "unsupported",
    }
    assert words in next(item.message for item in report.results if item.outcome == "failed")
    assert not report.ok
    with pytest.raises(fi.PluginError, match=re.escape(words)):
        conformance.parametrize("good", ["toy"])


@pytest.mark.parametrize("jobs", [0, -2])
def test_jobs_must_be_positive(current: KernelRegistry, jobs: int) -> None:
    with pytest.raises(fi.ArgumentError, match="jobs"):
        conformance.run("good", jobs=jobs)


def test_processes_give_the_same_report_in_the_same_order() -> None:
    selection = ("reference", ["rmsnorm", "top_k"], "cpu", None, 3)
    alone, shared = conformance.run(*selection), conformance.run(*selection, jobs=2)
    assert shared.to_json() == alone.to_json()
    assert shared.num_executed > 10


def test_processes_without_the_plugin_fail_every_case(current: KernelRegistry) -> None:
    report = conformance.run("good", jobs=2)
    assert [(item.name, item.outcome) for item in report.results] == [("toy/four", "failed"), ("toy/five", "failed")]
    assert "UnknownBackendError: unknown backend 'good'" in report.results[0].message


def test_a_process_that_dies_fails_what_it_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "dying-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[fi]\ndying = dying_plugin\n")
    (tmp_path / "dying_plugin.py").write_text(
        "import os\n"
        "from fi_core import Anything, BackendInfo, KernelEntry, hookimpl\n"
        "fi_backend = hookimpl(lambda: BackendInfo('dying', '1.0', 's', 1), specname='fi_backend')\n"
        "@hookimpl\n"
        "def fi_register_kernels(registry):\n"
        "    rules = {'dtype': Anything(), 'width': Anything()}\n"
        "    registry.add(KernelEntry('silu_mul', 'k', 'dying', rules, lambda: lambda *a: os._exit(3), ('cpu',)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reset_registry()
    try:
        report = conformance.run("dying", ["silu_mul"], jobs=2)
    finally:
        monkeypatch.undo()
        reset_registry()
    assert len(report.results) > 3
    assert {item.outcome for item in report.results} == {"failed"}
    assert all("BrokenProcessPool" in item.message for item in report.results)


def test_json(current: KernelRegistry) -> None:
    document = json.loads(conformance.run("bad", cases="four").to_json())
    assert document["ok"] is False
    assert document["counts"] == {"passed": 0, "failed": 3, "unsupported": 0}
    assert {item["kernel"] for item in document["results"]} == {"bad._forgets_the_last", "bad._raises", "bad._refuses"}
    infinite = CaseResult("toy", "c", "k", "failed", "m", 0, {"out": INF}, {"out": 1.0})
    plain = json.loads(conformance.Report("b", "cpu", (infinite,)).to_json())
    assert plain["results"][0]["rel_rmse"] == {"out": "inf"}


def test_parametrize_binds_one_parameter_a_kernel_and_case(current: KernelRegistry) -> None:
    mark = conformance.parametrize("bad", cases="four")
    name, parameters = mark.args
    assert name == "case"
    assert mark.kwargs["ids"] == [
        "toy/four[bad._forgets_the_last]",
        "toy/four[bad._raises]",
        "toy/four[bad._refuses]",
    ]
    assert all(isinstance(item, BoundCase) for item in parameters)
    with pytest.raises(AssertionError, match=r"first bad at \(3,\)"):
        parameters[0]()
    with pytest.raises(fi.ArgumentError, match="narrow"):
        conformance.parametrize("narrow", cases="four")


def test_the_kit_runs_without_pytest() -> None:
    script = (
        "import sys; sys.modules['pytest'] = None\n"
        "from fi_core import conformance\n"
        "report = conformance.run('reference', ['rmsnorm'], cases='plain')\n"
        "sys.exit(0 if report.ok and len(report.results) == 4 else 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
