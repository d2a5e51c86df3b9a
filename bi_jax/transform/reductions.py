"""reduce_sum, reduce_max and reduce_min under the contract of row operations."""

import math
from collections.abc import Sequence

import jax

from bi_jax.narrow import narrow
from bi_jax.rows.arguments import reduced, to_rows
from bi_jax.rows.primitive import run_columns, run_rows
from shared_specs.programs import norm, reduce
from shared_specs.rows import RowProgram

PROGRAMS: dict[str, RowProgram] = {"reduce_sum": reduce.SUM, "reduce_max": reduce.AMAX, "reduce_min": reduce.AMIN}


def reduction(name: str, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The reduced dimensions make one row, in ascending order; the result is rounded once to the dtype of x."""
    axes = tuple(sorted(axes))
    if not axes:
        return x
    if name == "reduce_sum" and axes == tuple(range(len(axes))) and len(axes) < x.ndim:
        # The same order of additions, without moving x.
        rows = x.reshape(math.prod(x.shape[: len(axes)]), -1)
        return run_columns(norm.COLUMN_SUM, {"x": rows}, {}, {"y": x.dtype})["y"].reshape(x.shape[len(axes) :])
    result = run_rows(PROGRAMS[name], {"x": to_rows(x, axes)})["y"]
    return reduced(narrow(result, x.dtype), x, axes, keepdim=False)
