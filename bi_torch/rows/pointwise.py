"""Activations and elementary functions, the gated MLP and the rotary embedding: each element by itself."""

import torch
from torch import Tensor

from bi_torch.rows.arguments import check_shape, check_tensor
from bi_torch.rows.library import Op, RowOp
from shared_specs.programs import pointwise as programs
from shared_specs.rotary import inverse_frequencies
from shared_specs.rows import RowProgram

_GRADIENTS: dict[str, RowOp] = {}


def _unary(program: RowProgram, backward: RowProgram) -> RowOp:
    """The op of a function of one input, whose gradient is a program of the input and the cotangent."""
    backward_op = RowOp(f"{backward.name}(Tensor x, Tensor g, ScalarType dtype) -> Tensor dx", backward)
    _GRADIENTS[program.name] = backward_op
    return RowOp(
        f"{program.name}(Tensor x, ScalarType dtype) -> Tensor y",
        program,
        keep=("x",),
        gradient=lambda s, g: {"x": backward_op(s.x, g.y, s.x.dtype)},
    )


_exp = _unary(programs.EXP, programs.EXP_BACKWARD)
_log = _unary(programs.LOG, programs.LOG_BACKWARD)
_sin = _unary(programs.SIN, programs.SIN_BACKWARD)
_cos = _unary(programs.COS, programs.COS_BACKWARD)
_erf = _unary(programs.ERF, programs.ERF_BACKWARD)
_tanh = _unary(programs.TANH, programs.TANH_BACKWARD)
_sigmoid = _unary(programs.SIGMOID, programs.SIGMOID_BACKWARD)
_rsqrt = _unary(programs.RSQRT, programs.RSQRT_BACKWARD)
_silu = _unary(programs.SILU, programs.SILU_BACKWARD)
_gelu = _unary(programs.GELU, programs.GELU_BACKWARD)
_gelu_tanh = _unary(programs.GELU_TANH, programs.GELU_TANH_BACKWARD)

_silu_mul_backward = RowOp(
    "silu_mul_backward(Tensor x, Tensor up, Tensor g, ScalarType dtype) -> (Tensor dx, Tensor dup)", programs.SILU_MUL_BACKWARD
)
_silu_mul = RowOp(
    "silu_mul(Tensor x, Tensor up, ScalarType dtype) -> Tensor y",
    programs.SILU_MUL,
    keep=("x", "up"),
    gradient=lambda s, g: dict(zip(("x", "up"), _silu_mul_backward(s.x, s.up, g.y, s.x.dtype), strict=True)),
)

_rotary = RowOp(
    "rotary(Tensor x1, Tensor x2, Tensor cos, Tensor sin, ScalarType dtype) -> (Tensor y1, Tensor y2)", programs.ROTARY
)
_rotary_backward = RowOp(
    "rotary_backward(Tensor g1, Tensor g2, Tensor cos, Tensor sin, ScalarType dtype) -> (Tensor dx1, Tensor dx2)",
    programs.ROTARY_BACKWARD,
)


