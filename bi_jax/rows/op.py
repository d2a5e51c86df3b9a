"""Row and column programs as differentiable functions of JAX arrays.

An op is a thin shell over a program of `shared_specs.programs`, on [R, N] arrays. The families (`softmax`, `norm` and so on)
make their ops here, next to their public functions.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bi_jax.rows import primitive
from shared_specs.rows import ColumnProgram, RowProgram

STATISTICS = ("mean", "rstd", "max", "log_sum", "norm", "factor")
"""Outputs that stay float32 whatever the dtype of the op; gradients need them and have none themselves."""

Program = RowProgram | ColumnProgram
Arrays = dict[str, Any]
Run = Callable[[SimpleNamespace], Mapping[str, jax.Array]]
Gradient = Callable[[SimpleNamespace, SimpleNamespace], Mapping[str, jax.Array]]
"""A function (saved, cotangents) -> gradients by the name of the input.

`saved` holds what the op was told to keep, `dtypes` and `shapes` of the inputs by name, and `needs`, the names of the inputs
that want a gradient; `cotangents` holds one for each result, by name.
"""


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Facts:
    """What a gradient needs to know besides arrays."""

    arguments: tuple[str, ...]
    given: tuple[tuple[str, tuple[int, ...], Any], ...]
    needs: frozenset[str]


class Op:
    """A function of arrays by name, called with the dtype of its results.

    Args:
        name: of the public function, for messages.
        run: results by name from a namespace of all arguments; arguments that are not given are None there.
        keep: arguments and results that the gradient needs.
        gradient: what it does not return has no gradient, and asking for it is an error.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        *,
        keep: tuple[str, ...] = (),
        gradient: Gradient | None = None,
    ) -> None:
        self.name, self.run, self.keep, self.gradient = name, run, keep, gradient

    def __call__(self, dtype: Any = jnp.float32, **arguments: Any) -> SimpleNamespace:
        """The results by name; an argument may be None."""
        return SimpleNamespace(**_call(self, jnp.dtype(dtype), arguments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _call(op: Op, dtype: Any, arguments: Arrays) -> Arrays:
    return dict(op.run(SimpleNamespace(**arguments, dtype=dtype)))


def _forward(op: Op, dtype: Any, primals: dict[str, Any]) -> tuple[Arrays, tuple[Arrays, _Facts]]:
    needs = frozenset(name for name, x in primals.items() if x is not None and x.perturbed)
    arguments = {name: None if x is None else x.value for name, x in primals.items()}
    results = _call(op, dtype, arguments)
    saved = {name: results.get(name, arguments.get(name)) for name in op.keep}
    given = tuple((name, jnp.shape(x), jnp.result_type(x)) for name, x in arguments.items() if x is not None)
    return results, (saved, _Facts(tuple(arguments), given, needs))


def _backward(op: Op, _: Any, residuals: tuple[Arrays, _Facts], cotangents: dict[str, Any]) -> tuple[dict[str, Any]]:
    saved, facts = residuals
    given = {
        name: jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g
        for name, g in cotangents.items()
        if name not in STATISTICS
    }
    shapes, dtypes = ({fact[0]: fact[i] for fact in facts.given} for i in (1, 2))
    everything = SimpleNamespace(**saved, shapes=shapes, dtypes=dtypes, needs=facts.needs)
    gradients = op.gradient(everything, SimpleNamespace(**given)) if op.gradient else {}
    if refused := facts.needs - gradients.keys():
        raise TypeError(
            f"bi_jax.{op.name}: no gradient with respect to {', '.join(sorted(refused))}; use jax.lax.stop_gradient"
        )
    return ({name: gradients.get(name) if name in facts.needs else None for name in facts.arguments},)


_call.defvjp(_forward, _backward, symbolic_zeros=True)


def row_op(
    name: str,
    program: Program | Callable[[SimpleNamespace], Program],
    *,
    keep: tuple[str, ...] = (),
    gradient: Gradient | None = None,
) -> Op:
    """The op of a program, or of a choice of programs by the arguments.

    Arguments are the program's inputs, scalars and integers by name. A result with the name of an input has its dtype; others
    have the dtype of the call, but statistics are float32.
    """
    return Op(
        name, lambda e: run_program(program if isinstance(program, Program) else program(e), e), keep=keep, gradient=gradient
    )


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
