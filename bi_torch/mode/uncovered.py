"""Kernels that stand in for the operations that depend on the batch and that the mode does not replace.

Each one reports the call, as the policy wants, and then runs the kernel in whose place it stands. They are registered for the
device, below autograd, so that a backward pass meets them too. The policy is asked at every call: an inner region with
another policy needs no new registration. What the table calls uncovered is so for floating-point numbers only; integers pass,
and so do calls that do not meet the entry's condition.
"""

from collections.abc import Callable
from typing import Any

import torch

from bi_torch.mode import coverage
from bi_torch.mode.coverage import CONDITIONS, Entry
from bi_torch.mode.numbers import with_tensors
from bi_torch.mode.override import overload
from bi_torch.mode.policy import Policy, inexact, report
from bi_torch.stock import THREAD

Kernel = Callable[..., Any]


def kernels(device: str, policy: Callable[[], Policy]) -> dict[str, Kernel]:
    """Kernels by name of overload, for every uncovered operation that runs on `device` ("cpu" or "cuda").

    To be made while none of them is registered, for each one keeps the kernel in whose place it stands, and to be registered
    at the dispatch key of the device with `with_keyset=True`.
    """
    key = device.upper()
    return {
        name: _kernel(entry, torch.library.get_kernel(f"aten::{name}", key), policy)
        for name, entry in coverage.entries(device).items()
        if entry.kind == "uncovered" and (name == entry.functional or _has_kernel(name, key))
    }


def _has_kernel(name: str, key: str) -> bool:
    """Whether a form has a kernel of its own; one that has not runs the functional form."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def depends_on_batch(entry: Entry, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an uncovered operation is one that depends on the batch."""
    if next(inexact([*args, *kwargs.values()]), None) is None:
        return False
    return entry.when is None or CONDITIONS[entry.when].holds(named_arguments(op, args, kwargs))


def named_arguments(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, defaults included."""
    declared = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs


def _kernel(entry: Entry, stock: Any, policy: Callable[[], Policy]) -> Kernel:
    op = overload(entry.op)
    tensors = with_tensors(entry.op)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        args = tensors(args)
        if not THREAD.inside and depends_on_batch(entry, op, args, kwargs):
            report(entry.op, entry.explanation(), policy())
        return stock.call_boxed(keyset, *args, **kwargs)

    return kernel
