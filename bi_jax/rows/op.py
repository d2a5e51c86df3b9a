"""Row and column programs as differentiable functions of JAX arrays.

An op is a thin shell over a program of `shared_specs.programs`, on [R, N] arrays. The families (`softmax`, `norm` and so on)
make their ops here, next to their public functions.

Differentiation meets an op as one linear function, its derivative at the arguments. That is a primitive: transposed, it is
the op's gradient; evaluated, as forward-mode differentiation does, it is the op's rule for tangents, or an error that names
the op where there is none.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from bi_jax.engines import define, result_type, varying
from bi_jax.rows import primitive
from shared_specs.programs.norm import COLUMN_SUM
from shared_specs.rows import ColumnProgram, RowProgram

STATISTICS = ("mean", "rstd", "max", "log_sum", "norm", "factor")
"""Outputs that stay float32 whatever the dtype of the op; gradients need them and have none themselves."""

Program = RowProgram | ColumnProgram
Arrays = dict[str, Any]
Run = Callable[[SimpleNamespace], Mapping[str, jax.Array]]
Rule = Callable[[SimpleNamespace, SimpleNamespace], Mapping[str, jax.Array]]
"""A function (saved, cotangents) -> gradients by the name of the input, or (saved, tangents) -> tangents of the results.

`saved` holds what the op was told to keep, `dtypes` and `shapes` of the inputs by name, `needs`, the names of the inputs
that want a gradient, and the `dtype` of the call; `cotangents` holds one for each result, by name; `tangents` one for each
input, None where it is constant.
"""


class Op:
    """A function of arrays by name, called with the dtype of its results.

    Args:
        name: of the public function, for messages.
        run: results by name from a namespace of all arguments; arguments that are not given are None there.
        keep: arguments and results that the derivatives need.
        gradient: what it does not return has no gradient, and asking for it is an error.
        tangent: without it, forward-mode differentiation is an error.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        *,
        keep: tuple[str, ...] = (),
        gradient: Rule | None = None,
        tangent: Rule | None = None,
    ) -> None:
        self.name, self.run, self.keep, self.gradient, self.tangent = name, run, keep, gradient, tangent

    def __call__(self, dtype: Any = jnp.float32, **arguments: Any) -> SimpleNamespace:
        """The results by name; an argument may be None."""
        arrays = dict(zip(arguments, varying(list(arguments.values())), strict=True))
        return SimpleNamespace(**_call(self, jnp.dtype(dtype), arrays))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(op: Op, dtype: Any, arguments: Arrays) -> Arrays:
    return dict(op.run(SimpleNamespace(**arguments, dtype=dtype)))


@functools.partial(_call.defjvp, symbolic_zeros=True)
def _jvp(op: Op, dtype: Any, primals: tuple[Arrays], tangents: tuple[Arrays]) -> tuple[Arrays, Arrays]:
    arguments, moved = primals[0], {k: t for k, t in tangents[0].items() if not isinstance(t, SymbolicZero | None)}
    if op.gradient is None:
        raise _no_derivative(op, moved)
    results = _call(op, dtype, arguments)
    kept = {k: x for k in op.keep if (x := results.get(k, arguments.get(k))) is not None}
    given, made = (
        tuple((k, jnp.shape(x), jnp.result_type(x)) for k, x in group.items() if x is not None)
        for group in (arguments, results)
    )
    derivative = _Derivative(op, dtype, tuple(kept), tuple(moved), given, made)
    outputs = derivative_p.bind(*varying([*kept.values(), *moved.values()]), derivative=derivative)
    return results, dict(zip(results, outputs, strict=True))


def _no_derivative(op: Op, names: Sequence[str] | Arrays | frozenset[str]) -> TypeError:
    return TypeError(f"bi_jax.{op.name}: no derivative with respect to {', '.join(sorted(names))}; use jax.lax.stop_gradient")


