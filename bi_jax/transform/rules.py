"""What becomes of each primitive: `treatment` decides it from an equation, before anything is computed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from bi_jax.narrow import narrow
from bi_jax.transform import elementwise
from bi_jax.transform.coverage import COMPUTED, EXACT, FLOATS, MOVED, Options, is_inexact
from bi_jax.transform.elementwise import Arithmetic, elementary, pinned
from bi_jax.transform.products import dot_general, operand_dtype
from bi_jax.transform.reductions import PROGRAMS as REDUCTIONS
from bi_jax.transform.reductions import product, reduction, sum_over_axes
from bi_jax.transform.scatter import covered, scatter_add
from shared_specs import gemm_contract
from shared_specs.trace import contract_id

Compute = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What is done about an equation.

    Attributes:
        kind: "contract" computes as the contract says, "pinned" rounds where the program does, "kept" changes nothing.
        by: identity of the contract, or why there is none.
        compute: the result from the operands; None where the primitive itself computes.
    """

    kind: Literal["contract", "pinned", "kept", "uncovered"]
    by: str = ""
    compute: Compute | None = None


KEPT = Treatment("kept")
UNCOVERED = Treatment("uncovered", "there is no contract for it")
BY_CONTRACT = "by operations of the contract"


def treatment(eqn: Any, options: Options) -> Treatment:
    """What is done about an equation that has no equations inside."""
    name, avals = eqn.primitive.name, [x.aval for x in (*eqn.invars, *eqn.outvars)]
    floats = {a.dtype.name for a in avals if is_inexact(a)}
    if name.startswith("bi_") or name in MOVED or not floats or (name == "convert_element_type" and _is_exact(*avals)):
        return KEPT
    if refused := floats - set(FLOATS):
        return KEPT if name in EXACT else Treatment("uncovered", f"there is no contract for {' and '.join(sorted(refused))}")
    return RULES[name](eqn, options) if name in RULES else UNCOVERED


def _is_exact(source: Any, result: Any) -> bool:
    """To integers there is one way to convert, and what has no contract is not computed with yet."""
    return not is_inexact(result) or (not is_inexact(source) and result.dtype.name not in FLOATS)


def _product(eqn: Any, options: Options) -> Treatment:
    contract = gemm_contract(operand_dtype(*(x.aval for x in eqn.invars)))
    return Treatment("contract", contract.contract_id, lambda x, y: dot_general(x, y, **eqn.params))


def _reduction(eqn: Any, options: Options) -> Treatment:
    name, axes = eqn.primitive.name, eqn.params["axes"]
    return Treatment("contract", contract_id(REDUCTIONS[name]), lambda x: reduction(name, x, axes))


def _reduce_prod(eqn: Any, options: Options) -> Treatment:
    by = f"products of adjacent elements, {contract_id(elementwise.OPERATIONS['mul'])}"
    return Treatment("contract", by, lambda x: product(x, eqn.params["axes"]))


def _psum(eqn: Any, options: Options) -> Treatment:
    axes = eqn.params["axes"]
    if eqn.params.get("axis_index_groups") is not None or not all(isinstance(axis, int | str) for axis in axes):
        return UNCOVERED
    invariant = eqn.primitive.name == "psum_invariant"
    by = f"devices in order, {contract_id(REDUCTIONS['reduce_sum'])}"
    return Treatment("contract", by, lambda x: sum_over_axes(x, axes, invariant))


def _scatter_add(eqn: Any, options: Options) -> Treatment:
    operand, indices, updates = (x.aval for x in eqn.invars)
    if not covered(operand, indices, updates, eqn.params):
        return UNCOVERED
    by = f"sums in order, {contract_id(elementwise.OPERATIONS['add'])}"
    return Treatment("contract", by, lambda *operands: scatter_add(*operands, **eqn.params))


def _function(eqn: Any, options: Options) -> Treatment:
    name = eqn.primitive.name
    by = contract_id(elementwise.FUNCTIONS[name])
    compute: Compute = partial(elementary, name, portable=options.portable)
    if not all(is_inexact(x.aval) for x in eqn.invars):  # pow of an integer exponent
        compute = _in_float32(compute, eqn.outvars[0].aval.dtype)
    return Treatment("contract", by if options.portable else f"{by} on a CPU", compute)


