"""reduce_sum, reduce_max, reduce_min, reduce_prod and psum in an order that is fixed."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lax.parallel import all_gather_invariant

from bi_jax.narrow import narrow
from bi_jax.rows.arguments import reduced, to_rows
from bi_jax.rows.primitive import run_columns, run_rows
from bi_jax.transform.elementwise import elementary
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


def product(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """By a tree over adjacent elements, float32 and rounded once; ones behind a row change nothing."""
    axes = tuple(sorted(axes))
    rows = to_rows(x, axes).astype(jnp.float32)
    size = 1 << max(rows.shape[1] - 1, 0).bit_length()
    rows = jnp.pad(rows, ((0, 0), (0, size - rows.shape[1])), constant_values=1)
    while rows.shape[1] > 1:
        rows = elementary("mul", rows[:, 0::2], rows[:, 1::2])
    return reduced(narrow(rows[:, 0], x.dtype), x, axes, keepdim=False)


def sum_over_axes(x: jax.Array, axes: Sequence[int | str], invariant: bool) -> jax.Array:
    """psum over dimensions of x, which `vmap` may have made of an axis, and over axes of a mesh.

    Every device gets the parts of all, and adds them in the order of the devices. An `invariant` result is marked in its type
    as the same on all devices.
    """
    x = reduction("reduce_sum", x, [axis for axis in axes if isinstance(axis, int)])
    if not (names := tuple(axis for axis in axes if isinstance(axis, str))):
        return x
    parts = all_gather_invariant(x, names) if invariant else lax.all_gather(x, names)
    return reduction("reduce_sum", parts, (0,))
