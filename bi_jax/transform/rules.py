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
from bi_jax.transform.reductions import product, reduction
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

ARITHMETIC = frozenset(
    ["add", "add_any", "convert_element_type", "div", "integer_pow", "mul", "one_minus_square", "sqrt", "square", "sub"]
)
"""What IEEE 754 fixes, if XLA leaves it alone."""

BY_PATTERN: dict[str, Compute] = {
    "abs": elementwise.absolute,
    "ceil": partial(elementwise.integral, lax.ceil),
    "clamp": lambda low, x, high: elementary("min", elementary("max", low, x), high),
    "floor": partial(elementwise.integral, lax.floor),
    "max": partial(elementary, "max"),
    "min": partial(elementary, "min"),
    "neg": elementwise.neg,
    "sign": elementwise.sign,
}
BY_PATTERN |= {name: partial(elementwise.compare, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")}
"""Exact primitives that XLA computes without subnormals on a CPU; a portable function has them with."""


def treatment(eqn: Any, options: Options) -> Treatment:
    """What is done about an equation that has no equations inside."""
    name, params = eqn.primitive.name, eqn.params
    avals = [x.aval for x in (*eqn.invars, *eqn.outvars)]
    floats = [a.dtype.name for a in avals if is_inexact(a)]
    if name.startswith("bi_") or name in MOVED or not floats or (name == "convert_element_type" and not is_inexact(avals[1])):
        return KEPT
    if refused := sorted(set(floats) - set(FLOATS)):
        if name in EXACT or (name == "convert_element_type" and not is_inexact(avals[0])):
            return KEPT
        return Treatment("uncovered", f"there is no contract for {' and '.join(refused)}")
    if name in EXACT:
        if options.portable and (name in BY_PATTERN or name == "round"):
            rounding = partial(elementwise.integral, partial(lax.round, rounding_method=params.get("rounding_method")))
            return Treatment("pinned", "by patterns", BY_PATTERN.get(name, rounding))
        return KEPT
    if name == "dot_general":
        contract = gemm_contract(operand_dtype(*avals[:2]))
        return Treatment("contract", contract.contract_id, lambda x, y: dot_general(x, y, **params))
    if name in REDUCTIONS:
        return Treatment("contract", contract_id(REDUCTIONS[name]), lambda x: reduction(name, x, params["axes"]))
    if name == "reduce_prod":
        return Treatment(
            "contract",
            f"products of adjacent elements, {contract_id(elementwise.OPERATIONS['mul'])}",
            lambda x: product(x, params["axes"]),
        )
    if name == "scatter-add" and covered(avals[0], avals[1], avals[2], params):
        return Treatment(
            "contract", f"sums in order, {contract_id(elementwise.OPERATIONS['add'])}", lambda *x: scatter_add(*x, **params)
        )
    if name in elementwise.FUNCTIONS:
        by = contract_id(elementwise.FUNCTIONS[name])
        compute: Compute = partial(elementary, name, portable=options.portable)
        if not all(map(is_inexact, avals)):  # pow of an integer exponent
            compute = _in_float32(compute, avals[0].dtype)
        return Treatment("contract", by if options.portable else f"{by} on a CPU", compute)
    if name in ARITHMETIC:
        return _portable_arithmetic(eqn) if options.portable else _pinned_arithmetic(eqn)
    if name in COMPUTED and not options.portable:
        return Treatment("pinned", "", _pinned_primitive(eqn))
    return Treatment("uncovered", "there is no contract for it")


def _pinned_arithmetic(eqn: Any) -> Treatment:
    composed = _composed(eqn, elementwise.PINNED) | {"div": elementwise.pinned_div}
    return Treatment("pinned", "", composed.get(eqn.primitive.name, _pinned_primitive(eqn)))


def _portable_arithmetic(eqn: Any) -> Treatment:
    name = eqn.primitive.name
    if name in elementwise.OPERATIONS:
        return Treatment("contract", contract_id(elementwise.OPERATIONS[name]), partial(elementary, name))
    return Treatment("pinned", "by operations of the contract", _composed(eqn, elementwise.EXACT)[name])


def _in_float32(compute: Compute, dtype: Any) -> Compute:
    return lambda *operands: narrow(compute(*(jnp.asarray(x, jnp.float32) for x in operands)), dtype)


def _composed(eqn: Any, arithmetic: Arithmetic) -> dict[str, Compute]:
    """Primitives that are several operations."""
    composed: dict[str, Compute] = {
        "integer_pow": lambda x: arithmetic.integer_pow(x, eqn.params["y"]),
        "one_minus_square": arithmetic.one_minus_square,
        "square": arithmetic.square,
    }
    if arithmetic is elementwise.EXACT:
        composed["convert_element_type"] = lambda x: elementwise.convert(x, eqn.params["new_dtype"])
    return composed


def _pinned_primitive(eqn: Any) -> Compute:
    return lambda *operands: pinned(eqn.primitive.bind(*operands, **eqn.params))
