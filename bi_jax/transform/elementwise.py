"""Functions of single elements, so that an element's bits do not depend on where it is nor on the program around it.

XLA rewrites arithmetic by what it fuses, and it fuses by shape: it contracts a * b + c into one rounding, divides by way of a
reciprocal where the divisor is one number for all, gathers constant factors, and keeps bfloat16 intermediates in float32.
`pinned` puts each result out of reach of that, at the price of one integer operation and of no memory traffic.

On a CPU its exp, log, tanh and some others have two versions, for the bulk of an array and for what is left over, which
differ in the last bit; the contract's take their place there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive

from bi_jax.engines import define
from bi_jax.rows import primitive as rows
from shared_specs.programs import pointwise
from shared_specs.rows import RowProgram

PROGRAMS: dict[str, RowProgram] = {
    "cos": pointwise.COS,
    "erf": pointwise.ERF,
    "exp": pointwise.EXP,
    "log": pointwise.LOG,
    "logistic": pointwise.SIGMOID,
    "rsqrt": pointwise.RSQRT,
    "sin": pointwise.SIN,
    "tanh": pointwise.TANH,
}
"""Functions of one argument that the contract has."""

elementary_p = Primitive("bi_elementary")


def elementary(name: str, x: jax.Array) -> jax.Array:
    """The function of the contract on a CPU, XLA's own on a GPU."""
    return elementary_p.bind(x, name=name)


def by_program(program: RowProgram, *operands: jax.Array) -> jax.Array:
    """A program of elements on arrays of one shape and dtype."""
    x = operands[0]
    inputs = {name: value.reshape(1, x.size) for name, value in zip(program.elements, operands, strict=True)}
    return rows.run_rows(program, inputs, {}, {"y": x.dtype})["y"].reshape(x.shape)


def pinned(x: jax.Array) -> jax.Array:
    """x, as a value that no compiler combines with what computed it: the smaller of its pattern and the largest but one.

    Only the very largest pattern changes, which is one of NaN, and becomes another.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize not in (2, 4):
        return x
    storage = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32
    pattern = lax.min(lax.bitcast_convert_type(x, storage), np.array(np.iinfo(storage).max - 1, storage))
    return lax.bitcast_convert_type(pattern, x.dtype)


def div(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y. The divisor is made to depend on each x, lest XLA multiply by its reciprocal."""
    x, y = jnp.broadcast_arrays(x, y)
    return pinned(lax.div(x, lax.select(lax.ne(x, x), x, y)))


def integer_pow(x: jax.Array, y: int) -> jax.Array:
    """x^y by squaring, each product rounded; the inverse for negative y."""
    power, result = x, None
    for bit in bin(abs(y))[:1:-1]:
        if bit == "1":
            result = power if result is None else pinned(lax.mul(result, power))
        power = pinned(lax.mul(power, power))
    result = jnp.ones_like(x) if result is None or y == 0 else result
    return div(jnp.ones_like(x), result) if y < 0 else result


def one_minus_square(x: jax.Array) -> jax.Array:
    """(1 + x) * (1 - x)."""
    one = jnp.ones_like(x)
    return pinned(lax.mul(pinned(lax.add(one, x)), pinned(lax.sub(one, x))))


STOCK: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cos": lax.cos,
    "erf": lax.erf,
    "exp": lax.exp,
    "log": lax.log,
    "logistic": lax.logistic,
    "rsqrt": lax.rsqrt,
    "sin": lax.sin,
    "tanh": lax.tanh,
}


@elementary_p.def_abstract_eval
def _abstract(x: Any, *, name: str) -> core.ShapedArray:
    return core.ShapedArray(x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type)


def _on_cpu(x: jax.Array, *, name: str) -> jax.Array:
    return by_program(PROGRAMS[name], x)


def _on_cuda(x: jax.Array, *, name: str) -> jax.Array:
    return pinned(STOCK[name](x))


define(elementary_p, lambda name: name, _on_cpu, _on_cuda)
