"""The op `bi_torch::scaled_dot_product_attention` and its gradients, composed of the ops of products and rows.

A batch entry (`shared_specs.attention` says what that is) is one product of all rows that share its keys with these keys.
Entries and queries are worked on in chunks, so that no more than `CHUNK` scores are in memory at a time; no bit depends on
it. The gradient computes the scores again instead of keeping them.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bi_torch.attention import cuda
from bi_torch.attention.keys import Keys, causal_keys, mask_keys, read_mask, row_order
from bi_torch.attention.layout import join, split
from bi_torch.gemm.library import gemm
from bi_torch.rows.library import Op, RowOp
from bi_torch.rows.reduce import sum as sum_over
from shared_specs.attention import AttentionLayout, Shape, attention_layout
from shared_specs.programs import attention as programs

CHUNK = 1 << 27
"""float32 scores, or gathered keys or values, of a chunk."""
CAUSAL_BLOCK = 512
"""Queries of a chunk of causal attention, which leaves out the keys behind the last of them."""

_softmax = RowOp(
    "attention_softmax(Tensor x, Tensor? length, ScalarType dtype) -> Tensor y",
    lambda e: programs.attention_softmax(e.length is not None),
)
_softmax_backward = RowOp(
    "attention_softmax_backward(Tensor y, Tensor g, Tensor? length, ScalarType dtype) -> Tensor dx",
    lambda e: programs.attention_softmax_backward(e.length is not None),
)
_finite_or_nan = RowOp("finite_or_nan(Tensor x, ScalarType dtype) -> Tensor y", programs.FINITE_OR_NAN)


class _Chunk(NamedTuple):
    """Entries and queries that are worked on together, and the first keys, of which they admit some."""

    entries: slice
    queries: slice
    keys: slice


class Engine(NamedTuple):
    """What a device does beside products and rows.

    Attributes:
        values: x [N, K, D] with 0 for what is not finite, and int32 [N, parts, D] where each column has it first; the least
            of its parts counts, K is nowhere.
        settle: y [N, R, D], which may be changed, with NaN for what is not finite and where `first` is less than the length
            [N, R] of a row, int32.
    """

    values: Callable[[Tensor], tuple[Tensor, Tensor]]
    settle: Callable[[Tensor, Tensor, Tensor], Tensor]


def _values_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = x.abs() < math.inf
    place = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[:, None]
    return torch.where(finite, x, 0), torch.where(finite, x.shape[1], place).amin(1, keepdim=True)


def _settle_on_cpu(y: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    return _only_finite(y.masked_fill_(first < lengths[..., None], math.inf))


def _only_finite(y: Tensor) -> Tensor:
    """y [N, R, D], contiguous, with NaN for what is not finite."""
    return _finite_or_nan.on_views((y, y.dtype), lambda: (y.flatten(0, 1), y.dtype), lambda x: x.view(y.shape))


CPU = Engine(_values_on_cpu, _settle_on_cpu)
CUDA = Engine(cuda.values, cuda.settle)


class _Operand(NamedTuple):
    """Keys or values [N, Lk, D], and where they are not finite first, as `Engine.values` gives them.

    `first` is None where every row admits all keys.
    """

    x: Tensor
    first: Tensor | None


class _Attention:
    """The operands of a call on entries [N], groups [G] and queries, and the keys that they admit, in order."""

    def __init__(
        self,
        engine: Engine,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        gqa: bool,
    ) -> None:
        self.engine = engine
        self.layout = layout = layout_of(query, key, value, attn_mask, gqa)
        self.query = split(query, layout, layout.query)
        self.key = split(key, layout, layout.key, groups=False)
        self.value = split(value, layout, layout.value, groups=False)
        self.scale, self.is_causal = scale, is_causal
        self.mask = None if attn_mask is None else read_mask(attn_mask, layout)
        if attn_mask is not None and self.mask is not None:
            self.keys = mask_keys(attn_mask, self.mask.admitted)
        else:
            self.keys = causal_keys(layout, query.device) if is_causal else Keys(None)
        self.bias = None if self.mask is None else self.mask.bias
        self.order: Tensor | None = None
        if self.keys.order is not None and self.mask is not None:
            self.order = self.keys.order.index_select(0, self.mask.owner)[..., None]
            self.key, self.value = (x.gather(1, self.order.expand(x.shape)) for x in (self.key, self.value))
            if self.bias is not None:
                self.bias = self.bias.gather(-1, self.keys.order[:, None, None].expand(self.bias.shape))

    def chunks(self, *, whole: bool = False) -> Iterator[_Chunk]:
        """All of the work, the queries of the first entries first; `whole`: only so many entries that all their scores fit."""
        (n, groups, length, _), keys = self.query.shape, self.layout.keys
        cost = groups * keys
        if self.keys.by_row:
            cost += (groups if self._own_groups() else 1) * keys * max(self.key.shape[-1], self.value.shape[-1])
        entries, queries = _chunk_extents(length, cost, self.is_causal, whole)
        for i in range(0, n, entries):
            for j in range(0, length, queries):
                end = min(j + queries, length)
                yield _Chunk(slice(i, min(i + entries, n)), slice(j, end), slice(0, min(end, keys) if self.is_causal else keys))

    def lengths(self, chunk: _Chunk) -> Tensor | None:
        """int32 [n, G, l], or None if every row admits all keys."""
        return None if self.keys.lengths is None else self._expanded(self._part(self.keys.lengths, chunk), chunk)

    def row_order(self, chunk: _Chunk) -> Tensor | None:
        """int64 [n or 1, G or 1, l or 1, Lk] if every row has an order of its own."""
        if not self.keys.by_row or self.mask is None:
            return None
        return row_order(self._part(self.mask.admitted, chunk))

    def operand(self, x: Tensor) -> _Operand:
        """Keys or values as the right side of `product`."""
        return _Operand(x, None) if self.keys.lengths is None or self.keys.by_row else _Operand(*self.engine.values(x))

    def scores(self, x: Tensor, keys: Tensor, chunk: _Chunk, order: Tensor | None, alpha: float, bias: Tensor | None) -> Tensor:
        """float32 alpha * x [n, G, l, D] @ keys^T [N, D, Lk] + bias as [n, G, l, Lk], in the order of each row."""
        y = gemm(x.flatten(1, 2), _cut(keys, chunk.entries, chunk.keys).mT, bias, alpha, 1.0, torch.float32)
        y = y.view(*x.shape[:3], y.shape[-1])
        return y if order is None else y.gather(-1, order.expand(y.shape))

    def weights(self, chunk: _Chunk, order: Tensor | None) -> Tensor:
        """The softmax [n, G, l, Lk] of a chunk."""
        bias = None
        if self.bias is not None:
            bias = self._expanded(self._part(self.bias, chunk), chunk).flatten(1, 2)
        scores = self.scores(self.rows(self.query, chunk), self.key, chunk, order, self.scale, bias)
        lengths = self.lengths(chunk)
        lengths = None if lengths is None else lengths.reshape(-1)
        dtype = self.query.dtype
        return _softmax.on_views(
            (scores, lengths, dtype),
            lambda: (scores.flatten(0, 2), lengths, dtype),
            lambda y: y.view(scores.shape),
        )

    def product(self, weights: Tensor, operand: _Operand, chunk: _Chunk, order: Tensor | None, alpha: float) -> Tensor:
        """alpha * weights [n, G, l, Lk] @ operand [N, Lk, D] over the keys that each row admits, [n, G, l, D]."""
        n, groups, queries, _ = weights.shape
        lengths, x = self.lengths(chunk), _cut(operand.x, chunk.entries, chunk.keys)
        if order is None:
            first = None if operand.first is None else _cut(operand.first, chunk.entries)
            weights, lengths = weights.flatten(1, 2), None if lengths is None else lengths.flatten(1, 2)
            return self._product(weights, _Operand(x, first), lengths, alpha).view(n, groups, queries, -1)
        assert lengths is not None
        own = self._own_groups()
        order = order.expand(n, groups if own else 1, queries, order.shape[-1]).flatten(1, 3)
        x = x.gather(1, order[..., None].expand(*order.shape, x.shape[-1])).unflatten(1, (-1, weights.shape[-1])).flatten(0, 1)
        operand = _Operand(*self.engine.values(x))
        if own:  # a product for each row
            weights, lengths = weights.flatten(0, 2)[:, None], lengths.flatten(0, 2)[:, None]
            return self._product(weights, operand, lengths, alpha).view(n, groups, queries, -1)
        weights, lengths = weights.transpose(1, 2).flatten(0, 1), lengths.transpose(1, 2).flatten(0, 1)
        return self._product(weights, operand, lengths, alpha).view(n, queries, groups, -1).transpose(1, 2)

    def _product(self, weights: Tensor, operand: _Operand, lengths: Tensor | None, alpha: float) -> Tensor:
        """alpha * weights [U, R, K] @ operand [U, K, D]; NaN where a row admits a number that is not finite, or gives one."""
        y = gemm(weights, operand.x, None, alpha, 1.0, operand.x.dtype)
        return _only_finite(y) if operand.first is None or lengths is None else self.engine.settle(y, operand.first, lengths)

    def reached(self, x: Tensor) -> Tensor:
        """x [N, G, Lq, D] with zeros in the rows that admit no key."""
        n, _, queries, _ = x.shape
        lengths = self.lengths(_Chunk(slice(0, n), slice(0, queries), slice(0, self.layout.keys)))
        return x if lengths is None else torch.where(lengths[..., None] > 0, x, 0)

    def _own_groups(self) -> bool:
        """True if rows that share keys do not share an order of them."""
        return self.mask is not None and self.mask.admitted.shape[1] > 1

    def _part(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """A chunk of what a mask tells, [entries, G or 1, Lq or 1, *]."""
        x = x if len(x) == 1 or self.mask is None else x.index_select(0, self.mask.owner[chunk.entries])
        return x if x.shape[2] == 1 else self.rows(x, chunk._replace(entries=slice(0, len(x))))

    def rows(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Entries and queries of x [N, *, Lq, *]."""
        return _cut(x, chunk.entries, slice(0, x.shape[1]), chunk.queries)

    def _expanded(self, x: Tensor, chunk: _Chunk) -> Tensor:
        n, queries = (part.stop - part.start for part in chunk[:2])
        return x.expand(n, self.query.shape[1], queries, *x.shape[3:])


