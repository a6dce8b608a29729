"""Running conformance cases on the kernels of a backend."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..contract import Case, KernelEntry, Operation, Trial, target_of
from ..devices import normal_device
from ..errors import ArgumentError, FiError
from ..registry import registry
from .compare import Comparison, compare
from .report import CaseResult, Outcome, Report


@dataclass(frozen=True)
class BoundCase:
    """A case with what it takes to run it: the unit of ``run`` and of ``parametrize``. Calling it raises AssertionError
    with the failure's text."""

    operation: Operation
    case: Case
    kernel: KernelEntry
    device: torch.device
    seed: int

    @property
    def name(self) -> str:
        return f"{self.operation.name}/{self.case.name}[{self.kernel.full_name}]"

    def __call__(self) -> None:
        result = self.result()
        if result.outcome == "failed":
            raise AssertionError(f"{result}")

    def result(self) -> CaseResult:
        """Build the case, run the kernel on poisoned outputs, and compare every output with the oracle's."""
        try:
            comparisons = self._compare()
        except FiError as error:
            return self.failed(f"{type(error).__name__}: {error}")
        except Exception:  # noqa: BLE001 - whatever a foreign kernel raises is this case's failure, not the run's
            return self.failed(traceback.format_exc())
        messages = [f"{name}: {item.message}" for name, item in comparisons.items() if item.message is not None]
        return self._result("failed" if messages else "passed", "\n".join(messages), comparisons)

    def _compare(self) -> dict[str, Comparison]:
        implementation = registry().implementation(self.kernel)
        trial: Trial = self.case.build(self.device, self.seed)
        actual = trial.run(implementation)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        expected = trial.expected()
        if not set(actual) == set(expected) == set(trial.tolerance):
            names = f"run {sorted(actual)}, expected {sorted(expected)}, tolerance {sorted(trial.tolerance)}"
            raise ArgumentError(f"case {self.operation.name}/{self.case.name}", "the same outputs everywhere", names)
        return {name: compare(actual[name], expected[name], limit) for name, limit in trial.tolerance.items()}

    def failed(self, message: str) -> CaseResult:
        """The result of a run that came to no end."""
        return self._result("failed", message, {})

    def _result(self, outcome: Outcome, message: str, comparisons: dict[str, Comparison]) -> CaseResult:
        rel_rmse = {name: item.rel_rmse for name, item in comparisons.items()}
        max_error = {name: item.max_error for name, item in comparisons.items()}
        names = (self.operation.name, self.case.name, self.kernel.full_name)
        return CaseResult(*names, outcome, message, self.seed, rel_rmse, max_error)


def bound_cases(
    backend: str,
    ops: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    cases: str | None = None,
    seed: int = 0,
    include_large: bool = False,
) -> Iterator[BoundCase | CaseResult]:
    """The cases of the operations named (None: all) whose "operation/case" contains ``cases``, once for every kernel of
    ``backend`` that serves them; every kernel is tried, not only the one that selection would prefer.

    A case that none serves is an "unsupported" result with the reasons of each kernel; a generator of cases that raises,
    and a case whose values are not those of a request, are "failed" results beside the other cases. Cases tagged "large"
    need several GB: they are left out unless ``include_large`` is set and the device is CUDA.
    """
    registry().require_backend(backend)
    device = normal_device(device)
    for operation in _operations(ops):
        found, failure = _cases_of(operation)
        for case in found:
            large = "large" in case.tags and not (include_large and device.type == "cuda")
            if not large and (cases is None or cases in f"{operation.name}/{case.name}"):
                yield from _bound(backend, operation, case, device, seed)
        if failure is not None:
            yield CaseResult(operation.name, "cases()", backend, "failed", failure, seed, {}, {})


def _operations(names: Sequence[str] | None) -> list[Operation]:
    operations = registry().operations
    unknown = [name for name in names or () if name not in operations]
    if unknown:
        raise ArgumentError("ops", f"operations among {sorted(operations)}", unknown)
    return [operation for name, operation in operations.items() if names is None or name in names]


def _cases_of(operation: Operation) -> tuple[list[Case], str | None]:
    """The operation's cases, and what their generator raised, if it did, after them."""
    found: list[Case] = []
    try:
        for case in operation.cases():
            found.append(case)
    except Exception:  # noqa: BLE001 - a plugin's generator may raise anything; the other operations go on
        return found, traceback.format_exc()
    return found, None


def _bound(
    backend: str, operation: Operation, case: Case, device: torch.device, seed: int
) -> Iterator[BoundCase | CaseResult]:
    """One case on every kernel of the backend that serves it."""

    def unbound(outcome: Outcome, message: str) -> CaseResult:
        return CaseResult(operation.name, case.name, backend, outcome, message, seed, {}, {})

    try:
        request = operation.request(target_of(device), **case.values)
    except FiError as error:
        yield unbound("failed", f"{type(error).__name__}: {error}")
        return
    entries = [entry for entry in registry().kernels(operation.name) if entry.backend == backend]
    rejections = {entry.full_name: entry.reject(request) for entry in entries}
    serving = [entry for entry in entries if not rejections[entry.full_name]]
    for entry in serving:
        yield BoundCase(operation, case, entry, device, seed)
    if not serving:
        reasons = [f"{kernel}: {'; '.join(texts)}" for kernel, texts in rejections.items()]
        yield unbound("unsupported", "\n".join(reasons) or f"{backend} has no kernel for {operation.name}")


def run(
    backend: str,
    ops: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    cases: str | None = None,
    seed: int = 0,
    include_large: bool = False,
    jobs: int = 1,
) -> Report:
    """Run the conformance cases of ``ops`` (None: every operation) on every kernel of ``backend`` on ``device``.

    ``cases`` keeps those whose "operation/case" contains it; ``seed`` feeds every case's random inputs;
    ``include_large`` adds cases that need several GB (CUDA only); ``jobs`` processes share the cases, whose results stay
    in order (see ``results_of_processes``). A kernel that raises fails its case. A report in which nothing was executed
    is not ok. Raises UnknownBackendError, and ArgumentError for an unknown operation or device.
    """
    if jobs < 1:
        raise ArgumentError("jobs", "at least 1", jobs)
    selection = (backend, ops, device, cases, seed, include_large)
    if jobs == 1:
        results = [item if isinstance(item, CaseResult) else item.result() for item in bound_cases(*selection)]
    else:
        from .processes import results_of_processes

        results = results_of_processes(selection, jobs)
    return Report(backend, str(device), tuple(results))
