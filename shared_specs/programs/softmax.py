"""softmax, log_softmax, logsumexp, token_logprobs and cross_entropy, and their gradients.

All rest on the `sum_exp` reduction. A row whose maximum is infinite has no softmax: its outputs are NaN, as in torch. No
argument of exp is positive, but for rounding.
"""

from functools import cache

from shared_specs import scalar
from shared_specs.rows import Reduction, RowProgram
from shared_specs.sum_exp import INF, share, total

_STATISTICS = (Reduction("stats", "sum_exp", lambda f, e: e.x),)

LOGSUMEXP = RowProgram(
    "logsumexp",
    elements=("x",),
    reductions=_STATISTICS,
    row_outputs={
        "y": lambda f, e: f.select(
            f.equal(f.abs(e.stats.max), INF), e.stats.max, f.add(scalar.log(f, total(f, e.stats)), e.stats.max)
        )
    },
)

LOGSUMEXP_BACKWARD = RowProgram(
    "logsumexp_backward",
    elements=("x",),
    rows=("g", "y"),
    outputs={"dx": lambda f, e: f.mul(e.g, scalar.exp_nonpositive(f, f.sub(e.x, f.select(f.equal(e.y, -INF), 0.0, e.y))))},
)

SOFTMAX = RowProgram("softmax", elements=("x",), reductions=_STATISTICS, outputs={"y": lambda f, e: share(f, e.stats)})

SOFTMAX_BACKWARD = RowProgram(
    "softmax_backward",
    elements=("y", "g"),
    reductions=(Reduction("dot", "sum", lambda f, e: f.mul(e.g, e.y)),),
    outputs={"dx": lambda f, e: f.mul(e.y, f.sub(e.g, e.dot))},
)

LOG_SOFTMAX = RowProgram(
    "log_softmax", elements=("x",), reductions=_STATISTICS, outputs={"y": lambda f, e: _log_probability(f, e, e.x)}
)

LOG_SOFTMAX_BACKWARD = RowProgram(
    "log_softmax_backward",
    elements=("y", "g"),
    reductions=(Reduction("total", "sum", lambda f, e: e.g),),
    outputs={"dx": lambda f, e: f.sub(e.g, f.mul(scalar.exp_nonpositive(f, e.y), e.total))},
)


@cache
def token_logprobs(temperature: bool) -> RowProgram:
    """log_softmax of a row of logits at one id. `max` and `log_sum` are what the gradient needs."""
    name = "token_logprobs(temperature)" if temperature else "token_logprobs"
    return RowProgram(
        name,
        elements=("x",),
        ids=("id",),
        scalars=("temperature",) if temperature else (),
        gathered={"chosen": ("x", "id")},
        reductions=(Reduction("stats", "sum_exp", lambda f, e: _scaled(f, e, e.x, temperature)),),
        row_outputs={
            "y": lambda f, e: _log_probability(f, e, _scaled(f, e, e.chosen, temperature)),
            "max": lambda f, e: e.stats.max,
            "log_sum": lambda f, e: scalar.log(f, total(f, e.stats)),
        },
    )


@cache
def token_logprobs_backward(temperature: bool) -> RowProgram:
    """dx = g * (1 at the id - softmax(x / temperature)) / temperature."""

    def gradient(f, e):
        probability = scalar.exp_nonpositive(f, f.sub(f.sub(_scaled(f, e, e.x, temperature), e.max), e.log_sum))
        dx = f.mul(e.g, f.sub(f.select(f.int_equal(e.column, e.id), 1.0, 0.0), probability))
        return f.div(dx, e.temperature) if temperature else dx

    return RowProgram(
        "token_logprobs_backward(temperature)" if temperature else "token_logprobs_backward",
        elements=("x",),
        ids=("id",),
        rows=("g", "max", "log_sum"),
        scalars=("temperature",) if temperature else (),
        outputs={"dx": gradient},
    )


@cache
def cross_entropy(smoothing: bool) -> RowProgram:
    """-log_softmax(x) at the id; with smoothing, mixed with the mean of -log_softmax(x) over the row, as in torch.

    A row whose id is `ignore_index` has loss 0. `max` and `log_sum` are what the gradient needs.
    """

    def loss(f, e):
        nll = f.neg(_log_probability(f, e, e.chosen))
        if smoothing:
            share = f.div(e.smoothing, e.count)
            nll = f.sub(f.mul(nll, f.sub(1.0, e.smoothing)), f.mul(e.log_total, share))
        return f.select(f.int_equal(e.id, e.ignore_index), 0.0, nll)

    uniform = (Reduction("log_total", "sum", lambda f, e: _log_probability(f, e, e.x)),) if smoothing else ()
    return RowProgram(
        "cross_entropy(smoothing)" if smoothing else "cross_entropy",
        elements=("x",),
        ids=("id",),
        scalars=("smoothing",) if smoothing else (),
        integers=("ignore_index",),
        gathered={"chosen": ("x", "id")},
        reductions=(*_STATISTICS, *uniform),
        row_outputs={"y": loss, "max": lambda f, e: e.stats.max, "log_sum": lambda f, e: scalar.log(f, total(f, e.stats))},
    )


@cache
def cross_entropy_backward(smoothing: bool) -> RowProgram:
    """dx = g * (softmax(x) - target), 0 in a row whose id is `ignore_index`."""

    def gradient(f, e):
        probability = scalar.exp_nonpositive(f, f.sub(f.sub(e.x, e.max), e.log_sum))
        here = f.int_equal(e.column, e.id)
        if smoothing:
            share = f.div(e.smoothing, e.count)
            target = f.add(f.select(here, f.sub(1.0, e.smoothing), 0.0), share)
        else:
            target = f.select(here, 1.0, 0.0)
        return f.select(f.int_equal(e.id, e.ignore_index), 0.0, f.mul(e.g, f.sub(probability, target)))

    return RowProgram(
        "cross_entropy_backward(smoothing)" if smoothing else "cross_entropy_backward",
        elements=("x",),
        ids=("id",),
        rows=("g", "max", "log_sum"),
        scalars=("smoothing",) if smoothing else (),
        integers=("ignore_index",),
        outputs={"dx": gradient},
    )


def _log_probability(f, e, x):
    return f.sub(f.sub(x, e.stats.max), scalar.log(f, total(f, e.stats)))


def _scaled(f, e, x, temperature):
    return f.div(x, e.temperature) if temperature else x
