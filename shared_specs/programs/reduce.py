"""sum, mean, var, logsumexp, amax and amin of rows, and their gradients."""

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

# Where several elements are the extreme one, each has an equal share, as in torch.amax.
EXTREME_BACKWARD = RowProgram(
    "extreme_backward",
    elements=("x",),
    rows=("g", "y"),
    reductions=(Reduction("ties", "sum", lambda f, e: f.select(_extreme(f, e), 1.0, 0.0)),),
    outputs={"dx": lambda f, e: f.select(_extreme(f, e), f.div(e.g, e.ties), 0.0)},
)


def _squared(f, x):
    return f.mul(x, x)


def _freedom(f, e):
    return f.max(f.sub(e.count, e.correction), 0.0)


def _extreme(f, e):
    return f.either(f.equal(e.x, e.y), f.both(f.is_nan(e.x), f.is_nan(e.y)))
