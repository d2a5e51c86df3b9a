"""The JAX primitives behind every row operation: a row program, or a column program, on arrays.

On CPU they are the functions of `cpu`, on CUDA those of `mosaic`. Their derivatives are those of the ops made of them (`op`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import batching

from bi_jax.engines import define, result_type, varying
from bi_jax.narrow import narrow
from bi_jax.rows import cpu, mosaic
from shared_specs.rows import ColumnProgram, RowProgram

rows_p = Primitive("bi_rows")
columns_p = Primitive("bi_columns")
rows_p.multiple_results = columns_p.multiple_results = True

Program = RowProgram | ColumnProgram


def run_rows(
    program: RowProgram,
    inputs: Mapping[str, jax.Array],
    scalars: Mapping[str, jax.Array | float] | None = None,
    out_dtypes: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Every output of `program`, [R, N] or [R], rounded once to its dtype in `out_dtypes`; float32 where a row output has none.

    Args:
        program: what is computed.
        inputs: elements [R, N] and columns [N] of a 16-bit float dtype or float32, rows float32 [R], ids int32 [R].
        scalars: the program's scalars and integers, which may be traced.
        out_dtypes: dtypes of outputs.
    """
    dtypes = tuple(jnp.dtype((out_dtypes or {})[name]) for name in program.outputs)
    results = rows_p.bind(*_operands(program, inputs, scalars or {}), program=program, out_dtypes=dtypes)
    names = (*program.outputs, *program.row_outputs)
    return {name: narrow(x, (out_dtypes or {}).get(name, x.dtype)) for name, x in zip(names, results, strict=True)}


def run_columns(
    program: ColumnProgram,
    inputs: Mapping[str, jax.Array],
    scalars: Mapping[str, jax.Array | float] | None = None,
    out_dtypes: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """The sums of `program`, [N] each of its dtype in `out_dtypes`; arguments as for `run_rows`."""
    dtypes = tuple(jnp.dtype((out_dtypes or {})[name]) for name in program.sums)
    results = columns_p.bind(*_operands(program, inputs, scalars or {}), program=program, out_dtypes=dtypes)
    return dict(zip(program.sums, results, strict=True))


def _per_row(program: Program) -> tuple[str, ...]:
    """The operands that have a row for each row of the result."""
    return (*program.elements, *program.rows, *getattr(program, "ids", ()))


def _shared(program: Program) -> tuple[str, ...]:
    """The operands that all rows share."""
    return (*program.columns, *program.scalars, *getattr(program, "integers", ()))


def _operands(program: Program, inputs: Mapping[str, Any], scalars: Mapping[str, Any]) -> list[jax.Array]:
    integers = getattr(program, "integers", ())
    numbers = {name: jnp.asarray(x, jnp.int32 if name in integers else jnp.float32) for name, x in scalars.items()}
    values = {**inputs, **numbers}
    return varying([values[name] for name in (*_per_row(program), *_shared(program))])


def _abstract_rows(x: Any, *others: Any, program: RowProgram, out_dtypes: tuple[Any, ...]) -> list[core.ShapedArray]:
    shapes = [(x.shape, dtype) for dtype in out_dtypes] + [(x.shape[:1], jnp.float32) for _ in program.row_outputs]
    return [result_type(program.name, *shape, (x, *others)) for shape in shapes]


def _abstract_columns(x: Any, *others: Any, program: ColumnProgram, out_dtypes: tuple[Any, ...]) -> list[core.ShapedArray]:
    return [result_type(program.name, x.shape[1:], dtype, (x, *others)) for dtype in out_dtypes]


def _on_cpu(program: Program, *operands: Any) -> dict[str, jax.Array]:
    return cpu.run_rows(program, *operands) if isinstance(program, RowProgram) else cpu.run_columns(program, *operands)


def _on_cuda(program: Program, *operands: Any) -> dict[str, jax.Array]:
    return mosaic.run_rows(program, *operands) if isinstance(program, RowProgram) else mosaic.run_columns(program, *operands)


def _engine(run: Callable[..., dict[str, jax.Array]]) -> Callable[..., list[jax.Array]]:
    def engine(*operands: jax.Array, program: Program, out_dtypes: tuple[Any, ...]) -> list[jax.Array]:
        values = dict(zip((*_per_row(program), *_shared(program)), operands, strict=True))
        scalars = {name: values.pop(name) for name in (*program.scalars, *getattr(program, "integers", ()))}
        names = (*program.outputs, *program.row_outputs) if isinstance(program, RowProgram) else tuple(program.sums)
        # Without elements there is no kernel to launch: what is left, numbers of rows, needs no engine of the platform.
        chosen = run if operands[0].size else _on_cpu
        results = chosen(program, values, scalars, dict(zip(names, out_dtypes, strict=False)))
        return [results[name] for name in names]

    return engine


def _batch(primitive: Primitive, operands: tuple[jax.Array, ...], axes: tuple[int | None, ...], **params: Any) -> Any:
    """vmap: more rows where rows are mapped, one after the other where what rows share is, or where rows are summed."""
    program = params["program"]
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    operands = tuple(x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True))
    mapped = [axis is not None for axis in axes]
    count = len(_per_row(program))
    if primitive is columns_p or any(mapped[count:]) or size == 0:
        moving = [x for x, is_mapped in zip(operands, mapped, strict=True) if is_mapped]

        def one(moved: list[jax.Array]) -> list[jax.Array]:
            rest = iter(moved)
            each = [next(rest) if is_mapped else x for x, is_mapped in zip(operands, mapped, strict=True)]
            return primitive.bind(*each, **params)

        results = lax.map(one, moving)
        return results, [0] * len(results)

    def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
        x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        return lax.reshape(x, (size * x.shape[1], *x.shape[2:]))

    folded = [fold(x, is_mapped) for x, is_mapped in zip(operands[:count], mapped[:count], strict=True)]
    results = primitive.bind(*folded, *operands[count:], **params)
    return [lax.reshape(x, (size, x.shape[0] // size, *x.shape[1:])) for x in results], [0] * len(results)


for primitive, abstract in ((rows_p, _abstract_rows), (columns_p, _abstract_columns)):
    primitive.def_abstract_eval(abstract)
    define(primitive, lambda program, **_: program.name, _engine(_on_cpu), _engine(_on_cuda))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
