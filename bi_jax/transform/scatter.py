"""scatter-add: a sum over the updates of each element, in their order."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode, ScatterDimensionNumbers

from bi_jax.engines import varying
from bi_jax.narrow import narrow
from bi_jax.rows.embedding import embedding_gradient_p
from bi_jax.transform.elementwise import elementary


def covered(operand: Any, indices: Any, updates: Any, params: dict[str, Any]) -> bool:
    """Whether no two updates meet, or all are as wide as the operand in the dimensions that are not indexed."""
    return _apart(operand, indices, params) or _wide(operand, updates, params["dimension_numbers"])


def scatter_add(operand: jax.Array, indices: jax.Array, updates: jax.Array, **params: Any) -> jax.Array:
    """The operand plus the float32 sum, from +0, of an element's updates, one after the other; rounded once to its dtype."""
    if not updates.size:
        return operand
    add = _once if _apart(operand, indices, params) else _in_order
    return add(operand, indices, updates, params["dimension_numbers"], GatherScatterMode.from_any(params["mode"]))


def _apart(operand: Any, indices: Any, params: dict[str, Any]) -> bool:
    """No element has two updates: each batch has one, or the caller says so."""
    batches = params["dimension_numbers"].scatter_indices_batching_dims
    count = math.prod(n for d, n in enumerate(indices.shape[:-1]) if d not in batches)
    return params["unique_indices"] or count <= 1


def _wide(operand: Any, updates: Any, dims: ScatterDimensionNumbers) -> bool:
    inserted = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    kept = [n for d, n in enumerate(operand.shape) if d not in inserted]
    indexed = set(dims.scatter_dims_to_operand_dims) <= set(dims.inserted_window_dims)
    return indexed and kept == [updates.shape[d] for d in dims.update_window_dims]


def _once(
    operand: jax.Array, indices: jax.Array, updates: jax.Array, dims: ScatterDimensionNumbers, mode: GatherScatterMode
) -> jax.Array:
    """What is there, plus the update, takes its place."""
    window = dict(zip(_window_dims(operand, dims), dims.update_window_dims, strict=True))
    there = lax.gather(
        operand,
        indices,
        GatherDimensionNumbers(
            offset_dims=tuple(dims.update_window_dims),
            collapsed_slice_dims=tuple(dims.inserted_window_dims),
            start_index_map=tuple(dims.scatter_dims_to_operand_dims),
            operand_batching_dims=tuple(dims.operand_batching_dims),
            start_indices_batching_dims=tuple(dims.scatter_indices_batching_dims),
        ),
        slice_sizes=[updates.shape[window[d]] if d in window else 1 for d in range(operand.ndim)],
        mode=mode,
    )
    return lax.scatter(operand, indices, elementary("add", there, updates), dims, mode=mode)


def _in_order(
    operand: jax.Array, indices: jax.Array, updates: jax.Array, dims: ScatterDimensionNumbers, mode: GatherScatterMode
) -> jax.Array:
    """The operand as a table of rows, to which each update adds one: the gradient of an embedding."""
    window = _window_dims(operand, dims)
    looked_up = (*dims.operand_batching_dims, *dims.inserted_window_dims)
    order = (*looked_up, *window)
    table = operand.transpose(order).reshape(math.prod(operand.shape[d] for d in looked_up), -1)
    scattered = [d for d in range(updates.ndim) if d not in dims.update_window_dims]
    rows = updates.transpose(*scattered, *dims.update_window_dims).reshape(-1, table.shape[1])
    ids = _row_ids(operand, indices, dims, mode).reshape(-1)
    total = embedding_gradient_p.bind(*varying((rows, ids)), rows=table.shape[0], out_dtype=jnp.dtype(jnp.float32))
    table = narrow(elementary("add", table.astype(jnp.float32), total), operand.dtype)
    inverse = [order.index(d) for d in range(operand.ndim)]
    return table.reshape([operand.shape[d] for d in order]).transpose(inverse)


def _row_ids(operand: jax.Array, indices: jax.Array, dims: ScatterDimensionNumbers, mode: GatherScatterMode) -> jax.Array:
    """The row of the table that each update adds to; -1 for one that is dropped."""
    places: dict[int, jax.Array] = {
        d: lax.broadcasted_iota(jnp.int32, indices.shape[:-1], own)
        for d, own in zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    }
    inside: Any = True
    for i, d in enumerate(dims.scatter_dims_to_operand_dims):
        size = operand.shape[d]
        place = jnp.clip(indices[..., i], -1, size).astype(jnp.int32)
        if mode is GatherScatterMode.CLIP:
            place = jnp.clip(place, 0, size - 1)
        inside &= (place >= 0) & (place < size)
        places[d] = place
    row = jnp.zeros(indices.shape[:-1], jnp.int32)
    for d in (*dims.operand_batching_dims, *dims.inserted_window_dims):
        row = row * operand.shape[d] + places.get(d, 0)
    return jnp.where(inside, row, -1)


def _window_dims(operand: jax.Array, dims: ScatterDimensionNumbers) -> list[int]:
    return [d for d in range(operand.ndim) if d not in (*dims.inserted_window_dims, *dims.operand_batching_dims)]
