"""Processes that compile side by side and take turns on the GPU.

Kernels are lowered in Python, so threads do not help; and a measurement wants the GPU, and the host's cores, to itself. A
process ends with its work: what it held of the GPU's memory is free for the next one.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier, Lock
from typing import Any

_barrier: Barrier
_lock: Lock


def in_turns(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """work(*call) for every call, each in a process of its own; results as they come.

    Raises:
        RuntimeError: a process ended without a result; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    barrier, lock = context.Barrier(len(calls)), context.Lock()
    running: dict[Connection, Any] = {}
    try:
        for call in calls:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(barrier, lock, sender, work, call))
            process.start()
            sender.close()  # ours: so that the end of the process is the end of the pipe
            running[receiver] = process
        while running:
            ended_now = wait(list(running))
            for ended in [receiver for receiver in running if receiver in ended_now]:
                try:
                    result = ended.recv()
                except EOFError:
                    raise RuntimeError("a process of the benchmark failed") from None
                running.pop(ended).join()
                yield result
    finally:
        for process in running.values():
            process.kill()


def ready() -> None:
    """In `work`: everything is compiled; returns when the others have said so too."""
    _barrier.wait()


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """In `work`, after `ready`: the GPU is ours."""
    with _lock:
        yield


def _run(barrier: Barrier, lock: Lock, results: Connection, work: Callable[..., Any], call: tuple[Any, ...]) -> None:
    global _barrier, _lock
    _barrier, _lock = barrier, lock
    results.send(work(*call))
