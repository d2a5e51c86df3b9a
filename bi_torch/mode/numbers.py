"""Numbers where an op takes tensors: the 1.5 of `x + 1.5`.

Torch puts such a number into a tensor that it marks as a number, hands a kernel written in Python the number again, and has
no way to mark a tensor from Python. A tensor without dimensions does the same: it does not widen the dtype of those that have
dimensions, and torch's kernels read its value as exactly as they read a number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bi_torch.mode.override import overload

Arguments = tuple[Any, ...]


def with_tensors(name: str) -> Callable[[Arguments], Arguments]:
    """A function that replaces the numbers among the positional arguments of an overload where it takes tensors."""
    arguments = overload(name)._schema.arguments
    places = [i for i, argument in enumerate(arguments) if str(argument.type) == "Tensor" and not argument.kwarg_only]

    def convert(args: Arguments) -> Arguments:
        for i in places:
            if not isinstance(args[i], Tensor):
                break
        else:
            return args
        tensors = [args[i] for i in places if isinstance(args[i], Tensor)]
        return tuple(
            _tensor(value, tensors) if i in places and not isinstance(value, Tensor) else value for i, value in enumerate(args)
        )

    return convert


def _tensor(number: complex, beside: list[Tensor]) -> Tensor:
    if not beside or isinstance(number, bool):
        return torch.tensor(number)
    widest = max(beside, key=Tensor.dim)
    dtype = torch.result_type(widest, number)
    # Kernels of 16-bit formats compute in float32, with a number that was not rounded to 16 bits.
    if dtype.is_floating_point and dtype.itemsize == 2 and widest.dim():
        dtype = torch.float32
    return torch.tensor(number, dtype=dtype)
