"""Tensors of any batch dimensions as [entries, groups, *, *] and back, as `shared_specs.attention` lays them out."""

import math
from functools import lru_cache

from torch import Tensor

from bi_torch.rows.reduce import sum as sum_over
from shared_specs.attention import AttentionLayout, Shape


def split(x: Tensor, layout: AttentionLayout, own: Shape, *, groups: bool = True) -> Tensor:
    """x [*, L, D], of batch dimensions `own`, as [N, G, L, D]; where it has no groups G is 1, or left out."""
    sizes, order, leading = _entries_first(layout, own)
    tail = x.shape[-2:]
    if sizes != own or order is not None:
        x = x.reshape(*own, *tail).expand(*sizes, *tail)
        x = x if order is None else x.permute(*order, len(own), len(own) + 1)
    return x.reshape(*(leading if groups else leading[:1]), *tail)


def is_in_order(layout: AttentionLayout) -> bool:
    """Whether what is [N, G, L, D] is [*, L, D] with the layout's batch dimensions, too."""
    return _entries_first(layout, layout.batch)[1] is None


@lru_cache(maxsize=1 << 10)
def _entries_first(layout: AttentionLayout, own: Shape) -> tuple[Shape, Shape | None, Shape]:
    """Batch dimensions repeated along the entries, their order with entries first if that is another one, and [N, G]."""
    sizes, order = layout.expanded(own), (*layout.entries, *layout.groups)
    leading = layout.entry_count, math.prod(sizes[i] for i in layout.groups)
    return sizes, None if order == tuple(range(len(order))) else order, leading


def join(x: Tensor, layout: AttentionLayout, own: Shape, shape: Shape) -> Tensor:
    """The inverse of `split`, in the shape of the operand: what belongs to one element of it is summed."""
    sizes, order, _ = _entries_first(layout, own)
    if sizes != own or order is not None:
        order, tail = (*layout.entries, *layout.groups), x.shape[-2:]
        x = x.reshape(*(sizes[i] for i in order), *tail)
        x = x.permute(*(order.index(i) for i in range(len(own))), len(own), len(own) + 1)
        if repeated := layout.repeated(own):
            x = sum_over(x, dim=repeated)
    return x.reshape(shape)
