"""Our ops under torch.func: what stands at the dispatch keys of gradients and of vmap.

Inside `torch.func.grad` and `torch.func.vmap` a tensor is wrapped, once for every transform, and the dispatcher peels the
wrappers off one by one: at the key Autograd of a level our op records its gradient for this level, as ops written in C++
do; at the key FuncTorchBatched it runs on tensors that have one dimension more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction as Function

__all__ = ["Function", "in_transform", "record", "to_front"]

in_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""True inside torch.func.grad, torch.func.vmap and the like."""


def record(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), from a kernel at the key Autograd."""
    if not in_transform():
        return function.apply(*args)  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[attr-defined]


def to_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`x` with the batch dimension `dim` in front; one of stride 0 if it has none."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
