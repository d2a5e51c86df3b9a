"""`batch_invariant`, a transformation that makes a JAX function batch-invariant, and `explain`, which shows what it does."""

from bi_jax.transform.api import batch_invariant
from bi_jax.transform.coverage import (
    UncoveredOperationError,
    UncoveredOperationWarning,
    reset_uncovered,
    uncovered_counts,
)
from bi_jax.transform.report import explain

__all__ = [
    "UncoveredOperationError",
    "UncoveredOperationWarning",
    "batch_invariant",
    "explain",
    "reset_uncovered",
    "uncovered_counts",
]
