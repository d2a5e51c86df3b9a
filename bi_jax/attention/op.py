"""Attention as a differentiable function of arrays, composed of products and row programs.

What is written here is for one batch entry (`shared_specs.attention` says what that is): one product of all rows that share
its keys with these keys. It is mapped over the entries, so many at a time that no more than `CHUNK` scores are in memory; no
bit depends on it. The gradient computes the scores again instead of keeping them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bi_jax.attention.keys import Keys, read_mask, row_order, with_keys
from bi_jax.attention.layout import join, split
from bi_jax.float64 import storage_bits
from bi_jax.gemm.gradient import Params, product
from bi_jax.rows.op import Op, row_op
from bi_jax.rows.reduce import sum as sum_over
from shared_specs.attention import AttentionLayout, attention_layout
from shared_specs.formats import float_format
from shared_specs.programs import attention as programs

NAME = "scaled_dot_product_attention"
CHUNK = 1 << 27
"""float32 scores, or gathered keys or values, that are in memory at a time."""
CAUSAL_BLOCKS, CAUSAL_BLOCK = 8, 512
"""Causal attention leaves out the keys behind a block of queries: at most so many blocks, of at least so many queries."""

_softmax = row_op(NAME, lambda e: programs.attention_softmax(e.length is not None))
_softmax_backward = row_op(NAME, lambda e: programs.attention_softmax_backward(e.length is not None))


class _Entry(NamedTuple):
    """One entry: the rows that share its keys; or all entries, along a leading dimension.

    Attributes:
        query: [G, Lq, E].
        key: [Lk, E].
        value: [Lk, Ev].
        g: cotangents [G, Lq, Ev], or None.
        lengths: int32 [G, Lq]: a row admits so many keys, the first in its order; None if it admits all.
        order: int32 [Lk], in which the keys are to stand; None if it is their own, or each row has one.
        owner: int32, the entry of the mask.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    g: jax.Array | None
    lengths: jax.Array | None
    order: jax.Array | None
    owner: jax.Array


class _Row(NamedTuple):
    """The rows of one query of an entry, with its mask: admitted keys and bias are [G or 1, Lk]."""

    query: jax.Array
    g: jax.Array | None
    lengths: jax.Array
    admitted: jax.Array
    bias: jax.Array | None


class _Gradients(NamedTuple):
    """Of one entry: [G, Lq, E], [Lk, E], [Lk, Ev], and of its scores [G, Lq, Lk] if the mask needs them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    scores: jax.Array | None


class _Call:
    """A call: its operands on entries [N], groups [G] and queries, and its mask."""

    def __init__(self, e: SimpleNamespace, g: jax.Array | None, is_causal: bool, scale: float, gqa: bool) -> None:
        self.layout = layout = layout_of(e.query, e.key, e.value, e.attn_mask, gqa)
        self.query = split(e.query, layout, layout.query)
        self.key, self.value = split(e.key, layout, layout.key)[:, 0], split(e.value, layout, layout.value)[:, 0]
        self.g = None if g is None else split(g, layout, layout.batch)
        self.mask = None if e.attn_mask is None else read_mask(e.attn_mask, layout)
        self.is_causal, self.scale = is_causal, scale

    def over_entries(self, one: Callable[[_Entry, bool], Any]) -> Any:
        """`one` of every entry, told whether every row has an order of keys of its own."""

        def attend(keys: Keys) -> Any:
            cost = self.query.shape[2] * (self.row_cost if keys.by_row else self.query.shape[1] * self.layout.keys)
            return _over(lambda entry: one(entry, keys.by_row), self._entries(keys), cost)

        return with_keys(self.layout, self.mask, self.is_causal, attend)

    def over_rows(self, one: Callable[[_Row], Any], entry: _Entry) -> Any:
        """`one` of every query of an entry."""
        assert self.mask is not None
        assert entry.lengths is not None
        rows = _Row(
            query=jnp.moveaxis(entry.query, 1, 0),
            g=None if entry.g is None else jnp.moveaxis(entry.g, 1, 0),
            lengths=jnp.moveaxis(entry.lengths, 1, 0),
            admitted=self._by_query(self.mask.admitted[entry.owner]),
            bias=None if self.mask.bias is None else self._by_query(self.mask.bias[entry.owner]),
        )
        return _over(one, rows, self.row_cost)

    @property
    def row_cost(self) -> int:
        """Numbers in memory for a query of an entry where every row has an order of its own."""
        orders = 1 if self.mask is None else self.mask.admitted.shape[1]
        return self.layout.keys * (self.query.shape[1] + orders * max(self.key.shape[-1], self.value.shape[-1]))

    def in_order(self, entry: _Entry) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Keys, values and what the mask adds to the scores, [G * Lq, Lk] or None, in the order of the entry."""
        key, value, bias = entry.key, entry.value, None
        if self.mask is not None and self.mask.bias is not None:
            bias = self.mask.bias[entry.owner]
        if entry.order is not None:
            key, value = key[entry.order], value[entry.order]
            bias = None if bias is None else bias[..., entry.order]
        if bias is not None:
            bias = jnp.broadcast_to(bias, (*entry.query.shape[:2], self.layout.keys)).reshape(-1, self.layout.keys)
        return key, value, bias

    def _entries(self, keys: Keys) -> _Entry:
        n, groups, queries, _ = self.query.shape
        owner = jnp.zeros(n, jnp.int32) if self.mask is None else jnp.asarray(self.mask.owner)
        lengths = None
        if keys.lengths is not None:
            lengths = keys.lengths if len(keys.lengths) == 1 else keys.lengths[owner]
            lengths = jnp.broadcast_to(lengths, (n, groups, queries))
        order = None if keys.order is None else keys.order[owner]
        return _Entry(self.query, self.key, self.value, self.g, lengths, order, owner)

    def _by_query(self, x: jax.Array) -> jax.Array:
        """[G or 1, Lq or 1, Lk] as [Lq, G or 1, Lk]."""
        return jnp.broadcast_to(jnp.moveaxis(x, 1, 0), (self.layout.queries, x.shape[0], x.shape[2]))


