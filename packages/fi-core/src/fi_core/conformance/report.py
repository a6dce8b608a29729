"""What a conformance run found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "unsupported"]


@dataclass(frozen=True)
class CaseResult:
    """One case on one kernel. ``message``: what went wrong, or why the case is not supported. ``rel_rmse`` and
    ``max_error`` per output; ``seed`` reproduces the inputs."""

    op: str
    case: str
    kernel: str
    outcome: Outcome
    message: str
    seed: int
    rel_rmse: Mapping[str, float]
    max_error: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.op}/{self.case}"

    def __str__(self) -> str:
        text = f"{self.outcome:<12}{self.name} [{self.kernel}]"
        return f"{text}: {self.message} (seed {self.seed})" if self.outcome == "failed" else text


@dataclass(frozen=True)
class Report:
    """Results of ``run`` in the order they were made."""

    backend: str
    device: str
    results: tuple[CaseResult, ...]

    def of(self, outcome: Outcome) -> tuple[CaseResult, ...]:
        """The results with that outcome."""
        return tuple(item for item in self.results if item.outcome == outcome)

    @property
    def num_executed(self) -> int:
        """Cases that ran, passed or not."""
        return len(self.results) - len(self.of("unsupported"))

    @property
    def ok(self) -> bool:
        """Something ran, and all that ran passed."""
        return self.num_executed > 0 and not self.of("failed")

    def to_json(self) -> str:
        """The report as JSON: backend, device, ok, counts, results. Errors that are not finite become strings."""
        counts = {name: len(self.of(name)) for name in ("passed", "failed", "unsupported")}
        results = [
            {**asdict(item), "rel_rmse": _plain(item.rel_rmse), "max_error": _plain(item.max_error)}
            for item in self.results
        ]
        document = {"backend": self.backend, "device": self.device, "ok": self.ok, "counts": counts, "results": results}
        return json.dumps(document, indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [str(item) for item in self.of("failed")]
        counts = ", ".join(f"{len(self.of(name))} {name}" for name in ("passed", "failed", "unsupported"))
        lines.append(f"{self.backend} on {self.device}: {counts}")
        if self.num_executed == 0:
            lines.append("failed: no case was executed")
        return "\n".join(lines)


def _plain(errors: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if abs(value) < float("inf") else str(value) for name, value in errors.items()}
