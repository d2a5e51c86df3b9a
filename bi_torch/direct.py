"""Calls that need no dispatcher.

An op of ours is registered with torch's dispatcher, for what the dispatcher does around a kernel: gradients, transforms,
traces, graphs, tensors that are not what they seem. A trip through it takes the host longer than the launch of a kernel. Where
the dispatcher would do nothing but run the device's kernel, that kernel is called.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import DispatchKey, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from bi_torch.stock import THREAD, Launch

ALIGNMENT = 16
"""Bytes: the alignment of data that a kernel may be made for."""


def _keys(*keys: DispatchKey) -> int:
    found = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        found = found | torch._C.DispatchKeySet(key)
    return found.raw_repr()


_ALWAYS = (
    _keys(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView),
    _keys(DispatchKey.BackendSelect),  # inference mode
)
"""Dispatch keys that a thread adds to those of tensors, where it adds nothing that matters to our ops."""

_DEVICES = {
    _keys(DispatchKey.CPU, DispatchKey.AutocastCPU): "cpu",
    _keys(DispatchKey.CPU, DispatchKey.AutocastCPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView): "cpu",
    _keys(DispatchKey.CUDA, DispatchKey.AutocastCUDA): "cuda",
    _keys(DispatchKey.CUDA, DispatchKey.AutocastCUDA, DispatchKey.AutogradCUDA, DispatchKey.ADInplaceOrView): "cuda",
}
"""Devices by the dispatch keys of a dense tensor, of inference mode and not. Our ops have no kernel for autocast."""


_CALLS = {
    _keys(DispatchKey.CPU): "cpu",
    _keys(DispatchKey.CPU, DispatchKey.AutogradCPU): "cpu",
    _keys(DispatchKey.CUDA): "cuda",
    _keys(DispatchKey.CUDA, DispatchKey.AutogradCUDA): "cuda",
}
"""Devices by the dispatch keys of a call of an op of ATen: those of the thread and of all tensors, as far as the op has
kernels for them."""


def call_device(keyset: torch.DispatchKeySet, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str | None:
    """As `kernel_device`, of the tensors of a call that the dispatcher made with these keys, and of all made of them."""
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _may_record((*args, *kwargs.values()))):
        return None
    return _CALLS.get(keyset.raw_repr())


def _may_record(args: Iterable[Any]) -> bool:
    """Whether a gradient may be recorded of arguments of an op: a tensor's own, or those of a list that is not of numbers."""
    for x in args:
        if isinstance(x, Tensor):
            if x.requires_grad:
                return True
        elif type(x) in (list, tuple) and not all(type(i) in _PLAIN for i in x):
            return True
    return False


def kernel_device(args: Iterable[Any]) -> str | None:
    """The device, "cpu" or "cuda", whose kernel is all that the dispatcher would run for an op of ours on these arguments.

    None where it would do more: record a gradient, a trace or a graph, transform or resolve tensors, ask a mode or a subclass.
    """
    if torch.compiler.is_compiling():
        return None
    if THREAD.device is not None:
        return THREAD.device
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() not in _ALWAYS
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
    ):
        return None
    recording, device = torch.is_grad_enabled(), None
    for x in args:
        if isinstance(x, Tensor):
            if (type(x) is not Tensor and type(x) is not Parameter) or (recording and x.requires_grad):
                return None
            found = _DEVICES.get(torch._C._dispatch_keys(x).raw_repr())
            if found is None or (device is not None and found is not device):
                return None
            device = found
    return device


def signature(x: Any) -> Any:
    """All of an argument that the choice of kernels may depend on: a tensor's layout, and any other value itself."""
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.shape, x.stride(), x.data_ptr() % ALIGNMENT
    return x


def keep[K, V](kept: dict[K, V], key: K, value: V, most: int = 1 << 12) -> V:
    """The value, which is kept by its key; where there are `most` already, these are forgotten first."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = value
    return value


def repeat(call: Callable[[Sequence[Any]], Any], given: Sequence[Any]) -> Any:
    """call(given): launches that were prepared for the signatures of what is given, and depend on nothing else."""
    result = call(given)
    if THREAD.launches is not None:
        THREAD.launches.append((call, given, result))
    return result


_NO_KWARGS: Mapping[str, Any] = {}
_PLAIN = frozenset({bool, int, float, str, torch.dtype, type(None)})
"""Types of arguments that say all by their value."""


class Repeated:
    """A function that often comes down to one prepared call on its own arguments; then it is that call.

    It must be determined by its arguments, of which it changes none, and by whether autocast is on for a GPU. Where what it
    returns, or the first of what the call returns, was seen to be what the call returned, it is that call for all arguments of
    these signatures. Arguments by keyword are plain values, or nothing is kept: a tensor there may be written to.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._kept: dict[tuple[Any, ...], tuple[Any, list[Any], list[tuple[int, int]], bool]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NO_KWARGS) -> Any:
        key = (torch.is_autocast_enabled("cuda"), *[_exactly(x) for x in args])
        if kwargs:
            if not all(type(x) in _PLAIN for x in kwargs.values()):
                return self._function(*args, **kwargs)
            key += tuple([(name, _exactly(x)) for name, x in kwargs.items()])
        kept = self._kept.get(key)
        if kept is not None:
            call, template, places, first = kept
            given = template.copy()
            for place, i in places:
                given[place] = args[i]
            result = call(given)
            return result[0] if first else result
        args = _told_apart(args)
        outside, launches = THREAD.launches, list[Launch]()
        THREAD.launches = launches
        try:
            result = self._function(*args, **kwargs)
        finally:
            THREAD.launches = outside
        if len(launches) == 1:
            self._keep(key, args, result, *launches[0])
        return result

    def _keep(
        self, key: tuple[Any, ...], args: tuple[Any, ...], result: Any, call: Any, given: Sequence[Any], found: Any
    ) -> None:
        first = isinstance(found, tuple) and result is found[0]
        if first and call.first is not None:
            call, first, found = call.first, False, result
        positions = {id(x): i for i, x in enumerate(args) if isinstance(x, Tensor)}
        tensors = [(place, positions.get(id(x))) for place, x in enumerate(given) if isinstance(x, Tensor)]
        places = [(place, i) for place, i in tensors if i is not None]
        if (first or result is found) and len(places) == len(tensors):
            template = [None if isinstance(x, Tensor) else x for x in given]
            keep(self._kept, key, (call, template, places, first))


def _told_apart(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, where a tensor that stands in several places is another object in each."""
    return tuple([x.detach() if isinstance(x, Tensor) and any(x is y for y in args[:i]) else x for i, x in enumerate(args)])


def _exactly(x: Any) -> Any:
    """As `signature`, for arguments of an op of ATen; tells the zeros apart."""
    if isinstance(x, Tensor):
        return signature(x)
    if isinstance(x, float):
        return x.hex()
    return tuple(x) if isinstance(x, list) else x
