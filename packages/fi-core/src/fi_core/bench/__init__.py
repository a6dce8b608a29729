"""Timing of every operation's typical call, with its numerics checked in the same run (``fi bench``)."""

from .runner import Row, bench, table
from .workloads import WORKLOADS

__all__ = ["WORKLOADS", "Row", "bench", "table"]
