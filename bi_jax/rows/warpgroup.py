"""What a warpgroup does to 1024 elements at a time: the instructions that row and column kernels consist of.

A chunk is 1024 elements, 8 for each of the 128 threads; beside it, an array of 128 has one value a thread. A chunk holds
`lanes` elements of each of 1024 / lanes rows. A thread's elements are consecutive, or two runs of 4 that are half of the
lanes apart, so that neighbouring threads access neighbouring 16 bytes of float32, too. Memory is reached by masked accesses
of up to 16 bytes, which Mosaic's own loads are not. Each instruction is an object, so that a test can run a stand-in for it
on a CPU.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from bi_jax.rows.ptx import Block

THREADS = 128
VECTOR = 8
"""Elements of a thread."""
CHUNK = THREADS * VECTOR
ACCESS = 16
"""Bytes of the widest access of a thread."""

Ref = Any
_SCALAR = plgpu.Layout.WG_SPLAT(())
_REF = plgpu.RefType()
_PAIR = {"bfloat16": "bf16x2", "float16": "f16x2"}


@dataclass(frozen=True)
class Place:
    """Which elements of a row-major array a chunk is: `lanes` columns of rows that are `step` apart (0: of one row).

    Attributes:
        stride: elements from a row to the next.
        lanes: columns, a power of two from 8 to 1024.
        step: rows from one group of lanes to the next.
        rows: rows of the array where a group may lie beyond them, else None.
        end: columns of the array where a chunk may reach beyond them, else None.
        run: consecutive elements of a thread, 8 or 4.
        shared: chunks of rows that a row's threads share out, a power of two: thread t takes the row of chunk t modulo this.
    """

    stride: int
    lanes: int = CHUNK
    step: int = 0
    rows: int | None = None
    end: int | None = None
    run: int = VECTOR
    shared: int = 1

    def row(self, row: ir.Value) -> ir.Value:
        """The row of this thread, where the first group's is `row`."""
        if self.step:
            row = arith.addi(row, arith.muli(arith.divui(_first(), _i32(self.lanes)), _i32(self.step)))
        if self.shared == 1:
            return row
        return arith.addi(row, arith.muli(arith.remui(_thread(), _i32(self.shared)), _i32(CHUNK // self.lanes)))

    def column(self, column: ir.Value) -> ir.Value:
        """The first column of this thread, where the first lane's is `column`."""
        first = _first() if self.lanes == CHUNK else arith.remui(_first(), _i32(self.lanes))
        return arith.addi(column, first if self.run == VECTOR else arith.divui(first, _i32(VECTOR // self.run)))

    def lane(self, i: int) -> int:
        """The lane of a thread's element `i`, from that of its first."""
        return i // self.run * (self.lanes // 2) + i % self.run

    def offset(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Elements before (row, column)."""
        i64 = ir.IntegerType.get_signless(64)
        rows = arith.muli(arith.extsi(i64, row), utils.c(self.stride, i64))
        return arith.addi(rows, arith.extsi(i64, column))

    def inside(self, row: ir.Value, column: ir.Value) -> ir.Value | None:
        """Whether the array has an element there; None if it always has."""
        tests = [(row, self.rows), (column, self.end)]
        return _all(*(_compare("ult", x, _i32(bound)) for x, bound in tests if bound is not None))


class Instruction:
    """A piece of device code: `emit` writes it."""

    references: ClassVar[int] = 0
    """How many of the first arguments are references."""

    def __call__(self, *args: Any) -> Any:
        """Run on references, int32 scalars and arrays of a chunk or of a value a thread."""
        refs, values = args[: self.references], args[self.references :]
        args = *refs, *(x if isinstance(x, jax.Array) else np.int32(x) for x in values)
        types = [_REF if i < self.references else _layout(x.shape) for i, x in enumerate(args)]
        run = plgpu.inline_mgpu(arg_types=tuple(types), return_type=self.result(*args))
        return run(self.emit)(*args)

    def result(self, *args: Any) -> Any:
        """The type of what `emit` returns."""
        raise NotImplementedError

    def emit(self, context: Any, *args: Any) -> Any:
        """Write the code."""
        raise NotImplementedError


@dataclass(frozen=True)
class Load(Instruction):
    """(ref, row, column): a chunk, `width` elements at a time; zeros where the array has none.

    `once`: nothing reads it again, so that caches may drop it first.
    """

    dtype: str
    place: Place
    width: int
    once: bool = False

    references = 1

    def result(self, ref, row, column):
        return _array((CHUNK,), self.dtype)

    def emit(self, context, ref, row, column):
        row, column = self.place.row(_scalar(row)), self.place.column(_scalar(column))
        element = utils.dtype_to_ir_type(jnp.dtype(self.dtype))
        words = []
        for first in range(0, VECTOR, self.width):
            at = arith.addi(column, _i32(self.place.lane(first)))
            address = _address(ref, self.place.offset(row, at))
            size = self.width * utils.bytewidth(element)
            words += _load(address, self.place.inside(row, at), size, _space(ref), self.once)
        return _fragments(_bitcast_words(words, element), self.dtype)


@dataclass(frozen=True)
class Store(Instruction):
    """(ref, row, column, chunk): what `Load` with the same fields reads; `once` as there."""

    dtype: str
    place: Place
    width: int
    once: bool = False

    references = 1

    def result(self, ref, row, column, value):
        return ()

    def emit(self, context, ref, row, column, value):
        row, column = self.place.row(_scalar(row)), self.place.column(_scalar(column))
        size = self.width * jnp.dtype(self.dtype).itemsize
        (register,) = value.registers.flat
        word = ir.IntegerType.get_signless(8 * min(size, 4))
        words = _bitcast_vector(register, word)
        for first in range(0, VECTOR, self.width):
            at = arith.addi(column, _i32(self.place.lane(first)))
            address = _address(ref, self.place.offset(row, at))
            count = size // (word.width // 8)
            _store(address, self.place.inside(row, at), words[:count], _space(ref), self.once)
            words = words[count:]
        return ()


@dataclass(frozen=True)
class LoadValue(Instruction):
    """(ref, row, column): one element a thread, that of the thread's row, widened to 32 bits; 0 where the array has none.

    `column` may be an array, of one column a thread: NaN where the array has none.
    """

    dtype: str
    place: Place

    references = 1

    def result(self, ref, row, column):
        return _array((THREADS,), "int32" if self.dtype == "int32" else "float32")

    def emit(self, context, ref, row, column):
        row, column = self.place.row(_scalar(row)), column.registers.flat[0]
        gathered = isinstance(column.type, ir.VectorType)
        if gathered:
            column = _extract(column, 0)
        inside = self.place.inside(row, column)
        element = utils.dtype_to_ir_type(jnp.dtype(self.dtype))
        words = _load(_address(ref, self.place.offset(row, column)), inside, utils.bytewidth(element), _space(ref))
        value = _extract(_bitcast_words(words, element), 0)
        if utils.bitwidth(element) == 16:
            value = llvm.fpext(ir.F32Type.get(), value)
        if gathered:
            value = arith.select(inside, value, utils.c(math.nan, value.type))
        return _fragments(_vector([value]), self.result(None, None, None).dtype)


@dataclass(frozen=True)
class StoreValue(Instruction):
    """(ref, row, column, value): the first thread of each row stores its value."""

    place: Place

    references = 1

    def result(self, ref, row, column, value):
        return ()

    def emit(self, context, ref, row, column, value):
        group = self.place.lanes if self.place.step else CHUNK
        first = _compare("ult", arith.remui(_first(), _i32(group)), _i32(VECTOR * self.place.shared))
        row, column = self.place.row(_scalar(row)), _scalar(column)
        inside = _all(first, self.place.inside(row, column))
        words = _bitcast_vector(value.registers.flat[0], ir.IntegerType.get_signless(32))
        _store(_address(ref, self.place.offset(row, column)), inside, words, _space(ref))
        return ()


@dataclass(frozen=True)
class Columns(Instruction):
    """(column): the columns of a chunk, int32, where the first lane's is `column`."""

    lanes: int
    run: int = VECTOR

    def result(self, column):
        return _array((CHUNK,), "int32")

    def emit(self, context, column):
        place = Place(0, self.lanes, run=self.run)
        first = place.column(_scalar(column))
        return _fragments(_vector([arith.addi(first, _i32(place.lane(i))) for i in range(VECTOR)]), "int32")


@dataclass(frozen=True)
class Rows(Instruction):
    """(row): the row of each thread, int32, where the first group's is `row`."""

    place: Place

    def result(self, row):
        return _array((THREADS,), "int32")

    def emit(self, context, row):
        return _fragments(_vector([self.place.row(_scalar(row))]), "int32")


@dataclass(frozen=True)
class Lanes(Instruction):
    """(): the number of each thread among `count`, a power of two."""

    count: int

    def result(self):
        return _array((THREADS,), "int32")

    def emit(self, context):
        return _fragments(_vector([arith.remui(_thread(), _i32(self.count))]), "int32")


@dataclass(frozen=True)
class FirstWarp(Instruction):
    """(): 1 in the warp of the first thread, else 0. Where only one branch is taken by it, threads must not meet there."""

    def result(self):
        return _array((), "int32")

    def emit(self, context):
        first = arith.extui(_i32_type(), _compare("ult", _thread(), _i32(32)))
        return mgpu.FragmentedArray.splat(first, (), is_signed=True)


@dataclass(frozen=True)
class Unpack(Instruction):
    """(chunk): the elements of a thread, as 8 arrays of one a thread."""

    def result(self, x):
        return [_array((THREADS,), x.dtype)] * VECTOR

    def emit(self, context, x):
        return [_fragments(_vector([_extract(x.registers.flat[0], i)]), "float32") for i in range(VECTOR)]


@dataclass(frozen=True)
class Pick(Instruction):
    """(*values): of a power of two of values a thread, thread t picks number t modulo their count."""

    def result(self, *values):
        return _array((THREADS,), values[0].dtype)

    def emit(self, context, *values):
        left, bit = [_first_register(x) for x in values], 1
        while len(left) > 1:
            odd = _compare("ne", arith.andi(_thread(), _i32(bit)), _i32(0))
            left = [arith.select(odd, y, x) for x, y in zip(left[::2], left[1::2], strict=True)]
            bit *= 2
        return _fragments(_vector(left), "float32")


@dataclass(frozen=True)
class Shuffle(Instruction):
    """(x): the values of the thread whose number differs in the bit `distance`, below 32."""

    distance: int

    def result(self, x):
        return _array(x.shape, x.dtype)

    def emit(self, context, x):
        values = [utils.shfl_bfly(value, self.distance) for value in _elements(x)]
        return _fragments(_vector(values), "float32")


@dataclass(frozen=True)
class Exchange(Instruction):
    """(x, y): for an even thread, its x and that of the next thread; for an odd one, its y and that of the one before."""

    def result(self, x, y):
        return [_array(x.shape, x.dtype)] * 2

    def emit(self, context, x, y):
        odd = _compare("ne", arith.remui(_thread(), _i32(2)), _i32(0))
        pairs = list(zip(_elements(x), _elements(y), strict=True))
        kept = [arith.select(odd, b, a) for a, b in pairs]
        received = [utils.shfl_bfly(arith.select(odd, a, b), 1) for a, b in pairs]
        return [_fragments(_vector(values), "float32") for values in (kept, received)]


@dataclass(frozen=True)
class Warps(Instruction):
    """(scratch, x): the values of the same thread in each of `count` warps, those of an aligned group."""

    count: int

    references = 1

    def result(self, scratch, x):
        return [_array(x.shape, x.dtype)] * self.count

    def emit(self, context, scratch, x):
        element = ir.F32Type.get()
        base, thread = utils.memref_ptr(scratch), _thread()
        values = _elements(x)
        size = len(values)
        utils.warpgroup_barrier()  # the scratch may still be read
        for i, value in enumerate(values):
            at = arith.addi(thread, _i32(i * THREADS))
            llvm.store(value, utils.getelementptr(base, [at], element))
        utils.warpgroup_barrier()
        group = arith.andi(thread, _i32(THREADS - 32 * self.count + 31))
        results = []
        for warp in range(self.count):
            ats = [arith.addi(group, _i32(i * THREADS + 32 * warp)) for i in range(size)]
            read = [llvm.load(element, utils.getelementptr(base, [at], element)) for at in ats]
            results.append(_fragments(_vector(read), "float32"))
        return results


@dataclass(frozen=True)
class Sync(Instruction):
    """(): what threads wrote to shared memory before can be read by the others of the warpgroup afterwards."""

    def result(self):
        return ()

    def emit(self, context):
        utils.warpgroup_barrier()
        return ()


@dataclass(frozen=True)
class Draw(Instruction):
    """(shared, counter): what a counter in global memory was, before one was added, the same for all threads.

    They must meet once more before the next one is drawn. An increment with a limit, as ptxas would have a warp add up what its
    threads add.
    """

    references = 2

    def result(self, shared, counter):
        return _array((), "int32")

    def emit(self, context, shared, counter):
        text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p atom.relaxed.gpu.global.inc.u32 $0, [$1], 0x7FFFFFFF; }"
        first = _compare("eq", _thread(), _i32(0))
        operands = [_address(counter, _i32(0)), arith.extui(_i32_type(), first)]
        words = _assembly(text, "=&r,l,r", [_i32_type()], operands, side_effects=True)
        _store(_address(shared, _i32(0)), first, words, _space(shared))
        utils.warpgroup_barrier()
        value = llvm.load(_i32_type(), utils.memref_ptr(shared))
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)


@dataclass(frozen=True)
class Share(Instruction):
    """(shared, *values): the first thread's values, for all threads, which must meet once more before the next are shared."""

    references = 1

    def result(self, shared, *values):
        return [_array((THREADS,), "float32") for _ in values]

    def emit(self, context, shared, *values):
        first = _compare("eq", _thread(), _i32(0))
        for i, value in enumerate(values):
            _store(_address(shared, _i32(i)), first, _bitcast_vector(value.registers.flat[0], _i32_type()), _space(shared))
        utils.warpgroup_barrier()
        element, base = ir.F32Type.get(), utils.memref_ptr(shared)
        read = [llvm.load(element, utils.getelementptr(base, [_i32(i)], element)) for i in range(len(values))]
        return [_fragments(_vector([x]), "float32") for x in read]


@dataclass(frozen=True)
class Post(Instruction):
    """(words, row, column, value): the first thread leaves its value in a word of 8 bytes, beside a mark, for `Await` to see.

    A word is written and read as a whole, and nothing else is handed on, so no fence is needed. It is an exchange since a store
    would take its place behind the stores of outputs, for which memory takes its time.

    Attributes:
        place: of the words in an array with a row for every row.
        start: words before that array.
    """

    place: Place
    start: int

    references = 1

    def result(self, words, row, column, value):
        return ()

    def emit(self, context, words, row, column, value):
        text = """{
            .reg .pred p;
            .reg .b64 word;
            setp.ne.b32 p, $2, 0;
            mov.b64 word, {$1, $2};
            @p atom.relaxed.gpu.global.exch.b64 word, [$0], word;
        }"""
        address = _word(words, self.start, self.place.offset(_scalar(row), _scalar(column)))
        (bits,) = _bitcast_vector(value.registers.flat[0], _i32_type())
        first = arith.extui(_i32_type(), _compare("eq", _thread(), _i32(0)))
        _assembly(text, "l,r,r", [], [address, bits, first])
        return ()


@dataclass(frozen=True)
class Await(Instruction):
    """(words, row, columns): what `Post` leaves, for each thread's column; 0 where the array has none.

    Waits for it. Zeros say that it is not there yet. The results of several arrays are waited for together.

    Attributes:
        place: of the words in an array with a row for every row.
        starts: words before each array.
        threads: those that take part; the others get zeros.
    """

    place: Place
    starts: tuple[int, ...]
    threads: int = THREADS

    references = 1

    def result(self, words, row, columns):
        return [_array((THREADS,), "float32") for _ in self.starts]

    def emit(self, context, words, row, columns):
        values, n = range(len(self.starts)), len(self.starts)
        text = "\n".join(
            [
                "{ .reg .pred p; .reg .b64 word; .reg .b32 mark, marks;",
                *(f"mov.b32 ${i}, 0;" for i in values),
                f"setp.eq.b32 p, ${2 * n}, 0;",
                "@p bra DONE;",
                "AGAIN:",
                "mov.b32 marks, 1;",
                *(
                    f"ld.relaxed.gpu.global.b64 word, [${n + i}]; mov.b64 {{${i}, mark}}, word; and.b32 marks, marks, mark;"
                    for i in values
                ),
                "setp.eq.b32 p, marks, 0;",
                "@p bra AGAIN;",
                "DONE: }",
            ]
        )
        row, column = _scalar(row), _first_register(columns)
        inside = self.place.inside(row, column)
        if self.threads < THREADS:
            inside = _all(inside, _compare("ult", _thread(), _i32(self.threads)))
        offset = self.place.offset(row, column)
        operands = [*(_word(words, start, offset) for start in self.starts), arith.extui(_i32_type(), inside)]
        constraints = ",".join(["=&r"] * n + ["l"] * n + ["r"])
        bits = _assembly(text, constraints, [_i32_type()] * n, operands, side_effects=True)
        return [_fragments(_vector([llvm.bitcast(ir.F32Type.get(), x)]), "float32") for x in bits]


@dataclass(frozen=True)
class Evaluate(Instruction):
    """(*inputs): the outputs of `block`, for every element or for every thread.

    Attributes:
        dtypes: of the outputs; a 16-bit one is rounded, its NaN canonical.
        size: of the outputs, 1024 or 128. Inputs of 128 are the same for the elements of a thread.
    """

    block: Block
    dtypes: tuple[str, ...]
    size: int

    def result(self, *inputs):
        return [_array((self.size,), dtype) for dtype in self.dtypes]

    def emit(self, context, *inputs):
        text, constraints = self.block.text(), self.block.constraints()
        count = self.size // THREADS
        elements = [_elements(x) for x in inputs]
        types = [ir.F32Type.get() if node.kind == "float" else _i32_type() for node in self.block.outputs]
        results: list[list] = []
        for i in range(count):
            operands = [values[i if len(values) > 1 else 0] for values in elements]
            results.append(_assembly(text, constraints, types, operands))
        columns = zip(*results, strict=True)
        return [_fragments(_rounded(values, dtype), dtype) for values, dtype in zip(columns, self.dtypes, strict=True)]


@dataclass(frozen=True)
class EvaluateEither(Evaluate):
    """(condition, *inputs): as `Evaluate`, but the outputs of the block `near` in warps where the condition is not 0.

    It must be the same throughout a warp.
    """

    near: Block

    def result(self, condition, *inputs):
        return super().result(*inputs)

    def emit(self, context, condition, *inputs):
        holds = _compare("ne", _first_register(condition), _i32(0))
        types = [ir.VectorType.get((self.size // THREADS,), utils.dtype_to_ir_type(jnp.dtype(x))) for x in self.dtypes]
        branch = scf.IfOp(holds, types, has_else=True)
        for block, body in ((self.near, branch.then_block), (self.block, branch.else_block)):
            with ir.InsertionPoint(body):
                values = Evaluate(block, self.dtypes, self.size).emit(context, *inputs)
                scf.yield_([x.registers.flat[0] for x in values])
        return [_fragments(x, dtype) for x, dtype in zip(branch.results, self.dtypes, strict=True)]


@dataclass(frozen=True)
class Extreme(Instruction):
    """(x, y): the larger or smaller elements of two chunks of 16 bits, two at a time; NaN wins.

    Attributes:
        kind: "max" or "min".
    """

    kind: str

    def result(self, x, y):
        return _array(x.shape, x.dtype)

    def emit(self, context, x, y):
        element = ir.VectorType(x.registers.flat[0].type).element_type
        pairs = zip(*(_bitcast_vector(value.registers.flat[0], _i32_type()) for value in (x, y)), strict=True)
        words = [_extreme(self.kind, pair, element) for pair in pairs]
        return _fragments(_bitcast_words(words, element), _name(element))


@dataclass(frozen=True)
class ThreadExtreme(Instruction):
    """(x): the largest or smallest of a thread's elements of 16 bits, as float32; NaN wins.

    Attributes:
        kind: "max" or "min".
    """

    kind: str

    def result(self, x):
        return _array((THREADS,), "float32")

    def emit(self, context, x):
        (register,) = x.registers.flat
        element = ir.VectorType(register.type).element_type
        words = _bitcast_vector(register, _i32_type())
        word = functools.reduce(lambda a, b: _extreme(self.kind, (a, b), element), words)
        low, high = _elements(_fragments(_bitcast_words([word], element), _name(element)))
        text = f"{self.kind}.NaN.f32 $0, $1, $2;"
        return _fragments(_vector(_assembly(text, "=f,f,f", [ir.F32Type.get()], [low, high])), "float32")


@dataclass(frozen=True)
class EveryThread(Instruction):
    """(x): 1 in warps where x is not 0 in any thread, else 0."""

    def result(self, x):
        return _array((THREADS,), "int32")

    def emit(self, context, x):
        text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.all.pred p, p, 0xFFFFFFFF; selp.b32 $0, 1, 0, p; }"
        words = _assembly(text, "=r,r", [_i32_type()], [_first_register(x)], side_effects=True)
        return _fragments(_vector(words), "int32")


def zeros() -> jax.Array:
    """A chunk of float32 zeros."""
    return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), _layout((CHUNK,)))


def width(dtype: str, *extents: int) -> int:
    """Elements of the widest access to rows whose runs, lengths and distances are multiples of `extents`."""
    return math.gcd(VECTOR, ACCESS // jnp.dtype(dtype).itemsize, *extents)


def _layout(shape: tuple[int, ...]) -> Any:
    return plgpu.Layout.WG_STRIDED(shape, vec_size=shape[0] // THREADS) if shape else _SCALAR


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=_layout(shape))


def _i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i32(value: int) -> ir.Value:
    return utils.c(value, _i32_type())


def _thread() -> ir.Value:
    """The number of this thread in its warpgroup; blocks have one dimension."""
    return arith.remui(arith.index_cast(_i32_type(), gpu.thread_id(gpu.Dimension.x)), _i32(THREADS))


def _first() -> ir.Value:
    """The place of this thread's first element in a chunk."""
    return arith.muli(_thread(), _i32(VECTOR))


def _compare(predicate: str, x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, predicate), x, y)


def _all(*tests: ir.Value | None) -> ir.Value | None:
    """The conjunction; None stands for true."""
    given = [test for test in tests if test is not None]
    return functools.reduce(arith.andi, given) if given else None


def _scalar(x: mgpu.FragmentedArray) -> ir.Value:
    return x.registers.item()


def _first_register(x: mgpu.FragmentedArray) -> ir.Value:
    """A scalar, or what a thread has of an array with a value a thread."""
    register = x.registers.flat[0]
    return _extract(register, 0) if isinstance(register.type, ir.VectorType) else register


def _elements(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """The elements of this thread; 16-bit floats widened."""
    (register,) = x.registers.flat
    element = ir.VectorType(register.type).element_type
    if isinstance(element, ir.BF16Type):  # the upper half of a float32
        halves = []
        for word in _bitcast_vector(register, _i32_type()):
            halves += [arith.shli(word, _i32(16)), arith.andi(word, _i32(-65536))]
        return [llvm.bitcast(ir.F32Type.get(), half) for half in halves]
    values = [_extract(register, i) for i in range(ir.VectorType(register.type).shape[0])]
    return [llvm.fpext(ir.F32Type.get(), value) for value in values] if isinstance(element, ir.F16Type) else values


def _name(element: ir.Type) -> str:
    """The dtype of 16-bit floats."""
    return "bfloat16" if isinstance(element, ir.BF16Type) else "float16"


def _extreme(kind: str, pair: Sequence[ir.Value], element: ir.Type) -> ir.Value:
    """The larger or smaller halves of two words of 16-bit floats."""
    return _assembly(f"{kind}.NaN.{_PAIR[_name(element)]} $0, $1, $2;", "=r,r,r", [_i32_type()], list(pair))[0]


def _rounded(values: Sequence[ir.Value], dtype: str) -> ir.Value:
    """float32 or int32 values as a vector of `dtype`."""
    if jnp.dtype(dtype).itemsize == 4:
        return _vector(values)
    pairs = zip(values[::2], values[1::2], strict=True)
    text = f"cvt.rn.{_PAIR[dtype]}.f32 $0, $2, $1;"
    words = [_assembly(text, "=r,f,f", [_i32_type()], list(pair))[0] for pair in pairs]
    return _bitcast_words(words, utils.dtype_to_ir_type(jnp.dtype(dtype)))


def _fragments(register: ir.Value, dtype: str) -> mgpu.FragmentedArray:
    size = ir.VectorType(register.type).shape[0]
    layout = mgpu.WGStridedFragLayout((size * THREADS,), size)
    registers = np.array([register], dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=utils.is_signed(jnp.dtype(dtype)))


def _extract(vector: ir.Value, i: int) -> ir.Value:
    return llvm.extractelement(vector, _i32(i))


def _vector(values: Sequence[ir.Value]) -> ir.Value:
    result = llvm.mlir_undef(ir.VectorType.get((len(values),), values[0].type))
    for i, value in enumerate(values):
        result = llvm.insertelement(result, value, _i32(i))
    return result


def _bitcast_words(words: list[ir.Value], element: ir.Type) -> ir.Value:
    """Integers as a vector of `element`."""
    vector = _vector(words)
    count = len(words) * utils.bitwidth(words[0].type) // utils.bitwidth(element)
    return llvm.bitcast(ir.VectorType.get((count,), element), vector)


def _bitcast_vector(vector: ir.Value, word: ir.Type) -> list[ir.Value]:
    """A vector as integers of the type `word`."""
    kind = ir.VectorType(vector.type)
    count = kind.shape[0] * utils.bitwidth(kind.element_type) // utils.bitwidth(word)
    words = llvm.bitcast(ir.VectorType.get((count,), word), vector)
    return [_extract(words, i) for i in range(count)]


def _space(ref: ir.Value) -> str:
    return "shared" if utils.is_smem_ref(ref) else "global"


def _address(ref: ir.Value, offset: ir.Value) -> ir.Value:
    """The address of an element in its state space."""
    pointer = utils.getelementptr(utils.memref_ptr(ref), [offset], ir.MemRefType(ref.type).element_type)
    if _space(ref) == "shared":
        return llvm.ptrtoint(_i32_type(), pointer)
    pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)


def _word(words: ir.Value, start: int, offset: ir.Value) -> ir.Value:
    """The address of a word of 8 bytes, `offset` behind the first `start`."""
    i64 = ir.IntegerType.get_signless(64)
    return _address(words, arith.muli(arith.addi(offset, utils.c(start, i64)), utils.c(2, i64)))


# Of accesses to what nothing reads again.
ONCE = ".L1::evict_first.L2::cache_hint"
POLICY = "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"


def _load(address: ir.Value, inside: ir.Value | None, size: int, space: str, once: bool = False) -> list[ir.Value]:
    """`size` bytes as integers of up to 4 bytes, or zeros."""
    bits = 8 * min(size, 4)
    count = max(size // 4, 1)
    outputs = [f"${i}" for i in range(count)]
    vector, listed = (f".v{count}", f"{{{', '.join(outputs)}}}") if count > 1 else ("", outputs[0])
    kind = {"global": "global.nc", "shared": "shared"}[space]
    zeros = " ".join(f"mov.b{bits} {x}, 0;" for x in outputs)
    load = f"ld.{kind}{ONCE * once}{vector}.b{bits} {listed}, [${count}]{', policy' * once};"
    policy = f".reg .b64 policy; {POLICY}" if once else ""
    register, pointer = "h" if bits == 16 else "r", "r" if space == "shared" else "l"
    types = [ir.IntegerType.get_signless(bits)] * count
    if inside is None:
        constraints = ",".join([f"={register}"] * count + [pointer])
        return _assembly(f"{{ {policy} {load} }}", constraints, types, [address], side_effects=True)
    text = f"{{ .reg .pred p; {policy} setp.ne.b32 p, ${count + 1}, 0; {zeros} @p {load} }}"
    constraints = ",".join([f"=&{register}"] * count + [pointer, "r"])
    return _assembly(text, constraints, types, [address, arith.extui(_i32_type(), inside)], side_effects=True)


def _store(address: ir.Value, inside: ir.Value | None, words: list[ir.Value], space: str, once: bool = False) -> None:
    bits, count = words[0].type.width, len(words)
    inputs = [f"${i + 1}" for i in range(count)]
    vector, listed = (f".v{count}", f"{{{', '.join(inputs)}}}") if count > 1 else ("", inputs[0])
    store = f"st.{space}{ONCE * once}{vector}.b{bits} [$0], {listed}{', policy' * once};"
    policy = f".reg .b64 policy; {POLICY}" if once else ""
    operands = ["r" if space == "shared" else "l", *["h" if bits == 16 else "r"] * count]
    if inside is None:
        _assembly(f"{{ {policy} {store} }}", ",".join(operands), [], [address, *words], side_effects=True)
        return
    text = f"{{ .reg .pred p; {policy} setp.ne.b32 p, ${count + 1}, 0; @p {store} }}"
    predicate = arith.extui(_i32_type(), inside)
    _assembly(text, ",".join([*operands, "r"]), [], [address, *words, predicate], side_effects=True)


def _assembly(
    text: str, constraints: str, types: list[ir.Type], operands: list[ir.Value], side_effects: bool = False
) -> list[ir.Value]:
    """Inline PTX with results of `types`."""
    if not types:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)
        return []
    result = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    value = llvm.inline_asm(result, operands, text, constraints, has_side_effects=side_effects)
    return [value] if len(types) == 1 else [llvm.extractvalue(kind, value, [i]) for i, kind in enumerate(types)]