def _in_float32(compute: Compute, dtype: Any) -> Compute:
    return lambda *operands: narrow(compute(*(jnp.asarray(x, jnp.float32) for x in operands)), dtype)


def _operation(eqn: Any, options: Options) -> Treatment:
    """What IEEE 754 fixes, if XLA leaves it alone."""
    name = eqn.primitive.name
    if options.portable:
        return Treatment("contract", contract_id(elementwise.OPERATIONS[name]), partial(elementary, name))
    return Treatment("pinned", "", elementwise.pinned_div if name == "div" else _pinned_primitive(eqn))


def _composed(compute: Callable[[Arithmetic, Any, jax.Array], jax.Array]) -> Callable[[Any, Options], Treatment]:
    """The rule of a primitive that is several operations."""

    def rule(eqn: Any, options: Options) -> Treatment:
        arithmetic, by = (elementwise.EXACT, BY_CONTRACT) if options.portable else (elementwise.PINNED, "")
        return Treatment("pinned", by, partial(compute, arithmetic, eqn.params))

    return rule


def _conversion(eqn: Any, options: Options) -> Treatment:
    if options.portable:
        return Treatment("pinned", BY_CONTRACT, lambda x: elementwise.convert(x, eqn.params["new_dtype"]))
    return Treatment("pinned", "", _pinned_primitive(eqn))


def _stock(eqn: Any, options: Options) -> Treatment:
    return UNCOVERED if options.portable else Treatment("pinned", "", _pinned_primitive(eqn))


def _pinned_primitive(eqn: Any) -> Compute:
    return lambda *operands: pinned(eqn.primitive.bind(*operands, **eqn.params))


def _exact(eqn: Any, options: Options) -> Treatment:
    """XLA computes some exact primitives without subnormals on a CPU; a portable function has them with."""
    name = eqn.primitive.name
    if not options.portable or name not in BY_PATTERN:
        return KEPT
    return Treatment("pinned", "by patterns", partial(BY_PATTERN[name], eqn.params))


def _rounding(operation: Callable[..., jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda params, x: elementwise.integral(partial(operation, **params), x)


def _comparison(name: str) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    return lambda params, x, y: elementwise.compare(name, x, y)


BY_PATTERN: dict[str, Callable[..., jax.Array]] = {
    "abs": lambda params, x: elementwise.absolute(x),
    "ceil": _rounding(lax.ceil),
    "clamp": lambda params, low, x, high: elementary("min", elementary("max", low, x), high),
    "floor": _rounding(lax.floor),
    "max": lambda params, x, y: elementary("max", x, y),
    "min": lambda params, x, y: elementary("min", x, y),
    "neg": lambda params, x: elementwise.neg(x),
    "round": _rounding(lax.round),
    "sign": lambda params, x: elementwise.sign(x),
}
BY_PATTERN |= {name: _comparison(name) for name in ("eq", "ge", "gt", "le", "lt", "ne")}
"""Functions of an equation's parameters and operands."""

RULES: dict[str, Callable[[Any, Options], Treatment]] = {
    "convert_element_type": _conversion,
    "dot_general": _product,
    "integer_pow": _composed(lambda arithmetic, params, x: arithmetic.integer_pow(x, params["y"])),
    "one_minus_square": _composed(lambda arithmetic, params, x: arithmetic.one_minus_square(x)),
    "psum": _psum,
    "psum_invariant": _psum,
    "reduce_prod": _reduce_prod,
    "scatter-add": _scatter_add,
    "square": _composed(lambda arithmetic, params, x: arithmetic.square(x)),
}
RULES |= dict.fromkeys(REDUCTIONS, _reduction) | dict.fromkeys(elementwise.FUNCTIONS, _function)
RULES |= dict.fromkeys(["add", "add_any", "div", "mul", "sqrt", "sub"], _operation)
RULES |= dict.fromkeys(EXACT, _exact) | dict.fromkeys(COMPUTED, _stock)
"""By the name of the primitive, for floats that are computed with."""
