"""The typical calls of every operation."""

from __future__ import annotations

from .model_workloads import MODEL_WORKLOADS
from .sampling_workloads import SAMPLING_WORKLOADS

WORKLOADS = MODEL_WORKLOADS | SAMPLING_WORKLOADS
"""Builders by operation, in the order that ``fi bench`` runs them."""
