"""One step of SGD and of AdamW, and the clipping of gradients: elementwise, with exact division and square root.

The order of operations is torch.optim's (single-tensor, no amsgrad). Scalars are float32, each rounded once.
"""

from functools import cache

from shared_specs import scalar
from shared_specs.rows import Formula, Reduction, RowProgram


@cache
def sgd(momentum: bool, nesterov: bool, first: bool) -> RowProgram:
    """p - lr * d, where d is g + weight_decay * p, or the momentum buffer of it.

    The first step sets the buffer to the gradient; later ones to momentum * buffer + (1 - dampening) * gradient.
    """

    def gradient(f, e):
        return f.add(e.g, f.mul(e.weight_decay, e.p))

    def buffer(f, e):
        if first:
            return gradient(f, e)
        return f.add(f.mul(e.momentum, e.buffer), f.mul(f.sub(1.0, e.dampening), gradient(f, e)))

    def direction(f, e):
        if not momentum:
            return gradient(f, e)
        return f.add(gradient(f, e), f.mul(e.momentum, buffer(f, e))) if nesterov else buffer(f, e)

    outputs: dict[str, Formula] = {"p": lambda f, e: f.sub(e.p, f.mul(e.lr, direction(f, e)))}
    if momentum:
        outputs["buffer"] = buffer
    variant = ", ".join(name for name, on in (("momentum", momentum), ("nesterov", nesterov), ("first", first)) if on)
    return RowProgram(
        f"sgd({variant})" if variant else "sgd",
        elements=("p", "g") + ("buffer",) * (momentum and not first),
        scalars=("lr", "weight_decay") + ("momentum", "dampening") * momentum,
        outputs=outputs,
    )


def _decayed(f, e):
    return f.mul(e.p, f.sub(1.0, f.mul(e.lr, e.weight_decay)))


def _first_moment(f, e):
    return f.add(f.mul(e.beta1, e.m), f.mul(f.sub(1.0, e.beta1), e.g))


def _second_moment(f, e):
    return f.add(f.mul(e.beta2, e.v), f.mul(f.sub(1.0, e.beta2), f.mul(e.g, e.g)))


def _adamw_parameter(f, e):
    """Bias corrections 1 - beta ** step by repeated squaring, so that no engine's pow takes part."""
    correction1 = f.sub(1.0, scalar.power(f, e.beta1, e.step))
    correction2 = f.sub(1.0, scalar.power(f, e.beta2, e.step))
    denominator = f.add(f.div(f.sqrt(_second_moment(f, e)), f.sqrt(correction2)), e.eps)
    update = f.mul(f.div(e.lr, correction1), f.div(_first_moment(f, e), denominator))
    return f.sub(_decayed(f, e), update)


ADAMW = RowProgram(
    "adamw",
    elements=("p", "g", "m", "v"),
    scalars=("lr", "beta1", "beta2", "eps", "weight_decay"),
    integers=("step",),
    outputs={"p": _adamw_parameter, "m": _first_moment, "v": _second_moment},
)

SUM_OF_SQUARES = RowProgram(
    "sum_of_squares",
    elements=("x",),
    reductions=(Reduction("total", "sum", lambda f, e: f.mul(e.x, e.x)),),
    row_outputs={"y": lambda f, e: e.total},
)

# One row of the sums of squares of all gradients, in order: their norm, and the factor min(1, max_norm / (norm + 1e-6)).
CLIP_FACTOR = RowProgram(
    "clip_factor",
    elements=("x",),
    scalars=("max_norm",),
    reductions=(Reduction("total", "sum", lambda f, e: e.x),),
    row_outputs={
        "norm": lambda f, e: f.sqrt(e.total),
        "factor": lambda f, e: f.min(f.div(e.max_norm, f.add(f.sqrt(e.total), scalar.float32(1e-6))), 1.0),
    },
)

# A gradient as one row, with the factor as that row's number.
SCALE = RowProgram("scale", elements=("x",), rows=("factor",), outputs={"y": lambda f, e: f.mul(e.x, e.factor)})