@dataclass(frozen=True)
class _Derivative:
    """The derivative of an op, a linear function from tangents of arguments to tangents of results.

    Attributes:
        op: the op.
        dtype: of its call.
        kept: names of the values that the derivative depends on.
        moved: names of the arguments that have a tangent.
        given: names, shapes and dtypes of all arguments.
        results: names, shapes and dtypes of the results.
    """

    op: Op
    dtype: Any
    kept: tuple[str, ...]
    moved: tuple[str, ...]
    given: tuple[tuple[str, tuple[int, ...], Any], ...]
    results: tuple[tuple[str, tuple[int, ...], Any], ...]

    def push(self, kept: Sequence[Any], tangents: Sequence[Any]) -> list[jax.Array]:
        """Tangents of the results."""
        if self.op.tangent is None:
            raise TypeError(
                f"bi_jax.{self.op.name}: no forward-mode derivative (jax.jvp, jax.jacfwd); "
                "use reverse mode (jax.grad, jax.vjp, jax.jacrev)"
            )
        given = dict.fromkeys(fact[0] for fact in self.given) | dict(zip(self.moved, tangents, strict=True))
        moved = self.op.tangent(self._saved(kept, frozenset()), SimpleNamespace(**given))
        return [moved[k] if k in moved else jnp.zeros(shape, dtype) for k, shape, dtype in self.results]

    def pull(self, kept: Sequence[Any], cotangents: Sequence[Any], needs: frozenset[str]) -> dict[str, jax.Array]:
        """Gradients of the arguments in `needs`."""
        assert self.op.gradient is not None
        named = zip(self.results, cotangents, strict=True)
        given = {fact[0]: g for fact, g in named if fact[0] not in STATISTICS}
        gradients = self.op.gradient(self._saved(kept, needs), SimpleNamespace(**given))
        if refused := needs - gradients.keys():
            raise _no_derivative(self.op, refused)
        return {k: gradients[k] for k in needs}

    def _saved(self, kept: Sequence[Any], needs: frozenset[str]) -> SimpleNamespace:
        shapes, dtypes = ({fact[0]: fact[i] for fact in self.given} for i in (1, 2))
        values = dict.fromkeys(self.op.keep) | dict(zip(self.kept, kept, strict=True))
        return SimpleNamespace(**values, shapes=shapes, dtypes=dtypes, needs=needs, dtype=self.dtype)


@dataclass(frozen=True)
class _Mapped:
    """A derivative under vmap.

    Attributes:
        each: that of one example.
        mapped: for each value it depends on, and then for each tangent, whether examples have their own, stacked in front.
        size: number of examples.
    """

    each: "_Derivative | _Mapped"
    mapped: tuple[bool, ...]
    size: int

    @property
    def op(self) -> Op:
        return self.each.op

    @property
    def kept(self) -> tuple[str, ...]:
        return self.each.kept

    @property
    def moved(self) -> tuple[str, ...]:
        return self.each.moved

    @property
    def results(self) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        return tuple((k, (self.size, *shape), dtype) for k, shape, dtype in self.each.results)

    def push(self, kept: Sequence[Any], tangents: Sequence[Any]) -> list[jax.Array]:
        """Tangents of the results."""
        axes = [0 if mapped else None for mapped in self.mapped]
        return jax.vmap(self.each.push, (axes[: len(kept)], axes[len(kept) :]))(list(kept), list(tangents))

    def pull(self, kept: Sequence[Any], cotangents: Sequence[Any], needs: frozenset[str]) -> dict[str, jax.Array]:
        """Gradients of the arguments in `needs`; what examples share has the sum, in the order of the examples' rows."""
        axes = [0 if mapped else None for mapped in self.mapped]
        pull = functools.partial(self.each.pull, needs=needs)
        gradients = jax.vmap(pull, (axes[: len(kept)], 0))(list(kept), list(cotangents))
        own = dict(zip(self.moved, self.mapped[len(kept) :], strict=True))
        return {k: g if own[k] else _sum_of_examples(g) for k, g in gradients.items()}


def _sum_of_examples(x: jax.Array) -> jax.Array:
    rows = x.reshape(x.shape[0], x[0].size)
    return primitive.run_columns(COLUMN_SUM, {"x": rows}, {}, {"y": x.dtype})["y"].reshape(x.shape[1:])


derivative_p = Primitive("bi_derivative")
derivative_p.multiple_results = True
"""Operands: the values that a derivative depends on, then tangents. Parameter: `derivative`."""