def _turn_by(op: Op, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`op` on the pairs of elements of x, put back in their places."""
    half = x.shape[-1] // 2
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    rows = (_one_row(part.expand(x1.shape)) for part in (x1, x2, cos, sin))
    y1, y2 = (y.reshape(x1.shape) for y in op(*rows, x.dtype))
    return torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _turn_by(_rotary, x, cos, sin, interleaved)


def _turn_back(g: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _turn_by(_rotary_backward, g, cos, sin, interleaved)


def _like_first(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


# One op: autograd would add up the gradients of the two halves, which changes -0 and NaN.
_rotary_embedding_backward = Op(
    "rotary_embedding_backward(Tensor g, Tensor cos, Tensor sin, bool interleaved) -> Tensor dx",
    cpu=_turn_back,
    cuda=_turn_back,
    fake=_like_first,
)
_rotary_embedding = Op(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor y",
    cpu=_turn,
    cuda=_turn,
    fake=_like_first,
    keep=("cos", "sin"),
    gradient=lambda s, g: {"x": _rotary_embedding_backward(g.y, s.cos, s.sin, s.interleaved)},
)
_rotary_tables = RowOp("rotary_tables(Tensor frequency, Tensor position) -> (Tensor cos, Tensor sin)", programs.ROTARY_TABLES)


def exp(input: Tensor) -> Tensor:
    """e to the power of each element."""
    return _elementwise("exp", _exp, input)


def log(input: Tensor) -> Tensor:
    """The natural logarithm of each element."""
    return _elementwise("log", _log, input)


def sin(input: Tensor) -> Tensor:
    """The sine of each element, in radians."""
    return _elementwise("sin", _sin, input)


def cos(input: Tensor) -> Tensor:
    """The cosine of each element, in radians."""
    return _elementwise("cos", _cos, input)


def erf(input: Tensor) -> Tensor:
    """The error function of each element."""
    return _elementwise("erf", _erf, input)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent of each element."""
    return _elementwise("tanh", _tanh, input)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input))."""
    return _elementwise("sigmoid", _sigmoid, input)


def rsqrt(input: Tensor) -> Tensor:
    """1 / sqrt(input)."""
    return _elementwise("rsqrt", _rsqrt, input)


def silu(input: Tensor) -> Tensor:
    """input * sigmoid(input)."""
    return _elementwise("silu", _silu, input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input), by erf, or with approximate="tanh" by the usual approximation with tanh."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"bi_torch.gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _elementwise("gelu", _gelu if approximate == "none" else _gelu_tanh, input)


def silu_backward(g: Tensor, input: Tensor) -> Tensor:
    """The gradient of `silu` from the cotangent g."""
    return _gradient("silu", g, input)


def gelu_backward(g: Tensor, input: Tensor, approximate: str = "none") -> Tensor:
    """The gradient of `gelu` from the cotangent g."""
    return _gradient("gelu" if approximate == "none" else "gelu_tanh", g, input)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once: the gated MLP."""
    check_tensor("silu_mul", "gate", gate)
    check_tensor("silu_mul", "up", up, (gate.dtype,), like=gate)
    check_shape("silu_mul", "up", up, gate.shape)
    return _silu_mul.on_views(
        (gate, up, gate.dtype), lambda: (_one_row(gate), _one_row(up), gate.dtype), lambda y: y.reshape(gate.shape)
    )


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the pairs of elements of x [*, D] by angles whose cosines and sines [*, D / 2] broadcast against it.

    Pair i is elements i and i + D / 2, or 2 i and 2 i + 1 if `interleaved`. The tables get no gradient.
    """
    check_tensor("rotary_embedding", "x", x)
    if not x.dim() or x.shape[-1] % 2:
        raise RuntimeError(f"bi_torch.rotary_embedding: the last dimension of x must be even, got {list(x.shape)}")
    pairs = (*x.shape[:-1], x.shape[-1] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor("rotary_embedding", name, table, like=x)
        if table.dim() > len(pairs) or any(n not in (1, m) for n, m in zip(table.shape[::-1], pairs[::-1], strict=False)):
            raise RuntimeError(f"bi_torch.rotary_embedding: {name} must broadcast to {list(pairs)}, got {list(table.shape)}")
    return _rotary_embedding(x, cos.detach(), sin.detach(), bool(interleaved))


def rotary_tables(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [*, head_dim / 2], of positions [*] times theta ** (-2 i / head_dim)."""
    check_tensor("rotary_tables", "positions", positions, (torch.int32, torch.int64))
    frequencies = torch.tensor(inverse_frequencies(head_dim, theta).tolist(), dtype=torch.float32, device=positions.device)
    rows = positions.reshape(positions.numel())
    tables = _rotary_tables(frequencies.expand(rows.shape[0], head_dim // 2), rows)
    cos, sin = (table.reshape(*positions.shape, head_dim // 2) for table in tables)
    return cos, sin


def _one_row(x: Tensor) -> Tensor:
    return x.reshape(1, x.numel())


def _elementwise(name: str, op: RowOp, input: Tensor) -> Tensor:
    check_tensor(name, "input", input)
    return op.on_views((input, input.dtype), lambda: (_one_row(input), input.dtype), lambda y: y.reshape(input.shape))


def _gradient(name: str, g: Tensor, input: Tensor) -> Tensor:
    check_tensor(f"{name}_backward", "input", input)
    check_tensor(f"{name}_backward", "g", g, like=input)
    check_shape(f"{name}_backward", "g", g, input.shape)
    return _GRADIENTS[name].on_views(
        (input, g, input.dtype), lambda: (_one_row(input), _one_row(g), input.dtype), lambda dx: dx.reshape(input.shape)
    )
