"""An override: an op of ATen, and the function that takes its place.

Most ops have three forms: one that returns a new tensor, one in place and one with `out`. The function is that of the first;
the others are made of it here.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
"""Called with the arguments of the op's schema; returns its results, or NotImplemented."""

BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Override:
    """An op, and what takes its place.

    Attributes:
        name: the overload without "aten::", such as "sum.dim_IntList".
        function: takes its place.
        in_place: the overload that writes to the first argument.
        out: the overload that writes to tensors passed by keyword.
        write: takes the place of `out` where copying the result would cost too much.
        devices: where the op depends on the batch, so that it is replaced whenever the mode is on.
        portable: with `portable=True` the op is replaced on both devices.
        autograd: the function has a gradient of its own; else torch's formula stands.
        exact: what it returns needs no rounding, so that torch's kernel may serve the dtypes that the function does not take.
    """

    name: str
    function: Function
    in_place: str | None = None
    out: str | None = None
    write: Function | None = None
    devices: tuple[str, ...] = BOTH
    portable: bool = False
    autograd: bool = True
    exact: bool = False

    def forms(self) -> Iterator[tuple[str, Function]]:
        """Every overload that is replaced, and by what."""
        yield self.name, self.function
        if self.in_place:
            yield self.in_place, _in_place(self.function)
        if self.out:
            yield self.out, self.write or _out(self.function, self.out)


@cache
def overload(name: str) -> Any:
    """The overload of a name without "aten::"."""
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), which or "default")


def _in_place(function: Function) -> Function:
    def run(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A gradient may need the elements as they were.
        result = function(self.clone() if torch.is_grad_enabled() and self.requires_grad else self, *args, **kwargs)
        return result if result is NotImplemented else self.copy_(result)

    return run


def _out(function: Function, name: str) -> Function:
    names = [argument.name for argument in overload(name)._schema.arguments if argument.is_out]

    def run(*args: Any, **kwargs: Any) -> Any:
        outs = [kwargs.pop(name) for name in names]
        result = function(*args, **kwargs)
        if result is NotImplemented:
            return result
        results = result if isinstance(result, tuple) else (result,)
        for out, value in zip(outs, results, strict=True):
            write(out, value)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return run


def write(out: Tensor, value: Tensor) -> None:
    """Fill `out`, resized if it must be, with `value`.

    Raises:
        RuntimeError: its dtype cannot hold the values.
    """
    if not torch.can_cast(value.dtype, out.dtype):
        raise RuntimeError(f"result type {value.dtype} can't be cast to the desired output type {out.dtype}")
    if out.shape != value.shape:
        if out.numel():
            shapes = f"shape {list(out.shape)} was resized to {list(value.shape)}"
            warnings.warn(f"an output with {shapes}: it should be empty or have the result's shape", stacklevel=2)
        out.resize_(value.shape)
    out.copy_(value)
