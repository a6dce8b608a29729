"""The conformance kit: every operation's cases, run on any backend and judged by the float64 oracle.

The kit works without pytest (``run``) and with it (``parametrize``). Poison discipline: a case fills each output with
NaN or a sentinel before the kernel runs, so an element that is never written fails; memory around outputs (rows past
the batch, page tails, strides' gaps) is poisoned too and compared bit for bit afterwards, so an element written too
much fails as well; inputs that the contract does not let a kernel write are compared with what they held.
"""

from .compare import Comparison, compare
from .kit import BoundCase, bound_cases, run
from .pytest_cases import parametrize
from .report import CaseResult, Report

__all__ = ["BoundCase", "CaseResult", "Comparison", "Report", "bound_cases", "compare", "parametrize", "run"]
