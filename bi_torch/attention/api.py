"""scaled_dot_product_attention. `shared_specs.attention` states its bits, and what of its gradients depends on the batch."""

import math

import torch
from torch import Tensor

from bi_torch.attention.calls import call_key, kept_call, new_call
from bi_torch.attention.library import attention, layout_of
from bi_torch.direct import repeat
from bi_torch.rows.arguments import FLOATS, check_tensor

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax(scale * query @ key^T + mask) @ value.

    A key that the mask leaves out takes no place: a padded or gapped sequence has the bits of the same sequence without
    padding, and what is left out may be NaN. A row that admits no key gives zeros; an output that is not finite is NaN.

    Args:
        query: [*, Lq, E] of bfloat16, float16 or float32.
        key: [*, Lk, E] of the same dtype; batch dimensions broadcast.
        value: [*, Lk, Ev] of the same dtype.
        attn_mask: broadcastable to [*, Lq, Lk]: bool, True where a key is admitted, or float32 or the query's dtype, added to
            the scores; -inf leaves a key out. An in-place change that PyTorch does not see (through `.data`, or another
            library) must not be made to a mask on a GPU between two calls.
        dropout_p: must be 0.
        is_causal: query i admits keys 0..i.
        scale: 1 / sqrt(E) by default.
        enable_gqa: query has a multiple of the heads of key and value (dimension -3); neighbouring heads share keys.

    Returns:
        [*, Lq, Ev] of the query's dtype, contiguous.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: shapes do not fit, dtypes are mixed or not supported, tensors are on different devices, `attn_mask` and
            `is_causal` are both given.
        NotImplementedError: dropout_p is not 0.
    """
    known = call_key(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if (call := kept_call(known)) is not None:
        return repeat(call, (query, key, value, attn_mask))
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(_OP, name, x, FLOATS if x is query else (query.dtype,), like=query if x is not query else None)
    if attn_mask is not None:
        check_tensor(_OP, "attn_mask", attn_mask, (torch.bool, torch.float32, query.dtype), like=query)
        if is_causal:
            raise RuntimeError(f"bi_torch.{_OP}: attn_mask must be None if is_causal is set")
    if dropout_p:
        raise NotImplementedError(f"bi_torch.{_OP}: dropout_p must be 0, got {dropout_p}")
    try:
        layout = layout_of(query, key, value, attn_mask, enable_gqa)
    except ValueError as error:
        raise RuntimeError(f"bi_torch.{_OP}: {error}") from None
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else math.inf
    if known is not None:
        call = new_call(known, layout, (query, key, value), attn_mask, is_causal, float(scale), enable_gqa)
        if call is not None:
            return repeat(call, (query, key, value, attn_mask))
    return attention(query, key, value, attn_mask, is_causal, float(scale), enable_gqa)
