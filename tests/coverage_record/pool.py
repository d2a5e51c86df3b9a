"""Workers in processes of their own: an operation that hangs or loses the GPU's context takes only its worker with it."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from queue import Empty, Queue
from typing import Any


def work(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """(task, result) of every task as it ends; the result is None if the worker died or took longer than `seconds`."""
    waiting: Queue[Any] = Queue()
    done: Queue[tuple[Any, Any]] = Queue()
    for task in tasks:
        waiting.put(task)
    for _ in range(workers):
        threading.Thread(target=_feed, args=(function, waiting, done, seconds), daemon=True).start()
    for _ in tasks:
        yield done.get()


def _feed(function: Callable[[Any], Any], waiting: "Queue[Any]", done: "Queue[tuple[Any, Any]]", seconds: float) -> None:
    context = multiprocessing.get_context("spawn")
    process = None
    while True:
        try:
            task = waiting.get_nowait()
        except Empty:
            break
        first = process is None
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
        ours.send(task)
        try:
            result = ours.recv() if ours.poll(seconds + (60 if first else 0)) else None  # the first task waits for imports
        except (EOFError, ConnectionError):
            result = None
        if result is None:
            process.kill()
            process = None
        done.put((task, result))
    if process is not None:
        process.kill()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    while True:
        connection.send(function(connection.recv()))