@derivative_p.def_abstract_eval
def _abstract(*operands: Any, derivative: _Derivative | _Mapped) -> list[Any]:
    return [result_type(derivative.op.name, shape, dtype, operands) for _, shape, dtype in derivative.results]


def _push(*operands: jax.Array, derivative: _Derivative | _Mapped) -> list[jax.Array]:
    count = len(derivative.kept)
    return derivative.push(operands[:count], operands[count:])


define(derivative_p, lambda derivative: derivative.op.name, _push, _push)


def _transpose(cotangents: Sequence[Any], *operands: Any, derivative: _Derivative | _Mapped) -> list[jax.Array | None]:
    count = len(derivative.kept)
    needs = [name for name, x in zip(derivative.moved, operands[count:], strict=True) if ad.is_undefined_primal(x)]
    if all(isinstance(g, ad.Zero) for g in cotangents):
        return [None] * len(operands)
    given = [
        jnp.zeros(shape, dtype) if isinstance(g, ad.Zero) else g
        for g, (_, shape, dtype) in zip(cotangents, derivative.results, strict=True)
    ]
    gradients = derivative.pull(operands[:count], given, frozenset(needs))
    return [None] * count + [gradients.get(name) for name in derivative.moved]


def _tangent(primals: Sequence[Any], tangents: Sequence[Any], *, derivative: _Derivative | _Mapped) -> tuple[Any, Any]:
    """The derivative is linear in tangents. In what else it depends on, it would be a second derivative."""
    count = len(derivative.kept)
    if any(not isinstance(t, ad.Zero) for t in tangents[:count]):
        raise TypeError(f"bi_jax.{derivative.op.name}: no derivative of a forward-mode derivative")
    moved = [ad.instantiate_zeros(t) for t in tangents[count:]]
    outputs, linear = (
        derivative_p.bind(*varying([*primals[:count], *last]), derivative=derivative) for last in (primals[count:], moved)
    )
    return outputs, linear


def _batch(operands: Sequence[Any], axes: Sequence[int | None], *, derivative: _Derivative | _Mapped) -> tuple[Any, list[int]]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    mapped = _Mapped(derivative, tuple(axis is not None for axis in axes), size)
    return derivative_p.bind(*moved, derivative=mapped), [0] * len(mapped.results)


ad.primitive_transposes[derivative_p] = _transpose
ad.primitive_jvps[derivative_p] = _tangent
batching.primitive_batchers[derivative_p] = _batch


def row_op(
    name: str,
    program: Program | Callable[[SimpleNamespace], Program],
    *,
    keep: tuple[str, ...] = (),
    gradient: Rule | None = None,
    tangent: Rule | None = None,
) -> Op:
    """The op of a program, or of a choice of programs by the arguments.

    Arguments are the program's inputs, scalars and integers by name. A result with the name of an input has its dtype; others
    have the dtype of the call, but statistics are float32.
    """

    def run(e: SimpleNamespace) -> dict[str, jax.Array]:
        return run_program(program if isinstance(program, Program) else program(e), e)

    return Op(name, run, keep=keep, gradient=gradient, tangent=tangent)


def run_program(program: Program, e: SimpleNamespace) -> dict[str, jax.Array]:
    """Every output of `program` on the arguments in `e`."""
    inputs = {name: getattr(e, name) for name in (*program.elements, *program.columns)}
    inputs |= {name: getattr(e, name).astype(jnp.float32) for name in program.rows}
    scalars = {name: getattr(e, name) for name in program.scalars}
    if isinstance(program, ColumnProgram):
        return primitive.run_columns(program, inputs, scalars, {name: _out_dtype(name, e) for name in program.sums})
    inputs |= {name: getattr(e, name) for name in program.ids}
    scalars |= {name: getattr(e, name) for name in program.integers}
    names = (*program.outputs, *program.row_outputs)
    return primitive.run_rows(program, inputs, scalars, {name: _out_dtype(name, e) for name in names})


def _out_dtype(name: str, e: SimpleNamespace) -> Any:
    if name in STATISTICS:
        return jnp.float32
    replaced = getattr(e, name, None)
    return e.dtype if replaced is None else replaced.dtype
