"""Sums, products and extremes of two elements: one IEEE operation each, rounded once to the dtype of the result.

Compilers have these as they are, so they are the contract of expressions rather than kernels of their own.
"""

from shared_specs.rows import Formula, RowProgram


def _binary(name: str, formula: Formula) -> RowProgram:
    return RowProgram(name, elements=("x1", "x2"), outputs={"y": formula})


ADD = _binary("add", lambda f, e: f.add(e.x1, e.x2))
SUB = _binary("sub", lambda f, e: f.sub(e.x1, e.x2))
MUL = _binary("mul", lambda f, e: f.mul(e.x1, e.x2))
MAXIMUM = _binary("maximum", lambda f, e: f.max(e.x1, e.x2))
MINIMUM = _binary("minimum", lambda f, e: f.min(e.x1, e.x2))