def _chunk_extents(queries: int, cost: int, is_causal: bool, whole: bool = False) -> tuple[int, int]:
    """Entries and queries of a chunk; `cost` is that of a query of an entry, which has `queries`."""
    part = max(1, min(queries, CHUNK // cost, CAUSAL_BLOCK if is_causal else queries))
    return max(1, CHUNK // (cost * (queries if whole else part))), part


def is_one_chunk(layout: AttentionLayout, is_causal: bool) -> bool:
    """Whether all of the work is one chunk, where no row has an order of its own."""
    entries, queries = _chunk_extents(layout.queries, layout.group_count * layout.keys, is_causal)
    return entries >= layout.entry_count and queries == layout.queries


def _cut(x: Tensor, *parts: slice) -> Tensor:
    """x[parts], which costs nothing where they are whole dimensions."""
    whole = all(part.start == 0 and part.stop == n for part, n in zip(parts, x.shape, strict=False))
    return x if whole else x[parts]


def layout_of(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> AttentionLayout:
    """The layout of these operands."""
    shapes = query.shape, key.shape, value.shape, None if attn_mask is None else attn_mask.shape
    if torch.compiler.is_compiling():
        return attention_layout(*shapes, enable_gqa)
    try:
        return _known_layout(*shapes, enable_gqa)
    except TypeError:  # sizes of a trace, which cannot be hashed
        return attention_layout(*shapes, enable_gqa)


_known_layout = lru_cache(maxsize=1 << 10)(attention_layout)


def by_chunks(
    engine: Engine,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """The op, one chunk after the other."""
    layout = layout_of(query, key, value, attn_mask, enable_gqa)
    shape = (*layout.out, layout.queries, value.shape[-1])
    if not math.prod(shape) or not layout.keys:
        return query.new_zeros(shape)
    call = _Attention(engine, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    value_operand = call.operand(call.value)
    parts: dict[int, list[Tensor]] = {}
    for chunk in call.chunks():
        order = call.row_order(chunk)
        y = call.product(call.weights(chunk, order), value_operand, chunk, order, 1.0)
        parts.setdefault(chunk.entries.start, []).append(y)
    rows = _concatenated([_concatenated(part, 2) for part in parts.values()], 0)
    return join(rows, layout, layout.batch, shape).contiguous()


def _forward_on_cuda(*arguments: Any) -> Tensor:
    from bi_torch.attention import calls  # which knows this module

    return calls.forward(*arguments)


def _concatenated(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    layout = layout_of(query, key, value, attn_mask, enable_gqa)
    return query.new_empty((*layout.out, layout.queries, value.shape[-1]))


def _backward(
    engine: Engine,
    g: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> tuple[Tensor, ...]:
    if not g.numel() or not key.shape[-2]:
        return tuple(x.zero_() for x in _fake_backward(g, query, key, value))
    call = _Attention(engine, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    g = split(g, call.layout, call.layout.batch)
    # What a row that admits no key holds does not matter: it may be NaN.
    query_rows, g_rows = (call.reached(x).transpose(1, 2) for x in (call.query, g))
    key_operand = call.operand(call.key)
    dquery, dkey, dvalue = [], [], []
    for entries, chunks in groupby(call.chunks(whole=True), key=lambda chunk: chunk.entries):
        n, groups, queries, _ = g[entries].shape
        weights, dscores = (g.new_zeros((n, queries, groups, call.layout.keys)) for _ in range(2))
        parts = []
        for chunk in chunks:
            order = call.row_order(chunk)
            y, ds = _score_gradients(call, g, chunk, order)
            parts.append(call.product(ds, key_operand, chunk, order, scale))
            weights[:, chunk.queries, :, chunk.keys] = _in_place_of_keys(y, order).transpose(1, 2)
            dscores[:, chunk.queries, :, chunk.keys] = _in_place_of_keys(ds, order).transpose(1, 2)
        dquery.append(_concatenated(parts, 2))
        dvalue.append(gemm(weights.flatten(1, 2).mT, g_rows[entries].flatten(1, 2), None, 1.0, 1.0, g.dtype))
        dkey.append(gemm(dscores.flatten(1, 2).mT, query_rows[entries].flatten(1, 2), None, scale, 1.0, g.dtype))
    order = None if call.order is None else call.order.mT

    def of_keys(parts: list[Tensor], own: Shape, like: Tensor) -> Tensor:
        return join(_in_place_of_keys(_concatenated(parts, 0).mT, order).mT[:, None], call.layout, own, like.shape)

    return (
        join(_concatenated(dquery, 0), call.layout, call.layout.query, query.shape).contiguous(),
        of_keys(dkey, call.layout.key, key).contiguous(),
        of_keys(dvalue, call.layout.value, value).contiguous(),
    )


def _mask_backward(
    engine: Engine,
    g: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """The gradient of a float mask: that of the scores, summed where the mask was broadcast."""
    if not g.numel() or not key.shape[-2]:
        return _fake_mask_backward(g, query, key, value, attn_mask).zero_()
    call = _Attention(engine, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    layout = call.layout
    assert layout.mask is not None
    g = split(g, layout, layout.batch)
    parts = []
    for _, chunks in groupby(call.chunks(), key=lambda chunk: chunk.entries):
        rows = []
        for chunk in chunks:
            order = call.row_order(chunk)
            _, ds = _score_gradients(call, g, chunk, order)
            if call.order is not None:
                order = call.order[chunk.entries, None, None, :, 0]
            rows.append(_in_place_of_keys(ds, order))
        parts.append(_concatenated(rows, 2))
    ds = join(_concatenated(parts, 0), layout, layout.batch, (*layout.batch, layout.queries, layout.keys))
    dims = [i for i, (own, n) in enumerate(zip(layout.mask, ds.shape, strict=True)) if own != n]
    ds = sum_over(ds, dim=dims, dtype=attn_mask.dtype) if dims else ds.to(attn_mask.dtype)
    return ds.reshape(attn_mask.shape).contiguous()


def _score_gradients(call: _Attention, g: Tensor, chunk: _Chunk, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights and the gradient of the scores, [n, G, l, Lk] each, for cotangents g [N, G, Lq, Ev]."""
    y = call.weights(chunk, order)
    dy = call.scores(call.rows(g, chunk), call.value, chunk, order, 1.0, None)
    lengths = call.lengths(chunk)
    lengths = None if lengths is None else lengths.reshape(-1)
    return y, _softmax_backward(y.flatten(0, 2), dy.flatten(0, 2), lengths, y.dtype).view(y.shape)


def _in_place_of_keys(x: Tensor, order: Tensor | None) -> Tensor:
    """x [*, Lk], which stands in `order`, at the places of the keys themselves."""
    return x if order is None else torch.empty_like(x).scatter_(-1, order.expand(x.shape), x)


def _fake_backward(g: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _fake_mask_backward(g: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(attn_mask, memory_format=torch.contiguous_format)


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, bool enable_gqa"

_attention_backward = Op(
    f"scaled_dot_product_attention_backward(Tensor g, {_INPUTS}) -> (Tensor dquery, Tensor dkey, Tensor dvalue)",
    cpu=partial(_backward, CPU),
    cuda=partial(_backward, CUDA),
    fake=_fake_backward,
)
_attention_mask_backward = Op(
    f"scaled_dot_product_attention_mask_backward(Tensor g, {_INPUTS.replace('?', '')}) -> Tensor dmask",
    cpu=partial(_mask_backward, CPU),
    cuda=partial(_mask_backward, CUDA),
    fake=_fake_mask_backward,
)


def _gradient(saved: SimpleNamespace, cotangents: SimpleNamespace) -> dict[str, Tensor]:
    arguments = (
        cotangents.y, saved.query, saved.key, saved.value, saved.attn_mask, saved.is_causal, saved.scale, saved.enable_gqa
    )  # fmt: skip
    gradients = {}
    if saved.needs & {"query", "key", "value"}:
        gradients = dict(zip(("query", "key", "value"), _attention_backward(*arguments), strict=True))
    if "attn_mask" in saved.needs:
        gradients["attn_mask"] = _attention_mask_backward(*arguments)
    return gradients


attention = Op(
    f"scaled_dot_product_attention({_INPUTS}) -> Tensor y",
    cpu=partial(by_chunks, CPU),
    cuda=_forward_on_cuda,
    fake=_fake,
    keep=("query", "key", "value", "attn_mask"),
    gradient=_gradient,
)