def _over(f: Callable[[Any], Any], xs: Any, cost: int) -> Any:
    """f of every element along the leading dimension, as many at a time as cost no more than `CHUNK`."""
    count = len(jax.tree.leaves(xs)[0])
    fitting = max(1, min(count, CHUNK // cost))
    together = next(n for n in range(fitting, 0, -1) if count % n == 0)
    return jax.vmap(f)(xs) if together == count else lax.map(f, xs, batch_size=together)


def _scores(x: jax.Array, keys: jax.Array, alpha: float, bias: jax.Array | None) -> jax.Array:
    """float32 alpha * x [R, D] @ keys^T [D, Lk] + bias, [R, Lk]."""
    return product(x, keys, bias, Params(alpha, 1.0, jnp.dtype(jnp.float32), transpose_rhs=True))


def _over_keys(weights: jax.Array, x: jax.Array, lengths: jax.Array | None, alpha: float) -> jax.Array:
    """alpha * weights [*, R, Lk] @ x [*, Lk, D] over the first `lengths` [*, R] keys; what is not finite is NaN."""
    if lengths is None:
        out = product(weights, x, None, Params(alpha, 1.0, x.dtype))
    else:
        finite = jnp.abs(x) < math.inf
        place = jnp.arange(x.shape[-2], dtype=jnp.int32)[:, None]
        first = jnp.where(finite, jnp.int32(x.shape[-2]), place).min(-2, keepdims=True)
        out = product(weights, jnp.where(finite, x, jnp.zeros_like(x)), None, Params(alpha, 1.0, x.dtype))
        out = jnp.where(first < lengths[..., None], jnp.asarray(math.inf, out.dtype), out)
    return _finite_or_nan(out)


def _finite_or_nan(x: jax.Array) -> jax.Array:
    """What `programs.FINITE_OR_NAN` computes. No arithmetic: patterns are selected, which XLA fuses and no engine compiles."""
    fmt, bits = float_format(x.dtype.name), storage_bits(x)
    exponent = fmt.storage.type(fmt.nan >> fmt.mantissa_bits << fmt.mantissa_bits)
    return lax.bitcast_convert_type(jnp.where(bits & exponent == exponent, fmt.storage.type(fmt.nan), bits), x.dtype)


def _together(call: _Call, entry: _Entry, start: int, stop: int, keys: int) -> jax.Array:
    """The output [G, l, Ev] of some queries of an entry, which admit some of the first `keys` keys."""
    key, value, bias = call.in_order(entry)
    if bias is not None:
        bias = bias.reshape(-1, call.layout.queries, call.layout.keys)[:, start:stop, :keys].reshape(-1, keys)
    query = entry.query[:, start:stop]
    rows = query.shape[0] * query.shape[1]
    lengths = None if entry.lengths is None else entry.lengths[:, start:stop].reshape(rows)
    scores = _scores(query.reshape(rows, -1), key[:keys], call.scale, bias)
    weights = _softmax(query.dtype, x=scores, length=lengths).y
    return _over_keys(weights, value[:keys], lengths, 1.0).reshape(*query.shape[:2], -1)


def _blocks(call: _Call) -> Iterator[tuple[int, int, int]]:
    """(start, stop, keys) of the queries of an entry that are worked on together."""
    queries, keys = call.layout.queries, call.layout.keys
    block = max(1, min(queries, CHUNK // (call.query.shape[1] * keys)))
    if call.is_causal:
        block = min(block, max(CAUSAL_BLOCK, -(-queries // CAUSAL_BLOCKS)))
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        yield start, stop, min(stop, keys) if call.is_causal else keys


def _row_weights(call: _Call, entry: _Entry, row: _Row, order: jax.Array) -> jax.Array:
    """The softmax [G, Lk] of a query's rows, in the order of each."""
    scores = _in_order(_scores(row.query, entry.key, call.scale, _rows_of(row.bias, row.query)), order)
    return _softmax(row.query.dtype, x=scores, length=row.lengths).y


def _rows_of(bias: jax.Array | None, query: jax.Array) -> jax.Array | None:
    return None if bias is None else jnp.broadcast_to(bias, (len(query), bias.shape[-1]))


def _in_order(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [G, Lk] in the order [G or 1, Lk] of each row."""
    return jnp.take_along_axis(x, jnp.broadcast_to(order, x.shape), -1)


def _row_product(weights: jax.Array, x: jax.Array, row: _Row, order: jax.Array, alpha: float) -> jax.Array:
    """alpha * weights [G, Lk] @ x [Lk, D] over the keys that each row admits, [G, D]."""
    if len(order) == 1:
        return _over_keys(weights, x[order[0]], row.lengths, alpha)
    return _over_keys(weights[:, None], x[order], row.lengths[:, None], alpha)[:, 0]


def _forward(e: SimpleNamespace, is_causal: bool, scale: float, enable_gqa: bool) -> dict[str, jax.Array]:
    layout = layout_of(e.query, e.key, e.value, e.attn_mask, enable_gqa)
    shape = (*layout.out, layout.queries, e.value.shape[-1])
    if not math.prod(shape) or not layout.keys:
        return {"y": jnp.zeros(shape, e.query.dtype)}
    call = _Call(e, None, is_causal, scale, enable_gqa)

    def one(entry: _Entry, by_row: bool) -> jax.Array:
        if not by_row:
            return jnp.concatenate([_together(call, entry, *block) for block in _blocks(call)], 1)

        def rows(row: _Row) -> jax.Array:
            order = row_order(row.admitted)
            return _row_product(_row_weights(call, entry, row, order), entry.value, row, order, 1.0)

        return jnp.moveaxis(call.over_rows(rows, entry), 0, 1)

    return {"y": join(call.over_entries(one), layout, layout.batch, shape)}


def _gradient(s: SimpleNamespace, g: SimpleNamespace, is_causal: bool, scale: float, enable_gqa: bool) -> dict[str, jax.Array]:
    operands = {name: getattr(s, name) for name in ("query", "key", "value", "attn_mask")}
    if not g.y.size or not s.key.shape[-2]:
        return {name: jnp.zeros_like(x) for name, x in operands.items() if x is not None}
    call = _Call(SimpleNamespace(**operands), g.y.astype(s.query.dtype), is_causal, scale, enable_gqa)
    layout = call.layout
    of_mask = "attn_mask" in s.needs
    of = call.over_entries(lambda entry, by_row: (_row_gradients if by_row else _entry_gradients)(call, entry, of_mask))
    gradients = {
        "query": join(of.query, layout, layout.query, s.query.shape),
        "key": join(of.key[:, None], layout, layout.key, s.key.shape),
        "value": join(of.value[:, None], layout, layout.value, s.value.shape),
    }
    if of_mask:
        assert layout.mask is not None
        ds = join(of.scores, layout, layout.batch, (*layout.batch, layout.queries, layout.keys))
        dims = [i for i, (own, n) in enumerate(zip(layout.mask, ds.shape, strict=True)) if own != n]
        dtype = s.attn_mask.dtype
        gradients["attn_mask"] = (sum_over(ds, dim=dims, dtype=dtype) if dims else ds.astype(dtype)).reshape(s.attn_mask.shape)
    return gradients


def _entry_gradients(call: _Call, entry: _Entry, of_mask: bool) -> _Gradients:
    assert entry.g is not None
    key, value, bias = call.in_order(entry)
    query, g = (x.reshape(-1, x.shape[-1]) for x in (entry.query, entry.g))
    rows, lengths = entry.query.shape[:2], None if entry.lengths is None else entry.lengths.reshape(-1)
    weights = _softmax(query.dtype, x=_scores(query, key, call.scale, bias), length=lengths).y
    ds = _softmax_backward(query.dtype, y=weights, g=_scores(g, value, 1.0, None), length=lengths).dx
    dquery = _over_keys(ds, key, lengths, call.scale).reshape(entry.query.shape)
    weights, ds = weights.reshape(*rows, -1), ds.reshape(*rows, -1)
    dkey, dvalue = _of_keys(call, entry, weights, ds)
    if entry.order is not None:
        back = jnp.argsort(entry.order)
        dkey, dvalue, ds = dkey[back], dvalue[back], ds[..., back]
    return _Gradients(dquery, dkey, dvalue, ds if of_mask else None)


def _row_gradients(call: _Call, entry: _Entry, of_mask: bool) -> _Gradients:
    assert entry.g is not None
    assert entry.lengths is not None

    def rows(row: _Row) -> tuple[jax.Array, jax.Array, jax.Array]:
        assert row.g is not None
        order = row_order(row.admitted)
        weights = _row_weights(call, entry, row, order)
        dweights = _in_order(_scores(row.g, entry.value, 1.0, None), order)
        ds = _softmax_backward(weights.dtype, y=weights, g=dweights, length=row.lengths).dx
        back = jnp.argsort(order, -1)
        return _row_product(ds, entry.key, row, order, call.scale), _in_order(weights, back), _in_order(ds, back)

    dquery, weights, ds = (jnp.moveaxis(x, 0, 1) for x in call.over_rows(rows, entry))
    dkey, dvalue = _of_keys(call, entry, weights, ds)
    return _Gradients(dquery, dkey, dvalue, ds if of_mask else None)


def _of_keys(call: _Call, entry: _Entry, weights: jax.Array, ds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, sums over rows, from the weights and the gradient of the scores [G, Lq, Lk].

    What a row that admits no key holds does not matter.
    """

    def product_over_rows(x: jax.Array, rows: jax.Array | None, alpha: float) -> jax.Array:
        assert rows is not None
        if entry.lengths is not None:
            rows = jnp.where(entry.lengths[..., None] > 0, rows, jnp.zeros_like(rows))
        x, rows = (jnp.swapaxes(y, 0, 1).reshape(-1, y.shape[-1]) for y in (x, rows))
        return product(x, rows, None, Params(alpha, 1.0, rows.dtype, transpose_lhs=True))

    return product_over_rows(ds, entry.query, call.scale), product_over_rows(weights, entry.g, 1.0)


def layout_of(query: Any, key: Any, value: Any, attn_mask: Any, enable_gqa: bool) -> AttentionLayout:
    """The layout of these operands."""
    mask = None if attn_mask is None else attn_mask.shape
    return attention_layout(query.shape, key.shape, value.shape, mask, enable_gqa)


@functools.cache
def attention(is_causal: bool, scale: float, enable_gqa: bool) -> Op:
    """The op of these parameters."""
    return Op(
        NAME,
        lambda e: _forward(e, is_causal, scale, enable_gqa),
        keep=("query", "key", "value", "attn_mask"),
        gradient=lambda s, g: _gradient(s, g, is_causal, scale, enable_gqa),
    )
