"""Activations and elementary functions, the gated MLP and the rotary embedding, and their gradients.

The gradient of a function of one input is a program of the input `x` and the cotangent `g`.
"""

from shared_specs import scalar
from shared_specs.rows import Formula, RowProgram

NORMAL_DENSITY = float.fromhex("0x1.988454p-2")
"""1 / sqrt(2 pi)."""


def _unary(name: str, formula: Formula) -> RowProgram:
    return RowProgram(name, elements=("x",), outputs={"y": formula})


def _gradient(name: str, derivative: Formula) -> RowProgram:
    return RowProgram(f"{name}_backward", elements=("x", "g"), outputs={"dx": lambda f, e: f.mul(e.g, derivative(f, e))})


def _sigmoid_slope(f, e):
    y = scalar.sigmoid(f, e.x)
    return f.mul(y, f.sub(1.0, y))


def _tanh_slope(f, e):
    y = scalar.tanh(f, e.x)
    return f.fma(f.neg(y), y, 1.0)


def _rsqrt_slope(f, e):
    y = scalar.rsqrt(f, e.x)
    return f.mul(f.mul(f.mul(y, y), y), -0.5)


def _silu_slope(f, x):
    y = scalar.sigmoid(f, x)
    return f.mul(y, f.fma(x, f.sub(1.0, y), 1.0))


def _gelu_slope(f, e):
    """Phi(x) + x phi(x)."""
    cumulative = f.mul(0.5, f.add(1.0, scalar.erf(f, f.mul(e.x, scalar.SQRT_HALF))))
    density = f.mul(scalar.exp(f, f.mul(f.mul(e.x, e.x), -0.5)), NORMAL_DENSITY)
    return f.fma(e.x, density, cumulative)


def _gelu_tanh_slope(f, e):
    """With t = tanh(u(x)): 0.5 (1 + t) + 0.5 x (1 - t^2) u'(x)."""
    square = f.mul(e.x, e.x)
    t = scalar.tanh(f, scalar.gelu_tanh_argument(f, e.x))
    slope = f.mul(scalar.GELU_SCALE, f.fma(f.mul(3.0, square), scalar.GELU_CUBIC, 1.0))
    return f.mul(0.5, f.fma(f.mul(e.x, f.fma(f.neg(t), t, 1.0)), slope, f.add(1.0, t)))


DIV = RowProgram("div", elements=("x1", "x2"), outputs={"y": lambda f, e: f.div(e.x1, e.x2)})
SQRT = _unary("sqrt", lambda f, e: f.sqrt(e.x))

POW = RowProgram("pow", elements=("x1", "x2"), outputs={"y": lambda f, e: scalar.pow(f, e.x1, e.x2)})
EXP2 = _unary("exp2", lambda f, e: scalar.exp2(f, e.x))
EXPM1 = _unary("expm1", lambda f, e: scalar.expm1(f, e.x))
LOG2 = _unary("log2", lambda f, e: scalar.log2(f, e.x))
LOG1P = _unary("log1p", lambda f, e: scalar.log1p(f, e.x))
ERFC = _unary("erfc", lambda f, e: scalar.erfc(f, e.x))

EXP = _unary("exp", lambda f, e: scalar.exp(f, e.x))
LOG = _unary("log", lambda f, e: scalar.log(f, e.x))
SIN = _unary("sin", lambda f, e: scalar.sin(f, e.x))
COS = _unary("cos", lambda f, e: scalar.cos(f, e.x))
ERF = _unary("erf", lambda f, e: scalar.erf(f, e.x))
TANH = _unary("tanh", lambda f, e: scalar.tanh(f, e.x))
SIGMOID = _unary("sigmoid", lambda f, e: scalar.sigmoid(f, e.x))
RSQRT = _unary("rsqrt", lambda f, e: scalar.rsqrt(f, e.x))
SILU = _unary("silu", lambda f, e: scalar.silu(f, e.x))
GELU = _unary("gelu", lambda f, e: scalar.gelu(f, e.x))
GELU_TANH = _unary("gelu_tanh", lambda f, e: scalar.gelu_tanh(f, e.x))

EXP_BACKWARD = _gradient("exp", lambda f, e: scalar.exp(f, e.x))
LOG_BACKWARD = RowProgram("log_backward", elements=("x", "g"), outputs={"dx": lambda f, e: f.div(e.g, e.x)})
SIN_BACKWARD = _gradient("sin", lambda f, e: scalar.cos(f, e.x))
COS_BACKWARD = _gradient("cos", lambda f, e: f.neg(scalar.sin(f, e.x)))
ERF_BACKWARD = _gradient(
    "erf", lambda f, e: f.mul(scalar.exp(f, f.neg(f.mul(e.x, e.x))), float.fromhex("0x1.20dd76p+0"))
)  # 2 / sqrt(pi)
TANH_BACKWARD = _gradient("tanh", _tanh_slope)
SIGMOID_BACKWARD = _gradient("sigmoid", _sigmoid_slope)
RSQRT_BACKWARD = _gradient("rsqrt", _rsqrt_slope)
SILU_BACKWARD = _gradient("silu", lambda f, e: _silu_slope(f, e.x))
GELU_BACKWARD = _gradient("gelu", _gelu_slope)
GELU_TANH_BACKWARD = _gradient("gelu_tanh", _gelu_tanh_slope)

# silu(x) * up: the gated MLP.
SILU_MUL = RowProgram("silu_mul", elements=("x", "up"), outputs={"y": lambda f, e: f.mul(scalar.silu(f, e.x), e.up)})
SILU_MUL_BACKWARD = RowProgram(
    "silu_mul_backward",
    elements=("x", "up", "g"),
    outputs={
        "dx": lambda f, e: f.mul(f.mul(e.g, e.up), _silu_slope(f, e.x)),
        "dup": lambda f, e: f.mul(e.g, scalar.silu(f, e.x)),
    },
)

# A pair of elements turned by the angle whose cosine and sine are given; the gradient turns back.
ROTARY = RowProgram(
    "rotary",
    elements=("x1", "x2", "cos", "sin"),
    outputs={
        "y1": lambda f, e: f.sub(f.mul(e.x1, e.cos), f.mul(e.x2, e.sin)),
        "y2": lambda f, e: f.add(f.mul(e.x2, e.cos), f.mul(e.x1, e.sin)),
    },
)
ROTARY_BACKWARD = RowProgram(
    "rotary_backward",
    elements=("g1", "g2", "cos", "sin"),
    outputs={
        "dx1": lambda f, e: f.add(f.mul(e.g1, e.cos), f.mul(e.g2, e.sin)),
        "dx2": lambda f, e: f.sub(f.mul(e.g2, e.cos), f.mul(e.g1, e.sin)),
    },
)

# The angle of a pair is its frequency times the position of the token.
ROTARY_TABLES = RowProgram(
    "rotary_tables",
    elements=("frequency",),
    rows=("position",),
    outputs={
        "cos": lambda f, e: scalar.cos(f, f.mul(e.position, e.frequency)),
        "sin": lambda f, e: scalar.sin(f, f.mul(e.position, e.frequency)),
    },
)
