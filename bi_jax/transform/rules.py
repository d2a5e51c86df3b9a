"""What becomes of each primitive: `treatment` decides it from an equation, before anything is computed."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from bi_jax.transform import elementwise
from bi_jax.transform.coverage import EXACT, FLOATS, MOVED, STOCK, Options, is_inexact
from bi_jax.transform.elementwise import by_program, elementary, pinned
from bi_jax.transform.products import dot_general, operand_dtype
from bi_jax.transform.reductions import PROGRAMS as REDUCTIONS
from bi_jax.transform.reductions import reduction
from shared_specs import gemm_contract
from shared_specs.trace import contract_id

Compute = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What is done about an equation.

    Attributes:
        kind: "contract" computes as the contract says, "pinned" rounds once where XLA might not, "kept" changes nothing.
        by: identity of the contract, or why there is none.
        compute: the result from the operands; None where the primitive itself computes.
    """

    kind: Literal["contract", "pinned", "kept", "uncovered"]
    by: str = ""
    compute: Compute | None = None


KEPT = Treatment("kept")

PINNED = frozenset(
    ["add", "add_any", "convert_element_type", "div", "integer_pow", "mul", "one_minus_square", "sqrt", "square", "sub"]
)
"""Arithmetic: IEEE 754 fixes its results, if XLA leaves it alone."""


def treatment(eqn: Any, options: Options) -> Treatment:
    """What is done about an equation that has no equations inside."""
    name = eqn.primitive.name
    avals = [x.aval for x in (*eqn.invars, *eqn.outvars)]
    if name.startswith("bi_") or name in MOVED or not any(map(is_inexact, avals)):
        return KEPT
    if name in EXACT:
        return KEPT
    refused = sorted({str(a.dtype) for a in avals if is_inexact(a) and a.dtype.name not in FLOATS})
    if name == "convert_element_type" and not (refused and is_inexact(eqn.invars[0].aval)):
        return _arithmetic(eqn)
    if refused:
        return Treatment("uncovered", f"there is no contract for {' and '.join(refused)}")
    if name == "dot_general":
        contract = gemm_contract(operand_dtype(*(x.aval for x in eqn.invars)))
        return Treatment("contract", contract.contract_id, lambda x, y: dot_general(x, y, **eqn.params))
    if name in REDUCTIONS:
        identity = contract_id(REDUCTIONS[name])
        return Treatment("contract", identity, lambda x: reduction(name, x, eqn.params["axes"]))
    if name in elementwise.PROGRAMS:
        program = elementwise.PROGRAMS[name]
        by = contract_id(program)
        if options.portable:
            return Treatment("contract", by, lambda x: by_program(program, x))
        return Treatment("contract", f"{by} on a CPU", lambda x: elementary(name, x))
    if name in PINNED:
        return _arithmetic(eqn)
    if name in STOCK and not options.portable:
        return Treatment("pinned", "", lambda *operands: pinned(eqn.primitive.bind(*operands, **eqn.params)))
    return Treatment("uncovered", "there is no contract for it")


def _arithmetic(eqn: Any) -> Treatment:
    name, params = eqn.primitive.name, eqn.params
    own: dict[str, Compute] = {
        "div": elementwise.div,
        "integer_pow": lambda x: elementwise.integer_pow(x, params["y"]),
        "one_minus_square": elementwise.one_minus_square,
    }

    def stock(*operands: jax.Array) -> jax.Array:
        return pinned(eqn.primitive.bind(*operands, **params))

    return Treatment("pinned", "", own.get(name, stock))
