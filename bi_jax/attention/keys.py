"""Which keys a row admits, and where they have to stand: behind one another, from the first place on.

Where every row of a batch entry admits the first keys of one common order, the keys are gathered once an entry and a row is
told by a length: so it is without a mask, with a causal one, with a mask that is the same for all queries, and for the masks
of padded batches. Other masks (a window, say) need an order for every row. A mask's shape tells some of this, its data the
rest: a program has both ways then, and takes one as it runs. The bits are the same.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shared_specs.attention import AttentionLayout


class Mask(NamedTuple):
    """A mask on entries and groups; every extent may be 1 where the mask is broadcast, but for that of keys.

    Attributes:
        admitted: bool [entries, groups, Lq, Lk].
        bias: what is added to the scores, in the same shape, or None.
        owner: int32 [N], the mask's entry of each of the layout's entries.
    """

    admitted: jax.Array
    bias: jax.Array | None
    owner: np.ndarray


class Keys(NamedTuple):
    """The keys of every row.

    Attributes:
        lengths: int32 [entries, groups, Lq], extents as in `Mask`: a row admits so many keys, the first in its order; None
            if it admits all.
        order: int32 [entries, Lk], the order of all rows of an entry, or None if it is the keys' own.
        by_row: every row has its own order, which `row_order` gives.
    """

    lengths: jax.Array | None
    order: jax.Array | None = None
    by_row: bool = False


def read_mask(mask: jax.Array, layout: AttentionLayout) -> Mask:
    """The mask in the layout's dimensions."""
    assert layout.mask is not None
    *batch, queries, _ = layout.mask
    entries, groups = ([batch[i] for i in dims] for dims in (layout.entries, layout.groups))
    if math.prod(groups) not in (1, layout.group_count):
        groups = [layout.batch[i] for i in layout.groups]
    x = mask.reshape(layout.mask).transpose(*layout.entries, *layout.groups, len(batch), len(batch) + 1)
    x = jnp.broadcast_to(x, (*entries, *groups, queries, layout.keys))
    x = x.reshape(math.prod(entries), math.prod(groups), queries, layout.keys)
    owner = np.arange(math.prod(entries), dtype=np.int32).reshape(entries)
    owner = np.broadcast_to(owner, [layout.batch[i] for i in layout.entries]).reshape(layout.entry_count)
    return Mask(x, None, owner) if x.dtype == jnp.bool_ else Mask(x != -math.inf, x, owner)


def with_keys(layout: AttentionLayout, mask: Mask | None, is_causal: bool, attend: Callable[[Keys], Any]) -> Any:
    """`attend` with the keys that the rows admit."""
    if mask is None:
        lengths = jnp.minimum(jnp.arange(1, layout.queries + 1, dtype=jnp.int32), layout.keys)
        return attend(Keys(lengths[None, None] if is_causal else None))
    lengths = mask.admitted.astype(jnp.int32).sum(-1, dtype=jnp.int32)
    rows = mask.admitted.reshape(len(mask.admitted), -1, layout.keys)
    order = row_order(rows.any(1))
    if rows.shape[1] == 1:
        return attend(Keys(lengths, order))
    first = jnp.arange(layout.keys) < lengths.reshape(*rows.shape[:2], 1)
    together = (jnp.take_along_axis(rows, order[:, None], -1) == first).all()
    return lax.cond(together, lambda: attend(Keys(lengths, order)), lambda: attend(Keys(lengths, by_row=True)))


def row_order(admitted: jax.Array) -> jax.Array:
    """Positions [*, Lk] of the keys that are admitted, in their order, then of the others."""
    return jnp.argsort(~admitted, axis=-1, stable=True).astype(jnp.int32)
