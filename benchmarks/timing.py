"""Device time per call, measured in the same way for PyTorch and JAX.

A program is one host call that queues a call for each of several tuples of arguments: a CUDA graph in PyTorch, one jitted
function in JAX. Programs are queued back to back and the host waits once, so that the device never waits for it; the time that
a long queue takes beyond a short one, divided by the calls between them, is the time per call: what it costs to fill the
queue and to notice its end drops out. Arguments that rotate, and together exceed the L2 cache, are read from memory, as a
model reads its weights. Columns take turns, so that a change of the clock rate hits all of them.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import torch


@dataclass(frozen=True)
class Program:
    """`calls` calls that `enqueue` puts on the device's queue; `wait` blocks until what enqueue returned is done."""

    calls: int
    enqueue: Callable[[], Any]
    wait: Callable[[Any], object]


def torch_program(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Program:
    """call(*args) for all `arguments`, as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and lazy initialisation must not happen under capture
        call(*arguments[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads may call CUDA meanwhile
        outputs = [call(*args) for args in arguments]

    def enqueue() -> list[Any]:
        graph.replay()
        return outputs

    return Program(len(arguments), enqueue, lambda _: torch.cuda.synchronize())


def jax_program(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Program:
    """call(*args) for all `arguments`, as one jitted function."""
    return compiled_program(jax_compiled(call, arguments), arguments)


def compiled_program(compiled: jax.stages.Compiled, arguments: Sequence[tuple[Any, ...]]) -> Program:
    """What `jax_compiled` made, on the arrays `arguments`."""
    previous = jnp.empty(compiled.out_info.shape)

    def enqueue() -> jax.Array:
        nonlocal previous
        previous = compiled(arguments, previous)
        return previous

    return Program(len(arguments), enqueue, jax.block_until_ready)


def jax_compiled(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> jax.stages.Compiled:
    """call(*args) for all `arguments`, arrays or their shapes, as one function that returns one number of every result.

    So the results stay inside the program, as a model's activations do; with an output for each, XLA would spend its time
    on allocating them. The numbers are gathered by one small kernel a program, and stand where those of the previous run
    did: with an address that changes, the host would update every node of the CUDA graph before every run.
    """
    once = jax.jit(call)  # lowered once, however many calls there are

    def program(arguments: Sequence[tuple[Any, ...]], previous: jax.Array) -> jax.Array:
        results = jax.tree.leaves([once(*args) for args in arguments])
        return jnp.stack([x[(0,) * x.ndim].astype(jnp.float32) for x in results])

    results = len(jax.tree.leaves(jax.eval_shape(once, *arguments[0])))
    previous = jax.ShapeDtypeStruct((results * len(arguments),), jnp.float32)
    return jax.jit(program, donate_argnames="previous", keep_unused=True).lower(arguments, previous).compile()


def microseconds(programs: dict[str, Program], *, seconds: float = 0.006, repeats: int = 5) -> dict[str, float]:
    """Median time per call of each program, in microseconds; a short queue runs for about `seconds`, a long one thrice that."""
    with _no_garbage_collection():
        runs = {}
        for name, program in programs.items():
            _elapsed(program, 1)
            runs[name] = max(1, min(500, round(seconds / _elapsed(program, 1))))
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, program in programs.items():
                _elapsed(program, runs[name])  # not counted: the first queue after another column's may take longer
                samples[name].append((_elapsed(program, runs[name]), _elapsed(program, 3 * runs[name])))
    result = {}
    for name, program in programs.items():
        short, long = (median(times) for times in zip(*samples[name], strict=True))
        result[name] = (long - short) / (2 * runs[name] * program.calls) * 1e6
    return result


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection takes milliseconds, as long as a queue."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def host_microseconds(call: Callable[[], Any], wait: Callable[[Any], object], *, calls: int = 200, repeats: int = 7) -> float:
    """Time that one call keeps the host, in microseconds; the device's work must be shorter than that."""
    wait(call())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        samples.append((time.perf_counter() - start) / calls)
        wait(result)
    return median(samples) * 1e6


def _elapsed(program: Program, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        result = program.enqueue()
    program.wait(result)
    return time.perf_counter() - start
