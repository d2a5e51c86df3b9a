"""The row programs of attention: softmax over the keys that a row admits, its gradient, and what is not finite.

A row of scores admits its first `length` columns; what stands behind them is not looked at and may be NaN.
"""

from functools import cache

from shared_specs.rows import Reduction, RowProgram
from shared_specs.sum_exp import INF, share


@cache
def attention_softmax(prefix: bool) -> RowProgram:
    """softmax of a row, 0 where nothing is admitted and where every admitted score is -inf."""

    def weight(f, e):
        y = f.select(f.equal(e.stats.max, -INF), 0.0, share(f, e.stats))
        return f.select(f.int_less(e.column, e.length), y, 0.0) if prefix else y

    def score(f, e):
        return f.select(f.int_less(e.column, e.length), e.x, -INF) if prefix else e.x

    return RowProgram(
        "attention_softmax(prefix)" if prefix else "attention_softmax",
        elements=("x",),
        ids=("length",) if prefix else (),
        reductions=(Reduction("stats", "sum_exp", score),),
        outputs={"y": weight},
    )


@cache
def attention_softmax_backward(prefix: bool) -> RowProgram:
    """dx = y * (g - sum(g * y)) over what is admitted, 0 elsewhere."""

    def term(f, e):
        return f.select(f.int_less(e.column, e.length), f.mul(e.g, e.y), 0.0) if prefix else f.mul(e.g, e.y)

    def gradient(f, e):
        dx = f.mul(e.y, f.sub(e.g, e.dot))
        return f.select(f.int_less(e.column, e.length), dx, 0.0) if prefix else dx

    return RowProgram(
        "attention_softmax_backward(prefix)" if prefix else "attention_softmax_backward",
        elements=("y", "g"),
        ids=("length",) if prefix else (),
        reductions=(Reduction("dot", "sum", term),),
        outputs={"dx": gradient},
    )


FINITE_OR_NAN = RowProgram(
    "finite_or_nan",
    elements=("x",),
    outputs={"y": lambda f, e: f.select(f.less(f.abs(e.x), INF), e.x, f.sub(e.x, e.x))},
)
