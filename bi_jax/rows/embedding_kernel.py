"""The gradient of an embedding on Hopper: for every row of the weight, the cotangents of its tokens in the tokens' order.

Tokens are sorted by id, stably, so those of one id stand together in their order. A block of one warpgroup has 1024 columns
of one row and adds up the cotangents of its tokens, one after the other in float32 from +0; it has several of them on their
way. Where a run ends, rows beyond the last are read, which are zeros: adding +0 to a sum that started at +0 changes nothing.
No atomics, and no order but this one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bi_jax.rows.ptx import Block, Level, Listing
from bi_jax.rows.values import combined
from bi_jax.rows.warpgroup import CHUNK, Evaluate, Load, Place, Ref, Store, width, zeros

UNDER_WAY = 8
"""Cotangents that are loaded before the first of them is added."""


def gradient(g: jax.Array, ordered: jax.Array, tokens: jax.Array, *, rows: int, out_dtype: Any) -> jax.Array:
    """[rows, D] of `out_dtype`.

    Args:
        g: cotangents [T, D].
        ordered: ids [T] in ascending order; one that is no row of the weight is `rows`.
        tokens: int32 [T], the token of each.
        rows: of the weight.
        out_dtype: of the weight.
    """
    count, d = g.shape
    blocks, place = pl.cdiv(d, CHUNK), Place(d, rows=count, end=d if d % CHUNK else None)
    load = Load(g.dtype.name, place, width(g.dtype.name, d))
    store = Store(out_dtype.name, Place(d, end=place.end), width(out_dtype.name, d))
    f = Listing()
    total = f.input("total", Level.ROW)
    rounded = Evaluate(Block((total,), (f.canonical(total),)), (out_dtype.name,), CHUNK)

    def body(starts: Ref, tokens: Ref, g: Ref, out: Ref) -> None:
        block = lax.axis_index("block")
        row, column = lax.div(block, jnp.int32(blocks)), lax.rem(block, jnp.int32(blocks)) * CHUNK
        first, end = starts[row], starts[row + 1]

        def step(i: jax.Array, sums: jax.Array) -> jax.Array:
            positions = [first + i * UNDER_WAY + j for j in range(UNDER_WAY)]
            of_tokens = [jnp.where(p < end, tokens[jnp.minimum(p, count - 1)], count) for p in positions]
            for chunk in [load(g, token, column) for token in of_tokens]:
                sums = combined("sum", [sums, chunk])
            return sums

        steps = lax.div(end - first + UNDER_WAY - 1, jnp.int32(UNDER_WAY))
        (result,) = rounded(lax.fori_loop(0, steps, step, zeros()))
        store(out, row, column, result)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows * d,), out_dtype),
        grid=(rows * blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="bi_embedding_gradient",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    starts = jnp.searchsorted(ordered, jnp.arange(rows + 1, dtype=jnp.int32)).astype(jnp.int32)
    return kernel(starts, tokens, g.reshape(count * d)).reshape(rows, d)
