"""scaled_dot_product_attention. `shared_specs.attention` states its bits, and what of its gradients depends on the batch."""

import math

import jax
import numpy as np

from bi_jax.attention.op import NAME, attention, layout_of
from bi_jax.rows.arguments import array


def scaled_dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> jax.Array:
    """torch.nn.functional.scaled_dot_product_attention: softmax(scale * query @ key^T + mask) @ value.

    A key that the mask leaves out takes no place: a padded or gapped sequence has the bits of the same sequence without
    padding, and what is left out may be NaN. A row that admits no key gives zeros; an output that is not finite is NaN.

    Without a mask, with `is_causal` and with a mask that is the same for all queries, a program is short. For any other mask
    it has two ways and takes one by the mask's data: a fast one for padded batches, a general one.

    Args:
        query: [*, Lq, E] of bfloat16, float16 or float32.
        key: [*, Lk, E] of the same dtype; batch dimensions broadcast.
        value: [*, Lk, Ev] of the same dtype.
        attn_mask: broadcastable to [*, Lq, Lk]: bool, True where a key is admitted, or float32 or the query's dtype, added to
            the scores; -inf leaves a key out.
        dropout_p: must be 0.
        is_causal: query i admits keys 0..i; static.
        scale: 1 / sqrt(E) by default; static.
        enable_gqa: query has a multiple of the heads of key and value (dimension -3); neighbouring heads share keys.

    Returns:
        [*, Lq, Ev] of the query's dtype.

    Raises:
        TypeError: an argument is no array, dtypes are mixed or not supported, `scale` is traced.
        ValueError: shapes do not fit, `attn_mask` and `is_causal` are both given.
        NotImplementedError: dropout_p is not 0.
    """
    query = array(NAME, "query", query)
    key, value = (array(NAME, name, x, (query.dtype.name,)) for name, x in (("key", key), ("value", value)))
    if attn_mask is not None:
        attn_mask = array(NAME, "attn_mask", attn_mask, tuple(dict.fromkeys(("bool", "float32", query.dtype.name))))
        if is_causal:
            raise ValueError(f"bi_jax.{NAME}: attn_mask must be None if is_causal is set")
    if dropout_p:
        raise NotImplementedError(f"bi_jax.{NAME}: dropout_p must be 0, got {dropout_p}")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else math.inf
    if not isinstance(scale, int | float | np.number):
        raise TypeError(f"bi_jax.{NAME}: scale must be a number that is known when tracing, got {type(scale).__name__}")
    try:
        layout_of(query, key, value, attn_mask, enable_gqa)
    except ValueError as error:
        raise ValueError(f"bi_jax.{NAME}: {error}") from None
    op = attention(bool(is_causal), float(np.float32(scale)), bool(enable_gqa))
    return op(query.dtype, query=query, key=key, value=value, attn_mask=attn_mask).y
