"""The machine-checked contract: requests, support rules, kernel entries, operations and conformance cases."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch

from .devices import normal_device
from .errors import PluginError


@dataclass(frozen=True)
class Target:
    """Where a kernel is to run: a device type and, for CUDA, the compute capability."""

    device_type: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return (
            self.device_type
            if self.capability is None
            else f"{self.device_type} sm_{self.capability[0]}{self.capability[1]}"
        )


@lru_cache(maxsize=64)
def _target(device_type: str, index: int | None) -> Target:
    if device_type != "cuda":
        return Target(device_type)
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", (major, minor))


def target_of(device: torch.device | str) -> Target:
    """The target of a torch device; asks the driver once per device."""
    device = normal_device(device)
    return _target(device.type, device.index)


@dataclass(frozen=True)
class Request:
    """What a call needs of a kernel: an operation, a target, and a value for every field of the operation."""

    op: str
    target: Target
    values: tuple[tuple[str, Hashable], ...]

    @classmethod
    def of(cls, op: str, target: Target, **values: Hashable) -> Request:
        return cls(op, target, tuple(sorted(values.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.values)[name]

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self.values)
        return f"{self.op}({shown}) on {self.target}"


def _show(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return repr(value)


class Rule(Protocol):
    """A declared limit on one request field."""

    def reject(self, value: Any) -> str | None:
        """Why ``value`` is not served, or None when it is."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Anything:
    """Every value is served."""

    def reject(self, value: Any) -> str | None:
        return None

    def __str__(self) -> str:
        return "any"


@dataclass(frozen=True)
class OneOf:
    """One of the listed values."""

    allowed: tuple[Hashable, ...]

    def __init__(self, *allowed: Hashable) -> None:
        object.__setattr__(self, "allowed", allowed)

    def reject(self, value: Any) -> str | None:
        return None if value in self.allowed else f"{_show(value)} is not one of {self}"

    def __str__(self) -> str:
        return ", ".join(_show(value) for value in self.allowed)


@dataclass(frozen=True)
class SubsetOf:
    """A set-valued (or tuple-valued) field whose members are all listed."""

    allowed: tuple[Hashable, ...]

    def __init__(self, *allowed: Hashable) -> None:
        object.__setattr__(self, "allowed", allowed)

    def reject(self, value: Any) -> str | None:
        extra = [item for item in value if item not in self.allowed]
        return f"{', '.join(sorted(map(_show, extra)))} not among {self}" if extra else None

    def __str__(self) -> str:
        return ", ".join(_show(value) for value in self.allowed) or "none"


@dataclass(frozen=True)
class Between:
    """An integer from ``low`` to ``high`` (None: no upper limit) that is a multiple of ``multiple_of``."""

    low: int
    high: int | None = None
    multiple_of: int = 1

    def reject(self, value: Any) -> str | None:
        within = value is not None and value >= self.low and (self.high is None or value <= self.high)
        return None if within and value % self.multiple_of == 0 else f"{_show(value)} is not {self}"

    def __str__(self) -> str:
        limit = f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"
        return limit if self.multiple_of == 1 else f"{limit}, multiples of {self.multiple_of}"


@dataclass(frozen=True)
class Condition:
    """A limit that involves several fields: ``holds(request)`` must be true; ``text`` states it."""

    text: str
    holds: Callable[[Request], bool]


