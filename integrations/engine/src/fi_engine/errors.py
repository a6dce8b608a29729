"""Errors of the engine; like those of fi-core, each names the thing at fault."""

from __future__ import annotations

from pathlib import Path

from fi_core.errors import FiError


class ModelFileError(FiError):
    """A model file that is missing, cut short, or not of a kind the engine serves.

    Attributes: ``path``, ``item`` (the tensor, field or part at fault) and ``problem``.
    """

    def __init__(self, path: Path, item: str, problem: str) -> None:
        self.path = path
        self.item = item
        self.problem = problem
        super().__init__(f"{path}: {item}: {problem}")


class RequestError(FiError):
    """One request cannot go on; the others are not touched. ``request_id`` says which."""

    def __init__(self, request_id: int, problem: str) -> None:
        self.request_id = request_id
        self.problem = problem
        super().__init__(f"request {request_id}: {problem}")


class StepError(FiError):
    """A step was cut short by an exception that is not one of fi's, which the call of ``step`` raised; the requests that
    took part in it have ended."""

    def __init__(self, step_idx: int, cause: BaseException) -> None:
        self.step_idx = step_idx
        super().__init__(f"step {step_idx} was cut short by {type(cause).__name__}: {cause}")
