"""What the kernels' launchers ask of a GPU, and what they share."""

import threading
from functools import lru_cache

import torch

from shared_specs import ARCHITECTURES

FIRST_LAUNCH = threading.Lock()
"""Triton loads a kernel on its first launch, and must not be asked for it by two threads then."""

_THREAD = threading.local()


def bind_context() -> None:
    """Make the current device's context that of this thread; the driver needs one to encode a tensor map.

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
