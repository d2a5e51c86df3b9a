"""sum, mean, var, std, the Euclidean norm, squared errors, amax and amin of rows, and their gradients."""

from functools import cache

from shared_specs.rows import Reduction, RowProgram

SUM = RowProgram(
    "sum",
    elements=("x",),
    reductions=(Reduction("total", "sum", lambda f, e: e.x),),
    row_outputs={"y": lambda f, e: e.total},
)

MEAN = RowProgram(
    "mean",
    elements=("x",),
    reductions=SUM.reductions,
    row_outputs={"y": lambda f, e: f.div(e.total, e.count)},
)

# Two passes: the squares of the differences from the mean, divided by max(0, N - correction).
VAR = RowProgram(
    "var",
    elements=("x",),
    scalars=("correction",),
    reductions=(
        Reduction("total", "sum", lambda f, e: e.x),
        Reduction("squares", "sum", lambda f, e: _squared(f, f.sub(e.x, f.div(e.total, e.count)))),
    ),
    row_outputs={
        "y": lambda f, e: f.div(e.squares, _freedom(f, e)),
        "mean": lambda f, e: f.div(e.total, e.count),
    },
)

STD = RowProgram(
    "std",
    elements=("x",),
    scalars=("correction",),
    reductions=VAR.reductions,
    row_outputs={
        "y": lambda f, e: f.sqrt(f.div(e.squares, _freedom(f, e))),
        "mean": lambda f, e: f.div(e.total, e.count),
    },
)

NORM = RowProgram(
    "norm",
    elements=("x",),
    reductions=(Reduction("squares", "sum", lambda f, e: _squared(f, e.x)),),
    row_outputs={"y": lambda f, e: f.sqrt(e.squares)},
)

AMAX = RowProgram(
    "amax",
    elements=("x",),
    reductions=(Reduction("extreme", "max", lambda f, e: e.x),),
    row_outputs={"y": lambda f, e: e.extreme},
)

AMIN = RowProgram(
    "amin",
    elements=("x",),
    reductions=(Reduction("extreme", "min", lambda f, e: e.x),),
    row_outputs={"y": lambda f, e: e.extreme},
)

# The gradient of a sum is the cotangent itself, spread over the row; that of a mean is divided first.
SPREAD = RowProgram("spread", elements=("like",), rows=("g",), outputs={"dx": lambda f, e: e.g})

MEAN_BACKWARD = RowProgram("mean_backward", elements=("like",), rows=("g",), outputs={"dx": lambda f, e: f.div(e.g, e.count)})

# A mean over some of the row, the others being 0: the sum divided by a number that is given.
MEAN_OF = RowProgram(
    "mean_of",
    elements=("x",),
    rows=("divisor",),
    reductions=SUM.reductions,
    row_outputs={"y": lambda f, e: f.div(e.total, e.divisor)},
)

MEAN_OF_BACKWARD = RowProgram(
    "mean_of_backward", elements=("like",), rows=("g", "divisor"), outputs={"dx": lambda f, e: f.div(e.g, e.divisor)}
)

VAR_BACKWARD = RowProgram(
    "var_backward",
    elements=("x",),
    rows=("g", "mean"),
    scalars=("correction",),
    outputs={"dx": lambda f, e: f.mul(f.mul(e.g, f.div(2.0, _freedom(f, e))), f.sub(e.x, e.mean))},
)

# Where the deviation or the norm is 0, so is the gradient, as in torch.
STD_BACKWARD = RowProgram(
    "std_backward",
    elements=("x",),
    rows=("g", "y", "mean"),
    scalars=("correction",),
    outputs={"dx": lambda f, e: f.mul(_over_root(f, e, f.mul(e.y, _freedom(f, e))), f.sub(e.x, e.mean))},
)

NORM_BACKWARD = RowProgram(
    "norm_backward",
    elements=("x",),
    rows=("g", "y"),
    outputs={"dx": lambda f, e: f.mul(_over_root(f, e, e.y), e.x)},
)

# The gradient of one element of the row, at the column `id`.
CHOICE_BACKWARD = RowProgram(
    "choice_backward",
    elements=("like",),
    rows=("g",),
    ids=("id",),
    outputs={"dx": lambda f, e: f.select(f.int_equal(e.column, e.id), e.g, 0.0)},
)

# Where several elements are the extreme one, each has an equal share, as in torch.amax.
EXTREME_BACKWARD = RowProgram(
    "extreme_backward",
    elements=("x",),
    rows=("g", "y"),
    reductions=(Reduction("ties", "sum", lambda f, e: f.select(_extreme(f, e), 1.0, 0.0)),),
    outputs={"dx": lambda f, e: f.select(_extreme(f, e), f.div(e.g, e.ties), 0.0)},
)


@cache
def squared_error(mean: bool) -> RowProgram:
    """The sum, or the mean, of the squared differences of two rows."""

    def total(f, e):
        return f.div(e.squares, e.count) if mean else e.squares

    return RowProgram(
        "squared_error(mean)" if mean else "squared_error",
        elements=("x", "target"),
        reductions=(Reduction("squares", "sum", lambda f, e: _squared(f, f.sub(e.x, e.target))),),
        row_outputs={"y": total},
    )


@cache
def squared_error_backward(mean: bool) -> RowProgram:
    """dx = 2 g (x - target), divided by the number of elements for a mean; dtarget = -dx."""

    def gradient(f, e):
        twice = f.mul(2.0, e.g)
        return f.mul(f.div(twice, e.count) if mean else twice, f.sub(e.x, e.target))

    return RowProgram(
        "squared_error_backward(mean)" if mean else "squared_error_backward",
        elements=("x", "target"),
        rows=("g",),
        outputs={"dx": gradient, "dtarget": lambda f, e: f.neg(gradient(f, e))},
    )


def _squared(f, x):
    return f.mul(x, x)


def _freedom(f, e):
    return f.max(f.sub(e.count, e.correction), 0.0)


def _over_root(f, e, root):
    """The cotangent divided by something that is 0 where the output is."""
    return f.select(f.equal(e.y, 0.0), 0.0, f.div(e.g, root))


def _extreme(f, e):
    return f.either(f.equal(e.x, e.y), f.both(f.is_nan(e.x), f.is_nan(e.y)))
