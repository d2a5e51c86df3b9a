"""Which keys a row admits, and where they have to stand: behind one another, from the first place on.

Where every row of a batch entry admits the first keys of one common order, the keys are gathered once an entry and a row is
told by a length: so it is without a mask, with a causal one, with a mask that is the same for all queries, and for the masks
of padded batches. Other masks (a window, say) need an order for every row.

Where queries have masks of their own, telling the two apart takes a look at the data: a wait for the GPU. What was seen is
kept as long as the mask lives, so that the layers of a model wait once; while a CUDA graph is captured nothing can be seen,
and every row gets an order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shared_specs.attention import AttentionLayout


class Mask(NamedTuple):
    """A mask on entries and groups; every extent may be 1 where the mask is broadcast, but for that of keys.

    Attributes:
        admitted: bool [entries, groups, Lq, Lk].
        bias: what is added to the scores, in the same shape, or None.
        owner: int64 [N], the mask's entry of each of the layout's entries.
    """

    admitted: Tensor
    bias: Tensor | None
    owner: Tensor


class Keys(NamedTuple):
    """The keys of every row.

    Attributes:
        lengths: int32 [entries, groups, Lq], extents as in `Mask`: a row admits so many keys, the first in its order; None
            if it admits all.
        order: int64 [entries, Lk], the order of all rows of an entry, or None if it is the keys' own.
        by_row: every row has its own order, which `row_order` gives.
    """

    lengths: Tensor | None
    order: Tensor | None = None
    by_row: bool = False


def read_mask(mask: Tensor, layout: AttentionLayout) -> Mask:
    """The mask in the layout's dimensions."""
    assert layout.mask is not None
    *batch, queries, _ = layout.mask
    entries, groups = ([batch[i] for i in dims] for dims in (layout.entries, layout.groups))
    if math.prod(groups) not in (1, layout.group_count):
        groups = [layout.batch[i] for i in layout.groups]
    x = mask.reshape(layout.mask).permute(*layout.entries, *layout.groups, len(batch), len(batch) + 1)
    x = x.expand(*entries, *groups, queries, layout.keys).reshape(math.prod(entries), math.prod(groups), queries, layout.keys)
    owner = torch.arange(math.prod(entries), device=mask.device).view(entries)
    owner = owner.expand([layout.batch[i] for i in layout.entries]).reshape(layout.entry_count)
    return Mask(x, None, owner) if x.dtype is torch.bool else Mask(x != -math.inf, x, owner)


def causal_keys(layout: AttentionLayout, device: torch.device) -> Keys:
    """Key j for query i where j <= i."""
    lengths = torch.arange(1, layout.queries + 1, dtype=torch.int32, device=device).clamp_(max=layout.keys)
    return Keys(lengths.view(1, 1, layout.queries))


def mask_keys(mask: Tensor, admitted: Tensor) -> Keys:
    """The keys that a mask admits; `admitted` is what `read_mask` made of it."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return find_keys(admitted, look=None)
    return remember(mask, admitted.shape, lambda: find_keys(admitted, look=Tensor.tolist))


def remember[T](mask: Tensor, more: tuple[Any, ...], find: Callable[[], T]) -> T:
    """find(), which looks at the mask, or what it returned before for the same `more`, as long as the mask is what it was."""
    if not mask.is_cuda or mask.is_inference():  # nothing to wait for, or nothing tells of changes
        return find()
    stream = torch._C._cuda_getCurrentRawStream(mask.device.index)
    return _SEEN.get(mask, (stream, *more), find)


def find_keys(admitted: Tensor, look: Callable[[Tensor], list[bool]] | None) -> Keys:
    """The keys of rows that admit [entries, groups, Lq, Lk]; `look` reads a tensor's data, None if that cannot be done."""
    lengths = admitted.sum(-1, dtype=torch.int32)
    rows = admitted.flatten(1, 2)
    if rows.shape[1] == 1:
        return Keys(lengths, row_order(rows[:, 0]))
    if look is None:
        return Keys(lengths, by_row=True)
    order = row_order(rows.any(1))
    place = torch.arange(rows.shape[-1], device=rows.device)
    first = place < lengths.flatten(1, 2)[..., None]
    together = (rows.gather(-1, order[:, None].expand(rows.shape)) == first).all()
    common, plain = look(torch.stack([together, (rows == first).all()]))
    if not common:
        return Keys(lengths, by_row=True)
    return Keys(lengths, None if plain else order)


def row_order(admitted: Tensor) -> Tensor:
    """Positions [*, Lk] of the keys that are admitted, in their order, then of the others."""
    return torch.sort(admitted.logical_not().to(torch.uint8), dim=-1, stable=True).indices


class Seen:
    """What was found in masks that still live, by their memory and version."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get[T](self, mask: Tensor, more: tuple[Any, ...], find: Callable[[], T]) -> T:
        """What `find` returned for this mask, which is called once as long as mask and `more` stay the same."""
        storage = StorageWeakRef(mask.untyped_storage())
        view = (mask.dtype, mask.storage_offset(), mask.shape, mask.stride())
        key = (storage.cdata, mask._version, view, more)
        found = self._found.get(key)
        if found is None:
            # A storage that is only referred to weakly keeps its address, so no other one can pass for it.
            self._found = {k: kept for k, kept in self._found.items() if not kept[0].expired()}
            found = self._found[key] = storage, find()
        return found[1]


_SEEN = Seen()
