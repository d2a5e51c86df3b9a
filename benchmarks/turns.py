"""Processes that compile side by side and take turns on the GPU.

Kernels are lowered in Python, so threads do not help; and a measurement wants the GPU, and the host's cores, to itself.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.synchronize import Barrier, Lock
from typing import Any

_barrier: Barrier
_lock: Lock


def in_turns(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """work(*call) for every call, each in a process of its own; results as they come."""
    context = multiprocessing.get_context("spawn")
    shared = (context.Barrier(len(calls)), context.Lock())
    with ProcessPoolExecutor(len(calls), context, _share, shared) as pool:
        for future in as_completed([pool.submit(_run, work, call) for call in calls]):
            yield future.result()


def ready() -> None:
    """In `work`: everything is compiled; returns when the others have said so too."""
    _barrier.wait()


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """In `work`, after `ready`: the GPU is ours."""
    with _lock:
        yield


def _share(barrier: Barrier, lock: Lock) -> None:
    global _barrier, _lock
    _barrier, _lock = barrier, lock


def _run(work: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    try:
        return work(*call)
    except BaseException:
        _barrier.abort()  # the others would wait for ever
        raise
