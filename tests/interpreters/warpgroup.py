"""What the instructions of `bi_jax.rows.warpgroup` do, in NumPy: stand-ins for their PTX on a machine without a GPU."""

import functools
from collections.abc import Sequence
from functools import singledispatch
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from bi_jax.rows import warpgroup
from bi_jax.rows.ptx import Block, Node
from bi_jax.rows.warpgroup import CHUNK, THREADS, VECTOR, Instruction, Place
from shared_specs.formats import FLOAT32_NAN, float_format
from shared_specs.reference.arithmetic import NumpyArithmetic

FIRST = np.arange(THREADS) * VECTOR


class Memory(Protocol):
    """An array in memory."""

    def read(self) -> np.ndarray: ...
    def write(self, indices: np.ndarray, values: np.ndarray) -> None: ...
    def add_one(self, index: np.ndarray) -> np.ndarray: ...


@singledispatch
def run(instruction: Instruction, *args: Memory | np.ndarray) -> list[np.ndarray] | None:
    """The results of `instruction`, or None if it has to wait; a `Memory` stands for a reference."""
    raise NotImplementedError(instruction)


def _places(place: Place, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the first column of every thread."""
    row = row + np.arange(THREADS) % place.shared * (CHUNK // place.lanes)
    return row + FIRST // place.lanes * place.step, column + FIRST % place.lanes * place.run // VECTOR


def _lanes(place: Place) -> np.ndarray:
    """The lanes of a thread, from its first."""
    element = np.arange(VECTOR)
    return element // place.run * (place.lanes // 2) + element % place.run


def _accesses(place: Place, row: np.ndarray, column: np.ndarray, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices into memory of the elements of a chunk, and which of them exist; [threads, 8]."""
    rows, columns = _places(place, row, column)
    starts = columns[:, None] + _lanes(place)[::width]
    inside = np.ones(starts.shape, bool)
    if place.rows is not None:
        inside &= (rows < place.rows)[:, None]
    if place.end is not None:
        inside &= (starts >= 0) & (starts < place.end)
    offsets = rows[:, None].astype(np.int64) * place.stride + starts
    assert np.all(offsets[inside] % width == 0), "an access is not aligned"
    assert np.all((offsets[inside] >= 0) & (offsets[inside] + width <= size)), "an access is out of bounds"
    elements = (offsets[:, :, None] + np.arange(width)).reshape(THREADS, VECTOR)
    return elements, np.repeat(inside, width, axis=1)


@run.register
def _(instruction: warpgroup.Load, memory: Memory, row: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    content = memory.read()
    indices, inside = _accesses(instruction.place, row, column, instruction.width, content.size)
    values = np.zeros((THREADS, VECTOR), content.dtype)
    values[inside] = content[indices[inside]]
    return [values.reshape(CHUNK)]


@run.register
def _(instruction: warpgroup.Store, memory: Memory, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> list[np.ndarray]:
    indices, inside = _accesses(instruction.place, row, column, instruction.width, memory.read().size)
    memory.write(indices[inside], value.reshape(THREADS, VECTOR)[inside])
    return []


def _inside(place: Place, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    inside = np.ones(THREADS, bool) if place.rows is None else rows < place.rows
    return inside if place.end is None else inside & (columns >= 0) & (columns < place.end)


@run.register
def _(instruction: warpgroup.LoadValue, memory: Memory, row: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    content, place = memory.read(), instruction.place
    rows, columns = _places(place, row, np.int32(0))[0], np.broadcast_to(column, (THREADS,))
    inside = _inside(place, rows, columns)
    indices = rows.astype(np.int64) * place.stride + columns
    values = content[np.where(inside, indices, 0)]
    if content.dtype != np.int32:
        values = float_format(content.dtype.name).decode(values.view(float_format(content.dtype.name).storage))
    return [np.where(inside, values, values.dtype.type(np.nan if column.ndim else 0))]


@run.register
def _(
    instruction: warpgroup.StoreValue, memory: Memory, row: np.ndarray, column: np.ndarray, value: np.ndarray
) -> list[np.ndarray]:
    place = instruction.place
    rows, columns = _places(place, row, np.int32(0))[0], np.broadcast_to(column, (THREADS,))
    first = FIRST % (place.lanes if place.step else CHUNK) < VECTOR * place.shared
    inside = first & _inside(place, rows, columns)
    memory.write((rows.astype(np.int64) * place.stride + columns)[inside], value[inside])
    return []


@run.register
def _(instruction: warpgroup.Columns, column: np.ndarray) -> list[np.ndarray]:
    place = Place(0, instruction.lanes, run=instruction.run)
    _, first = _places(place, np.int32(0), column)
    return [(first[:, None] + _lanes(place)).reshape(CHUNK).astype(np.int32)]


@run.register
def _(instruction: warpgroup.Rows, row: np.ndarray) -> list[np.ndarray]:
    return [_places(instruction.place, row, np.int32(0))[0].astype(np.int32)]


@run.register
def _(instruction: warpgroup.Lanes) -> list[np.ndarray]:
    return [np.arange(THREADS, dtype=np.int32) % instruction.count]


@run.register
def _(instruction: warpgroup.FirstWarp) -> list[np.ndarray]:
    return [np.int32(1)]


@run.register
def _(instruction: warpgroup.Unpack, x: np.ndarray) -> list[np.ndarray]:
    return list(x.reshape(THREADS, VECTOR).T)


@run.register
def _(instruction: warpgroup.Pick, *values: np.ndarray) -> list[np.ndarray]:
    thread = np.arange(THREADS)
    return [np.stack(values)[thread % len(values), thread]]


@run.register
def _(instruction: warpgroup.Shuffle, x: np.ndarray) -> list[np.ndarray]:
    threads = x.reshape(THREADS, -1)
    return [threads[np.arange(THREADS) ^ instruction.distance].reshape(x.shape)]


@run.register
def _(instruction: warpgroup.Exchange, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    thread = np.arange(THREADS)
    odd = thread % 2 == 1
    return [np.where(odd, y, x), np.where(odd, y[thread ^ 1], x[thread ^ 1])]


@run.register
def _(instruction: warpgroup.Warps, scratch: Memory, x: np.ndarray) -> list[np.ndarray]:
    assert scratch.read().size >= x.size
    warps = x.reshape(-1, instruction.count, x.size // THREADS * 32)
    return [np.repeat(warps[:, warp], instruction.count, axis=0).reshape(x.shape) for warp in range(instruction.count)]


@run.register
def _(instruction: warpgroup.Sync) -> list[np.ndarray]:
    return []


@run.register
def _(instruction: warpgroup.Draw, shared: Memory, counter: Memory) -> list[np.ndarray]:
    shared.write(np.intp(0), counter.add_one(np.intp(0)))
    return [shared.read()[0]]


@run.register
def _(instruction: warpgroup.Share, shared: Memory, *values: np.ndarray) -> list[np.ndarray]:
    shared.write(np.arange(len(values)), np.stack([x[0] for x in values]))
    return [np.full(THREADS, x) for x in shared.read()[: len(values)]]


@run.register
def _(instruction: warpgroup.Post, words: Memory, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> list[np.ndarray]:
    at = 2 * _word(instruction.place, instruction.start, row, column)
    words.write(np.stack([at, at + 1]), np.array([value[:1].view(np.int32)[0], 1], np.int32))
    return []


@run.register
def _(instruction: warpgroup.Await, words: Memory, row: np.ndarray, columns: np.ndarray) -> list[np.ndarray] | None:
    content, columns = words.read(), np.broadcast_to(columns, (THREADS,))
    inside = _inside(instruction.place, row, columns) & (np.arange(THREADS) < instruction.threads)
    results = []
    for start in instruction.starts:
        at = 2 * np.where(inside, _word(instruction.place, start, row, columns), 0)
        if not content[at + 1][inside].all():
            return None
        results.append(np.where(inside, content[at], 0).astype(np.int32).view(np.float32))
    return results


def _word(place: Place, start: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return start + row.astype(np.int64) * place.stride + column


@run.register
def _(instruction: warpgroup.Evaluate, *inputs: np.ndarray) -> list[np.ndarray]:
    values = [_widened(np.repeat(x, instruction.size // x.size)) for x in inputs]
    results = []
    for x, dtype in zip(_evaluated(instruction.block, values), instruction.dtypes, strict=True):
        out = np.broadcast_to(x, (instruction.size,))
        if dtype in ("bfloat16", "float16"):
            out = float_format(dtype).encode(out).view(jnp.dtype(dtype))
        results.append(np.ascontiguousarray(out, jnp.dtype(dtype)))
    return results


@run.register
def _(instruction: warpgroup.EvaluateEither, condition: np.ndarray, *inputs: np.ndarray) -> list[np.ndarray]:
    warps = condition.reshape(-1, 32)
    assert (warps == warps[:, :1]).all(), "threads of a warp part"
    blocks = (instruction.near, instruction.block)
    both = [run(warpgroup.Evaluate(block, instruction.dtypes, instruction.size), *inputs) for block in blocks]
    holds = np.repeat(condition != 0, instruction.size // THREADS)
    return [np.where(holds, near, other) for near, other in zip(*both, strict=True)]


@run.register
def _(instruction: warpgroup.Extreme, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    f, fmt = NumpyArithmetic(), float_format(x.dtype.name)
    return [fmt.encode(getattr(f, instruction.kind)(_widened(x), _widened(y))).view(x.dtype)]


@run.register
def _(instruction: warpgroup.ThreadExtreme, x: np.ndarray) -> list[np.ndarray]:
    f = NumpyArithmetic()
    return [functools.reduce(getattr(f, instruction.kind), _widened(x).reshape(THREADS, VECTOR).T)]


@run.register
def _(instruction: warpgroup.EveryThread, x: np.ndarray) -> list[np.ndarray]:
    return [np.repeat((x.reshape(-1, 32) != 0).all(axis=1), 32).astype(np.int32)]


def _widened(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.int32:
        return x
    fmt = float_format(x.dtype.name)
    return fmt.decode(x.view(fmt.storage))


def _evaluated(block: Block, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    f, values = NumpyArithmetic(), dict(zip(block.inputs, inputs, strict=True))
    for node in block.operations:
        values[node] = getattr(f, node.operation)(*(_operand(x, values) for x in node.operands))
    return [values[node] for node in block.outputs]


def _operand(x: Node | float | int | str, values: dict[Node, np.ndarray]) -> np.ndarray | np.float32 | int | float | str:
    if isinstance(x, Node):
        return values[x]
    return FLOAT32_NAN.view(np.float32) if isinstance(x, float) and np.isnan(x) else x
