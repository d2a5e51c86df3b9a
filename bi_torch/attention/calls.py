"""Calls that are one launch or a few: attention on a GPU without a mask or with a boolean one, fused or in one chunk.

What depends on shapes alone is decided once and kept, as for products (`bi_torch.gemm.library`) and rows: which launches, with
which schedules, on which views. No tensor is kept but what was found in a mask, and that as long as the mask lives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bi_torch.attention import library
from bi_torch.attention.cuda import Settle, Take
from bi_torch.attention.fused import Fused, Strides, is_faster, strides_of
from bi_torch.attention.keys import read_mask, remember
from bi_torch.attention.layout import is_in_order, split
from bi_torch.device import bind_context, new_tensor
from bi_torch.direct import keep, kernel_device, signature
from bi_torch.gemm import cuda as products
from bi_torch.gemm.library import DTYPE_NAMES
from bi_torch.rows import cuda as rows
from bi_torch.stock import runs_stock
from shared_specs import gemm_contract
from shared_specs.attention import AttentionLayout
from shared_specs.programs.attention import attention_softmax

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Launches:
    """What is launched for operands [N, R, E], [N, K, E] and [N, K, Ev].

    Attributes:
        key, value: copies of them, where the products cannot read what is there.
        shape: of the output.
        settle: what is not finite, where rows do not admit all keys; else it is in the product.
    """

    key: Take | None
    value: Take | None
    scores: products.Plan
    softmax: rows.Plan
    product: products.Plan
    settle: Settle | None
    scores_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor | None,
        order: Tensor | None,
        causal: tuple[int, int] | None,
        scale: float,
    ) -> "_Launches":
        """`lengths` and `order` of all rows and entries for a mask; `causal`: all rows, and the queries among them."""
        contract, device, dtype = gemm_contract(DTYPE_NAMES[query.dtype]), query.device, query.dtype
        (n, r, _), (_, k, d) = query.shape, value.shape
        take_key = take_value = settle = None
        if order is not None:
            take_key = Take.of(key, order, finite=False)
            key = new_tensor(take_key.shape, dtype, device)
        if lengths is not None or causal is not None:
            take_value = Take.of(value, order, finite=True, causal=causal)
            value = new_tensor(take_value.shape, dtype, device)
            assert take_value.first is not None
            settle = Settle.of((n, r, d), take_value.first[1])
            lengths = new_tensor((n * r,), torch.int32, device)
        scores, out = new_tensor((n, r, k), torch.float32, device), new_tensor((n, r, d), dtype, device)
        given = [scores.view(n * r, k)] if lengths is None else [scores.view(n * r, k), lengths]
        return _Launches(
            take_key,
            take_value,
            products.plan_of(query, key.mT, None, scores, scale, contract),
            rows.prepare(attention_softmax(lengths is not None), given, {"y": dtype}),
            products.plan_of(new_tensor((n, r, k), dtype, device), value, None, out, 1.0, contract, finite=settle is None),
            settle,
            (n, r, k),
            shape,
        )

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, order: Tensor | None, scale: float
    ) -> Tensor:
        """On the current stream of the current device, which is that of the tensors."""
        device, first = query.get_device(), None
        if self.key is not None:
            key, _, _ = self.key(device, key, order)
        if self.value is not None:
            value, first, causal = self.value(device, value, order)
            lengths = causal if lengths is None else lengths
        scores = new_tensor(self.scores_shape, torch.float32, query.device)
        self.scores.launch(query, key, None, scores, scale, 1.0)
        weights = self.softmax.run([scores] if lengths is None else [scores, lengths], (), ())["y"]
        out = new_tensor(self.shape, query.dtype, query.device)
        self.product.launch(weights, value, None, out, 1.0, 1.0)
        if self.settle is not None and first is not None and lengths is not None:
            self.settle(device, out, first, lengths)
        return out


@dataclass(frozen=True, eq=False)
class Call:
    """Attention for all arguments of one key.

    Attributes:
        strides: of the operands, if one launch takes them as they are.
        copies: else how query, key and value come to be [N, *, *] in memory, None where they are; empty if all are.
        launches: by whether the mask has an order of keys.
    """

    layout: AttentionLayout
    strides: Strides | None
    copies: tuple[Callable[[Tensor], Tensor] | None, ...]
    is_causal: bool
    scale: float
    enable_gqa: bool
    launches: dict[bool, "_Launches | Fused"] = field(default_factory=dict)

    def __call__(self, given: Sequence[Any]) -> Tensor:
        query, key, value, mask = given
        lengths = order = None
        if mask is not None:
            found = None
            if not (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
                found = remember(mask, (self,), lambda: self._rows(mask))
            if found is None:
                return self._by_chunks(query, key, value, mask)
            lengths, order = found
        bind_context()
        launches = self.launches.get(order is not None)
        if launches is None and self.strides is None:
            query, key, value = self.operands(query, key, value)
        elif self.copies:
            query, key, value = [
                x if copy is None else copy(x) for copy, x in zip(self.copies, (query, key, value), strict=True)
            ]
        device = query.get_device()
        if device == torch._C._cuda_getDevice():
            return self._launch(launches, query, key, value, lengths, order)
        with torch.cuda.device(device):
            return self._launch(launches, query, key, value, lengths, order)

    def _launch(
        self,
        launches: _Launches | Fused | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor | None,
        order: Tensor | None,
    ) -> Tensor:
        if launches is None:
            shape = (*self.layout.out, self.layout.queries, value.shape[-1])
            if self.strides is not None:
                head, asked = (key.shape[-1], value.shape[-1]), (self.is_causal, lengths is not None, order is not None)
                launches = Fused.of(shape, self.layout, self.strides, head, self.scale, *asked)
            else:
                causal = (query.shape[0] * query.shape[1], self.layout.queries) if self.is_causal else None
                launches = _Launches.of(shape, query, key, value, lengths, order, causal, self.scale)
            self.launches[order is not None] = launches
        return launches(query, key, value, lengths, order, self.scale)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[N, R, E], [N, K, E] and [N, K, Ev]; of causal attention without the keys that no query admits."""
        layout = self.layout
        query = split(query, layout, layout.query).flatten(1, 2)
        key, value = split(key, layout, layout.key, groups=False), split(value, layout, layout.value, groups=False)
        if self.is_causal and layout.queries < layout.keys:
            key, value = key[:, : layout.queries], value[:, : layout.queries]
        return [query, key, value]

    @runs_stock
    def _by_chunks(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return library.by_chunks(library.CUDA, query, key, value, mask, self.is_causal, self.scale, self.enable_gqa)

    @runs_stock
    def _rows(self, mask: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The lengths of all rows, and the order of the keys of all entries, int32; None if every row has its own order."""
        layout, of_mask = self.layout, read_mask(mask, self.layout)
        keys = library.mask_keys(mask, of_mask.admitted)
        if keys.by_row or keys.lengths is None:
            return None
        order = None if keys.order is None else keys.order.index_select(0, of_mask.owner).to(torch.int32)
        lengths = keys.lengths.index_select(0, of_mask.owner)
        return lengths.expand(layout.entry_count, layout.group_count, layout.queries).reshape(-1).contiguous(), order


CALLS: dict[Key, Call] = {}


def call_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Key | None:
    """What decides how a call is made, and whether it may; None where it cannot be mere launches."""
    tensors = query, key, value, attn_mask
    if kernel_device(tensors) != "cuda" or dropout_p or type(scale) not in (float, int, type(None)):
        return None
    return _key(tensors, is_causal, scale, enable_gqa)


def _key(tensors: tuple[Tensor | None, ...], is_causal: bool, scale: float | None, enable_gqa: bool) -> Key:
    return *map(signature, tensors), bool(is_causal), None if scale is None else float(scale).hex(), bool(enable_gqa)


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """The op on a GPU."""
    known = _key((query, key, value, attn_mask), is_causal, scale, enable_gqa)
    call = CALLS.get(known)
    if call is None:
        layout = library.layout_of(query, key, value, attn_mask, enable_gqa)
        call = new_call(known, layout, (query, key, value), attn_mask, is_causal, scale, enable_gqa)
    if call is None:
        return library.by_chunks(library.CUDA, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return call((query, key, value, attn_mask))


def kept_call(key: Key | None) -> Call | None:
    """The call of a key, if it was made before; its arguments were checked then."""
    return None if key is None else CALLS.get(key)


def new_call(
    key: Key,
    layout: AttentionLayout,
    tensors: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Call | None:
    """The call of a key, of arguments that were checked; None if it is no mere launches."""
    if not all(x.numel() for x in tensors) or not is_in_order(layout):
        return None
    if attn_mask is not None and (is_causal or attn_mask.dtype is not torch.bool):
        return None
    one_chunk = library.is_one_chunk(layout, is_causal)
    if not one_chunk or is_faster(layout, max(tensors[0].shape[-1], tensors[2].shape[-1])):
        strides = strides_of(layout, *tensors)
        if strides is not None:
            return keep(CALLS, key, Call(layout, strides, (), is_causal, scale, enable_gqa))
    if not one_chunk:
        return None
    call = Call(layout, None, (), is_causal, scale, enable_gqa)
    viewed = [x.data_ptr() == y.data_ptr() for x, y in zip(tensors, call.operands(*tensors), strict=True)]
    if not all(viewed):
        own = layout.query, layout.key, layout.value
        call = replace(call, copies=tuple(None if seen else _copy(layout, n) for seen, n in zip(viewed, own, strict=True)))
    return keep(CALLS, key, call)


def _copy(layout: AttentionLayout, own: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A function that makes an operand of batch dimensions `own` [N, *, *] in memory, for a layout that is in order."""
    if layout.expanded(own) == own:
        return Tensor.contiguous
    return partial(split, layout=layout, own=own)
