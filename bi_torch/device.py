"""What the kernels' launchers ask of a GPU, and what they share."""

import inspect
import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from shared_specs import ARCHITECTURES

FIRST_LAUNCH = threading.Lock()
"""Triton loads a kernel on its first launch, and must not be asked for it by two threads then."""

_THREAD = threading.local()


def bind_context() -> None:
    """Make the current device's context that of this thread; the driver needs one to encode a tensor map and to launch.

    The runtime binds it with the first call that reaches it. A thread of the autograd engine may not have made one, since
    memory comes from PyTorch's cache.
    """
    if not getattr(_THREAD, "bound", False):
        torch.cuda.mem_get_info()
        _THREAD.bound = True


@lru_cache
def architecture(device: int, caller: str) -> str:
    """The architecture of a GPU, such as "sm_90".

    Raises:
        RuntimeError: there are no kernels for it; the message begins with `caller`.
    """
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    if arch not in ARCHITECTURES:
        raise RuntimeError(f"{caller}: no kernels for {arch} (device {device}): supported are {', '.join(ARCHITECTURES)}")
    return arch


@lru_cache
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized contiguous tensor. With strides given, torch takes a third of the time that torch.empty takes."""
    return torch.empty_strided(shape, contiguous_strides(shape), dtype=dtype, device=device)


@lru_cache(1 << 12)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor whose last dimension is the fastest."""
    return tuple(accumulate(shape[:0:-1], lambda stride, n: stride * max(1, n), initial=1))[::-1] if shape else ()


def direct_launcher(compiled: Any, grid: tuple[int, int, int]) -> Callable[[int, tuple[Any, ...]], None]:
    """launch(stream, arguments) of a Triton kernel that was launched before, without Triton's own steps in Python.

    Tensor maps are to be passed encoded, as Triton does in a function around its launcher.
    """
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise NotImplementedError("bi_torch on CUDA: a kernel that needs scratch memory")
    launcher = compiled.run
    launch = launcher.launch
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    function, cooperative, dependent = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    metadata, (x, y, z) = compiled.packed_metadata, grid

    def run(stream: int, arguments: tuple[Any, ...]) -> None:
        launch(x, y, z, stream, function, cooperative, dependent, None, None, metadata, None, None, None, *arguments)

    return run
