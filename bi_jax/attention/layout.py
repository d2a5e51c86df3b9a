"""Arrays of any batch dimensions as [entries, groups, *, *] and back, as `shared_specs.attention` lays them out."""

import math

import jax
import jax.numpy as jnp

from bi_jax.rows.reduce import sum as sum_over
from shared_specs.attention import AttentionLayout, Shape


def split(x: jax.Array, layout: AttentionLayout, own: Shape) -> jax.Array:
    """x [*, L, D], of batch dimensions `own`, as [N, G, L, D]; G is 1 where x has no groups."""
    sizes, tail = layout.expanded(own), x.shape[-2:]
    x = jnp.broadcast_to(x.reshape(*own, *tail), (*sizes, *tail))
    x = x.transpose(*layout.entries, *layout.groups, len(own), len(own) + 1)
    return x.reshape(layout.entry_count, math.prod(sizes[i] for i in layout.groups), *tail)


def join(x: jax.Array, layout: AttentionLayout, own: Shape, shape: Shape) -> jax.Array:
    """The inverse of `split`, in the shape of the operand: what belongs to one element of it is summed."""
    sizes, tail = layout.expanded(own), x.shape[-2:]
    order = (*layout.entries, *layout.groups)
    x = x.reshape(*(sizes[i] for i in order), *tail)
    x = x.transpose(*(order.index(i) for i in range(len(own))), len(own), len(own) + 1)
    if repeated := layout.repeated(own):
        x = sum_over(x, dim=repeated)
    return x.reshape(shape)
