"""embedding, and its gradient: a sum over tokens in their order."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import batching

from bi_jax.engines import define, result_type, varying
from bi_jax.float64 import decode, encode, round32, round_to, storage_bits
from bi_jax.rows import embedding_kernel
from bi_jax.rows.arguments import array, id_array
from bi_jax.rows.op import Op
from shared_specs.formats import float_format

embedding_gradient_p = Primitive("bi_embedding_gradient")


def embedding(ids: jax.Array, weight: jax.Array, padding_idx: int | None = None) -> jax.Array:
    """The rows of weight [V, D] at ids [*]: a copy of their bits, [*, D]; NaN for an id outside 0..V-1.

    The gradient of a row is the sum of the cotangents of its tokens, one after the other in their order, float32 and rounded
    once; 0 for the row `padding_idx`.
    """
    weight, ids = array("embedding", "weight", weight), id_array("embedding", "ids", ids)
    if weight.ndim != 2:
        raise ValueError(f"bi_jax.embedding: weight must have 2 dimensions, got {weight.shape}")
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"bi_jax.embedding: padding_idx must be within {rows} rows, got {padding_idx}")
    tokens = ids.reshape(ids.size)
    counted = tokens if padding_idx is None else jnp.where(tokens == padding_idx % rows, -1, tokens)
    return _embedding(weight.dtype, weight=weight, ids=tokens, counted=counted).y.reshape(*ids.shape, weight.shape[1])


def _lookup(e: SimpleNamespace) -> dict[str, jax.Array]:
    """Patterns move, not floats, so that every bit arrives."""
    rows, bits = e.weight.shape[0], storage_bits(e.weight)
    nan = jnp.full((1, 1), float_format(e.weight.dtype.name).nan, bits.dtype)
    inside = (e.ids >= 0) & (e.ids < rows)
    found = jnp.take(bits, jnp.clip(e.ids, 0, rows - 1), axis=0) if rows else nan
    return {"y": lax.bitcast_convert_type(jnp.where(inside[:, None], found, nan), e.weight.dtype)}


def _tangent(s: SimpleNamespace, t: SimpleNamespace) -> dict[str, jax.Array]:
    return _lookup(SimpleNamespace(weight=t.weight, ids=s.ids))


def _gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    rows = s.shapes["weight"][0]
    return {"weight": embedding_gradient_p.bind(*varying((g.y, s.counted)), rows=rows, out_dtype=s.dtypes["weight"])}


_embedding = Op("embedding", _lookup, keep=("ids", "counted"), gradient=_gradient, tangent=_tangent)


@embedding_gradient_p.def_abstract_eval
def _abstract(g: Any, ids: Any, *, rows: int, out_dtype: Any) -> core.ShapedArray:
    return result_type("embedding", (rows, g.shape[1]), out_dtype, (g, ids))


def _sorted_tokens(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Ids in ascending order, `rows` for those that are none, and the tokens that have them, in their order for each id."""
    inside = (ids >= 0) & (ids < rows)
    tokens = jnp.arange(ids.size, dtype=jnp.int32)
    ordered, tokens = lax.sort((jnp.where(inside, ids, rows), tokens), num_keys=1, is_stable=True)
    return ordered, tokens


def _on_cpu(g: jax.Array, ids: jax.Array, *, rows: int, out_dtype: Any) -> jax.Array:
    """One token after the other, those of one id together: a row of the result is written with each, the last one stays."""
    ordered, tokens = _sorted_tokens(ids, rows)
    fmt, out_fmt = float_format(g.dtype.name), float_format(out_dtype.name)
    bits = storage_bits(g)
    with jax.enable_x64(True):

        def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            result, total = state
            same = (i > 0) & (ordered[jnp.maximum(i - 1, 0)] == ordered[i])
            total = round32(jnp.where(same, total, 0.0) + decode(bits[tokens[i]], fmt))
            pattern = encode(round_to(total, out_fmt), out_fmt)
            return lax.dynamic_update_slice_in_dim(result, pattern[None], ordered[i], axis=0), total

        start = jnp.zeros((rows, g.shape[1]), out_fmt.storage), jnp.zeros(g.shape[1], jnp.float64)
        result, _ = lax.fori_loop(0, (ordered < rows).sum(), step, start)
        return lax.bitcast_convert_type(result, out_dtype)


def _on_cuda(g: jax.Array, ids: jax.Array, *, rows: int, out_dtype: Any) -> jax.Array:
    return embedding_kernel.gradient(g, *_sorted_tokens(ids, rows), rows=rows, out_dtype=out_dtype)


def _engine(run: Any) -> Any:
    def engine(g: jax.Array, ids: jax.Array, *, rows: int, out_dtype: Any) -> jax.Array:
        if not rows * g.size:
            return jnp.zeros((rows, g.shape[1]), out_dtype)
        return run(g, ids, rows=rows, out_dtype=out_dtype)

    return engine


def _batch(operands: tuple[jax.Array, jax.Array], axes: tuple[int | None, int | None], **params: Any) -> tuple[jax.Array, int]:
    """vmap: one gradient after the other."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    g, ids = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    return lax.map(lambda pair: embedding_gradient_p.bind(*pair, **params), (g, ids)), 0


define(embedding_gradient_p, lambda **_: "embedding", _engine(_on_cpu), _engine(_on_cuda))
batching.primitive_batchers[embedding_gradient_p] = _batch
