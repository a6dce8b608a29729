"""Errors of every package: each names the thing at fault, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FiError(Exception):
    """Base of every error that fi raises on purpose. All of them survive pickling, to reach another process as they are."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an error is made again from its text, which is not what the constructors of subclasses take.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[FiError], args: tuple[object, ...], attributes: Mapping[str, object]) -> FiError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ArgumentError(FiError, ValueError):
    """An argument has the wrong type, shape, dtype, device or value.

    Attributes: ``argument`` (its public name), ``expected`` and ``actual`` (texts).
    """

    def __init__(self, argument: str, expected: str, actual: object) -> None:
        self.argument = argument
        self.expected = expected
        self.actual = str(actual)
        super().__init__(f"{argument}: expected {expected}, got {self.actual}")


class CapacityError(ArgumentError):
    """A batch exceeds a capacity that was fixed when its plan or pool was made."""


class IndexCheckError(FiError):
    """Checked mode found an index from the user (page id, length, slot, token) out of range."""


class UnsupportedError(FiError):
    """No loaded kernel serves the request; ``rejections`` holds (kernel, reasons) pairs."""

    def __init__(self, request: object, rejections: Sequence[tuple[str, Sequence[str]]]) -> None:
        self.request = request
        self.rejections = tuple((kernel, tuple(reasons)) for kernel, reasons in rejections)
        lines = [f"no kernel supports {request}"]
        lines += [f"  {kernel}: {'; '.join(reasons)}" for kernel, reasons in self.rejections]
        if not self.rejections:
            lines.append("  no backend registered a kernel for this operation")
        super().__init__("\n".join(lines))


class LayoutError(UnsupportedError, ArgumentError):
    """A tensor's strides or address are those of no kernel: an ArgumentError in its text and attributes; ``request`` is
    that text and ``rejections`` is empty, because no kernel was asked."""

    def __init__(self, argument: str, expected: str, actual: object) -> None:
        ArgumentError.__init__(self, argument, expected, actual)
        self.request = str(self)
        self.rejections = ()


class UnknownBackendError(FiError):
    """A backend name that no installed plugin answers to."""


class PluginError(FiError):
    """A plugin could not be loaded, clashes with another, or raised from one of its hooks."""


class SettingsError(FiError):
    """An ``FI_*`` environment variable has a value that does not parse."""


class ShadowMismatchError(FiError):
    """Shadow mode found a kernel's result outside the tolerance of its contract."""
