"""The contract of attention, and how tensors of any batch dimensions become the entries and rows that engines work on.

A row is one query of one head. It admits some of the keys, in their order: all of them; with `is_causal`, key j for query i
where j <= i; with a boolean mask, those that are True; with a float mask, those that are not -inf. The keys k_0, k_1, ... that
it admits give, with the values v_0, v_1, ... and `scale`,

    s_r = scale * (q . k_r) + mask      one output of `GemmContract` of the operands' dtype, in float32; the mask is its bias
    p_r = softmax(s)_r                  under `RowContract`, rounded to the operands' dtype; 0 if every s_r is -inf
    y   = sum over r of p_r * v_r       `GemmContract` again, its K being the admitted keys, rounded to the operands' dtype

Positions are those among the admitted keys. A key that the row does not admit takes no place, and it and its value may be
NaN: so a padded or gapped sequence has the bits of the same sequence without padding, a row of a long prefill those of the
decode step, and a row that admits nothing is +0. An output that is not finite is NaN, whatever the order of an infinity and
its opposite: a value that is not finite gives NaN in its column of every row that admits it.

Gradients, with g the cotangent of a row:

    dp_r = g . v_r                              float32
    ds_r = p_r * (dp_r - sum over r of dp * p)  rounded to the operands' dtype
    dq   = scale * sum over r of ds_r * k_r     as y: the row's bits, whatever else is in the batch
    dv_j = sum over rows of p * g,  dk_j = scale * sum over rows of ds * q

The last two sum over all rows that share the key: query after query, for each the heads in their order, with the weight 0 for
those that do not admit it, and zeros in the place of rows that admit nothing. So they depend by nature on which rows share the
key; of a padded sequence, queries behind it change nothing, queries before it move other rows' places, as leading padding does.
The gradient of a float mask is ds, summed by `RowContract` where the mask was broadcast; so is that of an operand whose batch
dimension was, but for keys and values that are shared by heads (`enable_gqa`) or by a whole batch dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AttentionLayout:
    """Batch dimensions as entries, which have keys of their own, and groups of rows, which share them.

    All operands have the same number of batch dimensions here; heads are two of them with `enable_gqa`, those of the keys
    and the queries that share each.

    Attributes:
        query, key, value: batch dimensions of the operands, 1 where they are broadcast.
        mask: those of the mask with its last two dimensions, or None.
        batch: broadcast batch dimensions.
        entries: positions of the batch dimensions that have keys of their own.
        groups: positions of the others.
        queries: queries of a batch entry.
        keys: keys of a batch entry.
        out: batch dimensions of the output.
    """

    query: Shape
    key: Shape
    value: Shape
    mask: Shape | None
    batch: Shape
    entries: Shape
    groups: Shape
    queries: int
    keys: int
    out: Shape

    @property
    def entry_count(self) -> int:
        """The product of the entry dimensions."""
        return math.prod(self.batch[i] for i in self.entries)

    @property
    def group_count(self) -> int:
        """The product of the group dimensions."""
        return math.prod(self.batch[i] for i in self.groups)

    def expanded(self, own: Shape) -> Shape:
        """The batch dimensions of an operand with `own` ones, repeated along the entries, but not along the groups."""
        return tuple(n if i in self.groups else self.batch[i] for i, n in enumerate(own))

    def repeated(self, own: Shape) -> Shape:
        """The positions of the batch dimensions along which it was repeated."""
        return tuple(i for i, (n, m) in enumerate(zip(own, self.expanded(own), strict=True)) if n != m)


def attention_layout(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], mask: Sequence[int] | None, enable_gqa: bool
) -> AttentionLayout:
    """The layout of operands of these shapes: [*, Lq, E], [*, Lk, E], [*, Lk, Ev] and a mask broadcastable to [*, Lq, Lk].

    Raises:
        ValueError: they do not fit each other; the message says which.
    """
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two dimensions, got {list(shape)}")
    if query[-1] != key[-1]:
        raise ValueError(f"query and key must have one head dimension, got {list(query)} and {list(key)}")
    if key[-2] != value[-2]:
        raise ValueError(f"there must be one value for every key, got {list(key)} and {list(value)}")
    q, k, v = tuple(query[:-2]), tuple(key[:-2]), tuple(value[:-2])
    heads = q[-1:] if enable_gqa else ()
    if enable_gqa:
        if min(len(q), len(k), len(v)) < 1 or k[-1] != v[-1] or not k[-1] or q[-1] % k[-1]:
            raise ValueError(
                "with enable_gqa, the heads of query must be a multiple of those of key and value, which are equal,"
                f" got {list(query)}, {list(key)} and {list(value)}"
            )
        q, k, v = (*q[:-1], k[-1], q[-1] // k[-1]), (*k, 1), (*v, 1)
    q, k, v = _aligned(q, k, v)
    batch = _broadcast(q, k, v)
    if batch is None:
        raise ValueError(f"batch dimensions do not broadcast: {list(query)}, {list(key)} and {list(value)}")
    out = (*batch[:-2], *heads) if enable_gqa else batch
    full = (*out, query[-2], key[-2])
    m = None
    if mask is not None:
        m = (1,) * (len(full) - len(mask)) + tuple(mask)
        if len(m) != len(full) or any(own not in (1, n) for own, n in zip(m, full, strict=True)):
            raise ValueError(f"attn_mask {list(mask)} does not broadcast to {list(full)}")
        if enable_gqa:
            m = (*m[:-3], *((1, 1) if m[-3] == 1 else batch[-2:]), *m[-2:])
    groups = tuple(i for i, n in enumerate(batch) if n > 1 and k[i] == v[i] == 1)
    entries = tuple(i for i in range(len(batch)) if i not in groups)
    return AttentionLayout(q, k, v, m, batch, entries, groups, query[-2], key[-2], out)


def _aligned(*shapes: Shape) -> list[Shape]:
    rank = max(map(len, shapes))
    return [(1,) * (rank - len(shape)) + shape for shape in shapes]


def _broadcast(*shapes: Shape) -> Shape | None:
    batch = []
    for column in zip(*shapes, strict=True):
        size = 1
        for n in column:
            if size != 1 and n not in (1, size):
                return None
            size = n if size == 1 else size
        batch.append(size)
    return tuple(batch)
