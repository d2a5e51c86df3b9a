"""Checks of arguments, and arrays of any shape as rows, for the public functions.

Messages name the function, the argument and what it may be: TypeError for what is no array and for dtypes, ValueError for
shapes and values.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("bfloat16", "float16", "float32")
IDS = ("int32", "int64")
INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")

Dims = int | Sequence[int] | None


def array(op: str, name: str, x: Any, dtypes: Sequence[str] = FLOATS) -> jax.Array:
    """`x`, which must be an array of one of `dtypes`, as a JAX array."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"bi_jax.{op}: {name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in dtypes:
        raise TypeError(f"bi_jax.{op}: {name} must be {_any_of(dtypes)}, got {x.dtype}")
    return jnp.asarray(x)


def id_array(op: str, name: str, x: Any) -> jax.Array:
    """An array of ids as int32; ids beyond int32 stay outside of any row."""
    ids = array(op, name, x, IDS)
    limits = np.iinfo(np.int32)
    return jnp.clip(ids, limits.min, limits.max).astype(jnp.int32)


def out_dtype(op: str, dtype: Any, default: Any) -> np.dtype:
    """A dtype that an output may have; `default` for None."""
    try:
        dtype = jnp.dtype(default if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"bi_jax.{op}: dtype must be {_any_of(FLOATS)}, got {dtype}") from None
    if dtype.name not in FLOATS:
        raise TypeError(f"bi_jax.{op}: dtype must be {_any_of(FLOATS)}, got {dtype}")
    return dtype


def check_shape(op: str, name: str, x: jax.Array, shape: Sequence[int]) -> None:
    """Exactly this shape."""
    if x.shape != tuple(shape):
        raise ValueError(f"bi_jax.{op}: {name} must have shape {tuple(shape)}, got {x.shape}")


def check_number(op: str, name: str, x: Any, minimum: float, maximum: float = math.inf) -> None:
    """A number in the given range, or a traced one, which is taken as it is."""
    if isinstance(x, jax.Array | np.ndarray) and (x.ndim or not jnp.issubdtype(x.dtype, jnp.number)):
        raise TypeError(f"bi_jax.{op}: {name} must be a number, got {x.dtype}{list(x.shape)}")
    if not isinstance(x, jax.Array | np.ndarray | np.number | int | float):
        raise TypeError(f"bi_jax.{op}: {name} must be a number, got {type(x).__name__}")
    if not isinstance(x, jax.core.Tracer) and not minimum <= float(x) <= maximum:
        raise ValueError(f"bi_jax.{op}: {name} must be between {minimum} and {maximum}, got {x}")


def dims_of(op: str, x: jax.Array, dim: Dims) -> tuple[int, ...]:
    """The dimensions that `dim` names, ascending; all for None and ()."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not dims:
        return tuple(range(x.ndim))
    extent = max(1, x.ndim)  # an array without dimensions passes for one of a single element
    found = set()
    for d in dims:
        if not isinstance(d, int):
            raise TypeError(f"bi_jax.{op}: dim must be int or a sequence of int, got {type(d).__name__}")
        if not -extent <= d < extent:
            raise ValueError(f"bi_jax.{op}: dim must be in {-extent}..{extent - 1} for shape {x.shape}, got {d}")
        if d % extent in found:
            raise ValueError(f"bi_jax.{op}: dim {d % extent} appears twice in {dims}")
        found.add(d % extent)
    return tuple(sorted(found)) if x.ndim else ()


def to_rows(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    """[R, N]: the elements of `dims` are a row, the last dimension fastest."""
    kept = [d for d in range(x.ndim) if d not in dims]
    shape = math.prod(x.shape[d] for d in kept), math.prod(x.shape[d] for d in dims)
    return x.transpose(*kept, *dims).reshape(shape)


def from_rows(rows: jax.Array, like: jax.Array, dims: Sequence[int]) -> jax.Array:
    """The inverse of `to_rows`, with the shape of `like`."""
    order = [*(d for d in range(like.ndim) if d not in dims), *dims]
    return rows.reshape([like.shape[d] for d in order]).transpose([order.index(d) for d in range(like.ndim)])


def reduced(values: jax.Array, like: jax.Array, dims: Sequence[int], keepdim: bool) -> jax.Array:
    """One value a row [R], in the shape of `like` without `dims`, or with 1 in their place."""
    if keepdim:
        return values.reshape([1 if d in dims else n for d, n in enumerate(like.shape)])
    return values.reshape([n for d, n in enumerate(like.shape) if d not in dims])


def floating(x: jax.Array) -> jax.Array:
    """Integers and bools as the nearest float32."""
    return x if x.dtype.name in FLOATS else x.astype(jnp.float32)


def _any_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
