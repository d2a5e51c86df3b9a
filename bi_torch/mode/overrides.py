"""What the mode puts into torch's dispatcher.

Every override is registered several times: for autograd, where it records the gradient that our functions have, and where a
compiler finds it while it traces; for torch.func; and for the device itself, where tensors of inference mode arrive, and calls
that torch makes from inside other ops. Where a function has nothing to offer (it returns NotImplemented), and inside our own
engines, torch's kernel runs, which is kept here.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.vmap import lazy_load_decompositions
from torch.library import Library, get_kernel

from bi_torch.direct import Repeated, call_device
from bi_torch.mode import activations, losses, normalization, policy, products, reductions, uncovered
from bi_torch.mode.numbers import with_tensors
from bi_torch.mode.override import Function, Override, overload
from bi_torch.stock import THREAD
from bi_torch.uncompiled import uncompiled

OVERRIDES: tuple[Override, ...] = (
    *products.OVERRIDES,
    *reductions.OVERRIDES,
    *normalization.OVERRIDES,
    *losses.OVERRIDES,
    *activations.OVERRIDES,
)

Kernel = Callable[..., Any]
"""A function with the dispatch keys of the call before its arguments."""

KEYS = {"cpu": ("CPU", "AutogradCPU"), "cuda": ("CUDA", "AutogradCUDA")}
"""Dispatch keys of a device: the kernel's, and autograd's."""
TRANSFORMS = ("FuncTorchDynamicLayerFrontMode", "FuncTorchVmapMode", "FuncTorchBatchedDecomposition", "FuncTorchBatched")
"""Dispatch keys of torch.func, where torch takes ops apart: addmm becomes a product and a sum, with two roundings. Which
of them takes an op apart differs; it is the first that has a kernel, or the last."""

_library: Library | None = None
_installed: list[tuple[str, str, Kernel]] = []


def kernels(device: str, portable: bool) -> dict[str, Function]:
    """What takes the place of which overload on a device ("cpu" or "cuda") while the mode is on."""
    return {name: function for override in _active(device, portable) for name, function in override.forms()}


def install(portable: bool) -> None:
    """Put the overrides, and the refusals of what is not covered, into the dispatcher, in place of what the mode put there."""
    global _library, _installed
    remove()
    _installed = _registrations(portable)
    _library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name, key, kernel in _installed:
            _library.impl(name, uncompiled(kernel), key, with_keyset=True, allow_override=True)
    _resolve_anew(_installed)


def remove() -> None:
    """Leave torch as it was."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
        _resolve_anew(_installed)


def _resolve_anew(registrations: list[tuple[str, str, Kernel]]) -> None:
    """Let the dispatcher that tracing uses forget which kernel it found for an op."""
    for name, _, _ in registrations:
        overload(name)._dispatch_cache.clear()


def _active(device: str, portable: bool) -> Iterator[Override]:
    return (override for override in OVERRIDES if device in override.devices or (portable and override.portable))


@cache
def _registrations(portable: bool) -> list[tuple[str, str, Kernel]]:
    """(overload, dispatch key, kernel). Torch's own kernels are looked up here, while none of ours hides them."""
    lazy_load_decompositions()  # torch's own for vmap, which could not come after ours
    found = []
    transformed: dict[str, Function] = {}
    for device in ("cpu", "cuda") if torch.backends.cuda.is_built() else ("cpu",):
        backend, autograd = KEYS[device]
        for override in _active(device, portable):
            for name, function in override.forms():
                exact = override.exact or (not _has_kernel(name, backend) and _has_kernel(name, "CompositeImplicitAutograd"))
                refuse = None if exact else _refuse_dtypes(name)  # the parts of a composed op refuse what they must
                found.append((name, backend, _kernel(name, backend, function, refuse)))
                if override.autograd:
                    found.append((name, autograd, _kernel(name, autograd, _checked(name, function))))
                    transformed[name] = function
        replaced = kernels(device, portable)
        refusals = uncovered.kernels(device, policy.on_uncovered)
        found += [(name, backend, kernel) for name, kernel in refusals.items() if name not in replaced]
    for name, function in transformed.items():
        key = next((key for key in TRANSFORMS if _has_kernel(name, key)), TRANSFORMS[-1])
        found.append((name, key, _kernel(name, key, function)))
    return found


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def _kernel(name: str, key: str, function: Function, refuse: Callable[..., None] | None = None) -> Kernel:
    """`function`, or torch's own kernel if that returns NotImplemented and `refuse` does not raise."""
    stock = _stock(name, key)
    tensors, repeated = with_tensors(name), Repeated(function)

    def kernel(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        args = tensors(args)
        if not THREAD.inside:
            outside, device = THREAD.device, call_device(keyset, args, kwargs)
            THREAD.device = device
            try:
                result = repeated(args, kwargs) if device == "cuda" else function(*args, **kwargs)
            finally:
                THREAD.device = outside
            if result is not NotImplemented:
                return result
            if refuse is not None:
                refuse(args, kwargs)
        return stock(keyset, *args, **kwargs)

    return kernel


def _stock(name: str, key: str) -> Kernel:
    try:
        return get_kernel(f"aten::{name}", key).call_boxed
    except RuntimeError:

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"torch has no kernel for aten::{name} on {key}")

        return missing


def _refuse_dtypes(name: str) -> Callable[..., None]:
    """Say no to the dtypes that the contract does not have, unless they are exact."""

    def refuse(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        reason = policy.unsupported((*args, *kwargs.values()))
        if reason:
            policy.report(name, reason, policy.on_uncovered())

    return refuse


def _checked(name: str, function: Function) -> Function:
    """A form with `out` has no gradient, and must not lose one silently."""
    if not any(argument.is_out for argument in overload(name)._schema.arguments):
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise RuntimeError(f"{name}: functions with out=... arguments don't support automatic differentiation")
        return function(*args, **kwargs)

    return run
