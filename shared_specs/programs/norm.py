"""layer_norm, rms_norm and fused_add_rms_norm, and their gradients. Variants differ in the parameters that exist.

Weight and bias gradients are column programs: sums over the rows, in the row contract's order.
"""

from functools import cache

from shared_specs import scalar
from shared_specs.rows import ColumnProgram, Reduction, RowProgram


def _named(name: str, **parts: bool) -> str:
    present = ", ".join(part for part, given in parts.items() if given)
    return f"{name}({present})" if present else name


@cache
def layer_norm(weight: bool, bias: bool) -> RowProgram:
    """(x - mean) / sqrt(var + eps) * weight + bias; `mean` and `rstd` are what the gradients need."""

    def rstd(f, e):
        return scalar.rsqrt(f, f.add(f.div(e.squares, e.count), e.eps))

    def mean(f, e):
        return f.div(e.total, e.count)

    def output(f, e):
        return _affine(f, e, f.mul(f.sub(e.x, mean(f, e)), rstd(f, e)), weight, bias)

    def square(f, e):
        difference = f.sub(e.x, mean(f, e))
        return f.mul(difference, difference)

    return RowProgram(
        _named("layer_norm", weight=weight, bias=bias),
        elements=("x",),
        columns=("weight",) * weight + ("bias",) * bias,
        scalars=("eps",),
        reductions=(Reduction("total", "sum", lambda f, e: e.x), Reduction("squares", "sum", square)),
        outputs={"y": output},
        row_outputs={"mean": mean, "rstd": rstd},
    )


@cache
def layer_norm_backward(weight: bool) -> RowProgram:
    """dx = (g * weight - (mean of g * weight + xhat * mean of g * weight * xhat)) * rstd."""

    def scaled(f, e):
        return f.mul(e.g, e.weight) if weight else e.g

    def gradient(f, e):
        along = f.fma(_centred(f, e), f.div(e.dot, e.count), f.div(e.total, e.count))
        return f.mul(f.sub(scaled(f, e), along), e.rstd)

    return RowProgram(
        _named("layer_norm_backward", weight=weight),
        elements=("x", "g"),
        columns=("weight",) * weight,
        rows=("mean", "rstd"),
        reductions=(
            Reduction("total", "sum", scaled),
            Reduction("dot", "sum", lambda f, e: f.mul(scaled(f, e), _centred(f, e))),
        ),
        outputs={"dx": gradient},
    )


@cache
def layer_norm_parameters(weight: bool, bias: bool) -> ColumnProgram:
    """dweight = sum of g * xhat, dbias = sum of g."""
    sums = {"dweight": lambda f, e: f.mul(e.g, _centred(f, e))} if weight else {}
    if bias:
        sums["dbias"] = lambda f, e: e.g
    return ColumnProgram(
        _named("layer_norm_parameters", weight=weight, bias=bias),
        elements=("x", "g") if weight else ("g",),
        rows=("mean", "rstd") if weight else (),
        sums=sums,
    )


@cache
def rms_norm(weight: bool) -> RowProgram:
    """x / sqrt(mean of x * x + eps) * weight; `rstd` is what the gradients need."""
    return RowProgram(
        _named("rms_norm", weight=weight),
        elements=("x",),
        columns=("weight",) * weight,
        scalars=("eps",),
        reductions=(Reduction("squares", "sum", lambda f, e: f.mul(e.x, e.x)),),
        outputs={"y": lambda f, e: _affine(f, e, f.mul(e.x, _rms_rstd(f, e)), weight, False)},
        row_outputs={"rstd": _rms_rstd},
    )


@cache
def fused_add_rms_norm(weight: bool, dtype: str) -> RowProgram:
    """h = x + residual, rounded to `dtype`; y = rms_norm(h): the bits of the two operations one after the other."""

    def hidden(f, e):
        return f.narrow(f.add(e.x, e.residual), dtype)

    return RowProgram(
        f"{_named('fused_add_rms_norm', weight=weight)}[{dtype}]",
        elements=("x", "residual"),
        columns=("weight",) * weight,
        scalars=("eps",),
        reductions=(Reduction("squares", "sum", lambda f, e: f.mul(hidden(f, e), hidden(f, e))),),
        outputs={"y": lambda f, e: _affine(f, e, f.mul(hidden(f, e), _rms_rstd(f, e)), weight, False), "h": hidden},
        row_outputs={"rstd": _rms_rstd},
    )


@cache
def rms_norm_backward(weight: bool, residual: bool = False) -> RowProgram:
    """dx = (g * weight - xhat * mean of g * weight * xhat) * rstd, plus `dh`, the cotangent of the residual output."""

    def scaled(f, e):
        return f.mul(e.g, e.weight) if weight else e.g

    def gradient(f, e):
        along = f.mul(f.mul(e.x, e.rstd), f.div(e.dot, e.count))
        dx = f.mul(f.sub(scaled(f, e), along), e.rstd)
        return f.add(dx, e.dh) if residual else dx

    return RowProgram(
        _named("rms_norm_backward", weight=weight, residual=residual),
        elements=("x", "g", "dh") if residual else ("x", "g"),
        columns=("weight",) * weight,
        rows=("rstd",),
        reductions=(Reduction("dot", "sum", lambda f, e: f.mul(scaled(f, e), f.mul(e.x, e.rstd))),),
        outputs={"dx": gradient},
    )


RMS_NORM_PARAMETERS = ColumnProgram(
    "rms_norm_parameters",
    elements=("x", "g"),
    rows=("rstd",),
    sums={"dweight": lambda f, e: f.mul(e.g, f.mul(e.x, e.rstd))},
)

COLUMN_SUM = ColumnProgram("column_sum", elements=("x",), sums={"y": lambda f, e: e.x})


def _rms_rstd(f, e):
    return scalar.rsqrt(f, f.add(f.div(e.squares, e.count), e.eps))


def _centred(f, e):
    return f.mul(f.sub(e.x, e.mean), e.rstd)


def _affine(f, e, x, weight, bias):
    if weight and bias:
        return f.fma(x, e.weight, e.bias)
    if weight:
        return f.mul(x, e.weight)
    return f.add(x, e.bias) if bias else x