@dataclass(frozen=True)
class KernelEntry:
    """One kernel family of a backend and the machine-readable statement of what it serves.

    ``rules`` has exactly the fields of the operation: a kernel that does not know a field cannot silently ignore it.
    ``load()`` imports and returns the implementation (its protocol is in ``fi_core.protocols``); it runs at most once,
    when the kernel is first chosen. Among kernels that serve a request the highest sum of the backend's priority and
    ``priority`` wins: below 0, a kernel may be declared and checked while another backend's is still preferred.
    """

    op: str
    name: str
    backend: str
    rules: Mapping[str, Rule]
    load: Callable[[], Any]
    devices: tuple[str, ...]
    min_capability: tuple[int, int] | None = None
    conditions: tuple[Condition, ...] = ()
    priority: int = 0

    @property
    def full_name(self) -> str:
        return f"{self.backend}.{self.name}"

    def reject(self, request: Request) -> list[str]:
        """Every reason why this kernel does not serve ``request``; empty when it does."""
        target = request.target
        if target.device_type not in self.devices:
            return [f"device: {target.device_type} is not one of {', '.join(self.devices)}"]
        reasons = []
        if self.min_capability and target.capability and target.capability < self.min_capability:
            reasons.append(f"capability: {target} is below sm_{self.min_capability[0]}{self.min_capability[1]}")
        for name, value in request.values:
            reason = self.rules[name].reject(value)
            if reason is not None:
                reasons.append(f"{name}: {reason}")
        if not reasons:
            reasons += [f"needs {item.text}" for item in self.conditions if not item.holds(request)]
        return reasons


@dataclass(frozen=True)
class Tolerance:
    """Limits on the error of one output against the float64 oracle.

    ``rel_rmse``: ||actual - expected|| / ||expected||; ``max_abs``: largest difference, relative to max(1, RMS of
    expected). Both 0 means bit-exact (after a cast of the expected value to the actual dtype). NaN never passes, and
    infinities must stand at the same places with the same sign.
    """

    rel_rmse: float
    max_abs: float


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Trial:
    """A case made concrete on a device: ``run`` calls an implementation on poisoned outputs and returns what it wrote.

    ``expected`` computes the oracle's outputs (same keys as ``run``; float64 for floating outputs). Memory that must
    stay untouched is returned under a key of its own with tolerance EXACT.
    """

    run: Callable[[Any], Mapping[str, torch.Tensor]]
    expected: Callable[[], Mapping[str, torch.Tensor]]
    tolerance: Mapping[str, Tolerance]


@dataclass(frozen=True)
class Case:
    """One conformance case: a name, the request's field values, and how to build it (device, seed) -> Trial.

    ``tags``: "hostile" for malformed-looking but legal input, "large" for cases that need several GB (CUDA only).
    """

    name: str
    values: Mapping[str, Hashable]
    build: Callable[[torch.device, int], Trial]
    tags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Cost:
    """Fewest bytes moved through device memory and floating-point operations of one call."""

    num_bytes: int
    num_flops: int


@dataclass(frozen=True)
class Operation:
    """An operation's contract: its request fields (name -> meaning), conformance cases and the call protocol.

    ``cases()`` yields cases cheap enough for a CPU first. ``typical`` is a request's values used by the support
    matrix and ``fi explain`` as a starting point: every field has a value there.
    """

    name: str
    summary: str
    fields: Mapping[str, str]
    typical: Mapping[str, Hashable]
    cases: Callable[[], Iterator[Case]]

    def request(self, target: Target, **values: Hashable) -> Request:
        """A request for this operation; raises PluginError unless every field has a value."""
        if set(values) != set(self.fields):
            raise PluginError(f"{self.name}: request fields {sorted(values)} are not {sorted(self.fields)}")
        return Request.of(self.name, target, **values)


def check_entry(entry: KernelEntry, operations: Mapping[str, Operation]) -> None:
    """Raise PluginError unless ``entry`` is a complete declaration for a known operation."""
    if entry.op not in operations:
        raise PluginError(f"kernel {entry.full_name}: unknown operation {entry.op!r}, known: {sorted(operations)}")
    declared, known = set(entry.rules), set(operations[entry.op].fields)
    if declared != known:
        missing, unknown = sorted(known - declared), sorted(declared - known)
        raise PluginError(f"kernel {entry.full_name}: rules missing for {missing}, unknown rules {unknown}")
    if not entry.devices:
        raise PluginError(f"kernel {entry.full_name}: declares no device")
